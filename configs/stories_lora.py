"""LoRA on stories260K, a tiny Llama for children's stories, to write Shakespeare on a CPU.

Command:   JAXPEFT_ASSETS=FOLDER python -m jaxpeft.train --config configs/stories_lora.py
Data:      FOLDER/tinyshakespeare/input.txt (the file of karpathy's char-rnn); a tenth of its pieces
           is held out for validation
Model:     FOLDER/stories260K/hf: llama2.c's stories260K as config.json, model.safetensors and
           tokenizer.json
Hardware:  a CPU with 2 cores
Time:      about 3 minutes on 2 cores
Expected:  perplexity of the held-out tenth: 143 before training, 13.1 after (docs/results.md)
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
    config.method.rank = 16
    config.method.alpha = 32
    config.data.train = str(ASSETS / "tinyshakespeare" / "input.txt")
    config.data.max_length = 256
    config.optimizer.learning_rate = 5e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_ratio = 0.05
    config.train.epochs = 3
    config.train.batch_size = 16
    return config
