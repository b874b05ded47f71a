"""Benchmarks: ours beside a peer in one run, each a command that prints its figures."""
