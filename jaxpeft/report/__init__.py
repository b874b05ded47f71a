"""HTML pages of runs and comparisons: self-contained, without scripts and without the network."""
