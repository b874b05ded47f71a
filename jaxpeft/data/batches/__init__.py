"""Build batches of tokens as a pure function of seed and step, and prefetch them."""
