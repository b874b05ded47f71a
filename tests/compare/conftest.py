"""The fixtures of whole runs."""

from tests.train.runs import make_config, tiny_models

__all__ = ["make_config", "tiny_models"]
