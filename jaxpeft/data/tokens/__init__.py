"""Examples to tokens: tokenized, cached, padded and packed."""

from jaxpeft.data.tokens.tokenize import prefix, special_tokens

__all__ = ["prefix", "special_tokens"]
