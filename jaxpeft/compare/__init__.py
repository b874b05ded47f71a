"""Comparisons of methods: every candidate with every seed, and the table of what they reach."""
