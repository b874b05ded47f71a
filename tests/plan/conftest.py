"""The fixtures of whole runs, which plans are compared with."""

from tests.train.runs import make_config, tiny_models

__all__ = ["make_config", "tiny_models"]
