"""Tokens to batches, as a pure function of seed and step."""
