"""Examples to tokens: tokenized, cached, padded and packed."""
