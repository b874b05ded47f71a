"""Checkpoints: what a run needs to go on, and the check that it is the same run."""
