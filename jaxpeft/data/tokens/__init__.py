"""Tokenize, cache, pack and pad examples."""

from jaxpeft.data.tokens.tokenize import prefix, special_tokens

__all__ = ["prefix", "special_tokens"]
