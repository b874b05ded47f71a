"""The fixtures of whole runs."""

from tests.train.runs import finished, make_config, tiny_models

__all__ = ["finished", "make_config", "tiny_models"]
