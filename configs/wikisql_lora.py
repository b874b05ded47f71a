"""LoRA on stories260K to write SQL: questions about tables, packed, loss on the query only.

Command:   JAXPEFT_ASSETS=FOLDER python -m jaxpeft.train --config configs/wikisql_lora.py
Data:      FOLDER/wikisql-lora: 998 rows of WikiSQL from mlx-examples, 100 for validation, 100 for
           test
Model:     FOLDER/stories260K/hf: llama2.c's stories260K as config.json, model.safetensors and
           tokenizer.json
Hardware:  a CPU with 2 cores
Time:      4 minutes
Expected:  loss of the test answers 7.36 before training, 1.91 after; SQL in the right form, with
           wrong names
"""

import os
from pathlib import Path

from ml_collections import ConfigDict

from jaxpeft.config import defaults

ASSETS = Path(os.environ.get("JAXPEFT_ASSETS", Path(__file__).parents[2] / "shared" / "assets"))


def get_config() -> ConfigDict:
    """Return the options that differ from the defaults."""
    config = defaults("lora")
    config.model.path = str(ASSETS / "stories260K" / "hf")
    config.model.task = "causal_lm"
    config.method.rank = 32
    config.method.alpha = 64
    config.method.targets = "all-linear"
    for split, name in (("train", "train"), ("validation", "dev"), ("test", "test")):
        config.data[split] = str(ASSETS / "wikisql-lora" / f"{name}.jsonl")
    config.data.separator = "\nA: "
    config.data.max_length = 512
    config.data.packing = True
    config.optimizer.learning_rate = 5e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_ratio = 0.05
    config.train.epochs = 4
    config.train.batch_size = 16
    config.evaluation.samples = 1
    return config
