"""Files to rows: which files, their formats, and what their columns hold."""
