"""Checkpoints: save and restore a run, and check that it is the same run."""
