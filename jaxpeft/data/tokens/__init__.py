"""Tokenize, cache, pack and pad examples."""
