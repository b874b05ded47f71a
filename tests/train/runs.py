"""What the tests of whole runs share: tiny model folders with a tokenizer, rows to train on, and
configs of them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxpeft.checkpoint.manager import Checkpoints
from jaxpeft.config import defaults
from jaxpeft.config.files import parse_config
from jaxpeft.config.schema import Config
from jaxpeft.train import job
from jaxpeft.train.run import RunResult
from tests.models.conftest import tiny_config

WORDS = [f"word{i}" for i in range(60)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LABELS = ("red", "green", "blue")
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer that knows `WORDS`, one token each."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        model_max_length=40,
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Folders of a tiny BERT and a tiny Llama, each with a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    folders: dict[str, Path] = {}
    for kind, loader in (("bert", AutoModel), ("llama", AutoModelForCausalLM)):
        torch.manual_seed(0)
        values = tiny_config(kind)
        folders[kind] = tmp_path_factory.mktemp(kind)
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        loader.from_config(config).float().save_pretrained(folders[kind])
        write_tokenizer(folders[kind])
    return folders


def write_rows(path: Path, kind: str, n: int = 60) -> Path:
    """Write rows whose first word tells the label."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for i in range(n):
        label = i % len(LABELS)
        text = " ".join([WORDS[label], *rng.choice(WORDS[3:], rng.integers(2, 12))])
        values: dict[str, dict[str, Any]] = {
            "single": {"text": text, "label": LABELS[label]},
            "pair": {"sentence1": text, "sentence2": WORDS[label], "label": LABELS[label]},
            "regression": {"text": text, "label": float(label)},
            "text": {"text": text},
            "tags": {
                "tokens": text.split(),
                "tags": [TAGS[WORDS.index(word) % len(TAGS)] for word in text.split()],
            },
        }
        rows.append(values[kind])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_config(path: Path, model: Path, rows: Path, **options: Any) -> Path:
    """Write the config file of a short classification, for tests of commands; further options by
    `section__option=value`.
    """
    given = {
        "model__path": str(model),
        "model__task": "sequence_classification",
        "data__train": str(rows),
        "data__max_length": 16,
        "data__validation_share": 0.2,
        "train__batch_size": 8,
        **options,
    }
    if not given.get("data__packing"):
        # one program to compile, not two
        given.setdefault("data__lengths", (given["data__max_length"],))
    lines = "".join(
        f"    config.{name.replace('__', '.')} = {value!r}\n" for name, value in given.items()
    )
    start = (
        'from jaxpeft.config import defaults\n\ndef get_config():\n    config = defaults("lora")\n'
    )
    path.write_text(f"{start}{lines}    return config\n")
    return path


def short_config(
    models: Mapping[str, Path], folder: Path, kind: str, method: str = "lora", **options: Any
) -> Config:
    """Make the config of a short run, whose rows are written to a folder; options by
    `section__option=value`.
    """
    values = defaults(method).to_dict()
    text = kind == "text"
    values["model"] |= {"path": str(models["llama" if text else "bert"])}
    values["model"]["task"] = "causal_lm" if text else "sequence_classification"
    values["data"] |= {"train": str(write_rows(folder / f"{kind}.jsonl", kind)), "max_length": 16}
    values["data"]["validation_share"] = 0.2
    values["train"] |= {"steps": 6, "batch_size": 8}
    values["optimizer"] |= {"learning_rate": 1e-2, "warmup_steps": 2}
    values["log"] |= {"every_steps": 1, "tensorboard": False, "plot": False, "progress": "off"}
    if not options.get("data__packing"):
        values["data"]["lengths"] = (options.get("data__max_length", 16),)
    for name, value in options.items():
        section, _, option = name.partition("__")
        if option:
            values[section][option] = value
        else:
            values[section] = value
    config, problems = parse_config(values)
    assert not problems, problems
    assert config is not None
    return config


@pytest.fixture
def make_config(tiny_models: Mapping[str, Path], tmp_path: Path) -> Callable[..., Config]:
    """Make the config of a short run; options by `section__option=value`."""

    def make(kind: str = "single", method: str = "lora", **options: Any) -> Config:
        return short_config(tiny_models, tmp_path, kind, method, **options)

    return make


@dataclass(frozen=True)
class Finished:
    """A run that has ended; tests read it and leave it as it is.

    Attributes:
        config: its config.
        folder: its folder.
        result: what it returned.
        messages: what it logged.
        saved: the steps that it saved a checkpoint of.
    """

    config: Config
    folder: Path
    result: RunResult
    messages: tuple[str, ...]
    saved: tuple[int, ...]


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def finish(config: Config, folder: Path) -> Finished:
    """Run a config to its end, and note what it logs and saves."""
    logger, kept, saved = logging.getLogger("jaxpeft"), _Kept(), list[int]()
    level, save = logger.level, Checkpoints.save
    logger.addHandler(kept)
    logger.setLevel(logging.INFO)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                Checkpoints,
                "save",
                lambda self, step, *rest: saved.append(step) or save(self, step, *rest),
            )
            result = job.run(config, folder)
    finally:
        logger.removeHandler(kept)
        logger.setLevel(level)
    return Finished(config, folder, result, tuple(kept.messages), tuple(saved))


@pytest.fixture(scope="session")
def finished(tiny_models: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A classifier that was trained for ten epochs of 6 steps and 2 steps more."""
    folder = tmp_path_factory.mktemp("finished")
    config = short_config(
        tiny_models,
        folder,
        "single",
        train__steps=62,
        train__seed=5,
        checkpoint__every_steps=None,
        log__tensorboard=True,
        log__plot=True,
        log__progress="plain",
        optimizer__head_learning_rate=0.1,
    )
    return finish(config, folder / "run")
