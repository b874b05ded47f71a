"""Multi-process runs: discovery, initialization, coordination, stopping, and global arrays."""
