"""Read rows from files: find the files, parse their formats, and detect column roles."""
