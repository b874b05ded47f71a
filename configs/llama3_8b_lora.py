"""LoRA on all linear layers of Llama-3.1-8B for instruction following, on one accelerator.

Command:   python -m jaxpeft.train --config configs/llama3_8b_lora.py
Data:      tatsu-lab/alpaca from the hub, with only the outputs in the loss mask; a hundredth of the
           rows is held out for validation
Model:     meta-llama/Llama-3.1-8B from the hub, which requires a login (`hf auth login`); 16 GB in
           bfloat16
Hardware:  one GPU or TPU with 40 GB or more; layers and remat are chosen for its memory
           (docs/speed.md)
Time:      0.6 s a step, 6,900 tokens/s at 22 GB, on an H100 with `--config.model.scan_layers=True
           --config.model.remat=attention` (`python -m benchmarks.llama_8b`: random weights and
           synthetic texts); not measured yet with the automatic choices
Expected:  not measured yet on the real weights

With less memory: --config.model.quant=nf4
"""

from ml_collections import ConfigDict

from jaxpeft.config import defaults


def get_config() -> ConfigDict:
    """Return the options that differ from the defaults."""
    config = defaults("lora")
    config.model.path = "meta-llama/Llama-3.1-8B"
    config.model.task = "causal_lm"
    config.model.dtype = "bfloat16"
    config.method.rank = 16
    config.method.alpha = 32
    config.data.train = "tatsu-lab/alpaca"
    config.data.format = "instruction"
    config.data.chat_template = "alpaca"
    config.data.validation_share = 0.01
    config.data.max_length = 512
    config.optimizer.learning_rate = 2e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_ratio = 0.03
    config.train.epochs = 1
    config.train.batch_size = 32
    config.train.accumulation = 4
    config.evaluation.every_steps = 200
    config.evaluation.batch_size = 8
    return config
