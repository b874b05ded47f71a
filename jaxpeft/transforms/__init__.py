"""The public functions over parameter trees: `rewrite`, `merge` and others, with all checks."""
