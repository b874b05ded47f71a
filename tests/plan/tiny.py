"""What the tests of plans share: a small Llama by its `config.json` alone, and a config that names
no file that exists.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SMALL = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
"""Heads of 64 numbers, which splash attention takes."""
NARROW: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 64,
    "vocab_size": 512,
}
"""What makes it compile in a quarter of the time, with the same heads and the same programs."""
CONFIG = """
from jaxpeft.config import defaults


def get_config():
    config = defaults("lora")
    config.model.path = "no/such-model"
    config.data.train = "no_such_rows.jsonl"
    config.data.max_length = 256
    config.train.steps = 10
    config.train.batch_size = 16
    config.evaluation.batch_size = 16
    return config
"""


def write(folder: Path, **changed: Any) -> tuple[Path, Path]:
    """Write `(config file, config.json)`."""
    (folder / "small.py").write_text(CONFIG)
    (folder / "config.json").write_text(json.dumps({**SMALL, **changed}))
    return folder / "small.py", folder / "config.json"
