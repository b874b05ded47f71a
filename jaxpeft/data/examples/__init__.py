"""Rows to examples: checked texts or words, and labels as numbers."""
