"""Exporting an adapter in other libraries' formats, or merged into its base."""
