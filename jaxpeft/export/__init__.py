"""Exports: an adapter as other libraries read it, or merged into its base."""
