"""Abstract run for a plan: shapes of model, adapter, optimizer and batch, from a config and a
`config.json`, without reading weights.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxpeft.config.schema import Config
from jaxpeft.core import tree
from jaxpeft.core.paths import Tree
from jaxpeft.core.rewriting import trainable_mask
from jaxpeft.data.batches.training import batch_like
from jaxpeft.data.examples.labels import ProblemType
from jaxpeft.errors import ConfigError, nearest
from jaxpeft.hub import sources
from jaxpeft.hub.checkpoints import DescribedCheckpoint
from jaxpeft.hub.loading import Outline, outline_of
from jaxpeft.hub.text_config import read_model_config
from jaxpeft.json_files import read_json
from jaxpeft.models.base import Pretrained
from jaxpeft.models.composite import text_config
from jaxpeft.plan.shapes import SHAPES
from jaxpeft.train import optimizers
from jaxpeft.train.from_config import abstract_rewrite, model_request, training_loss
from jaxpeft.train.losses import Loss
from jaxpeft.train.step import TrainState, init_state

_STEPS = 1000
"""Steps of a run whose length depends on its rows; the number does not affect the program."""


@dataclass(frozen=True)
class Subject:
    """An abstract run, with shapes and dtypes instead of arrays.

    Attributes:
        config: config of the run.
        outline: outline of its model.
        state: train state.
        frozen: frozen part of the tree.
        loss: training loss.
        optimizer: optimizer of the run.
        batch: batch of an optimizer step, with a leading micro-batch axis if accumulated.
    """

    config: Config
    outline: Outline
    state: TrainState
    frozen: Tree
    loss: Loss
    optimizer: Any
    batch: Mapping[str, jax.ShapeDtypeStruct]

    @property
    def model(self) -> Pretrained:
        """The Linen module."""
        return self.outline.model

    @property
    def base(self) -> Tree:
        """Shape and dtype of every leaf of the base, as stored."""
        return self.outline.leaves

    def with_model(self, model: Pretrained) -> Subject:
        """Return the same run with another model."""
        return dataclasses.replace(self, outline=dataclasses.replace(self.outline, model=model))

    @property
    def rows(self) -> int:
        """Rows computed at once on all devices."""
        return self.config.train.batch_size // self.config.train.accumulation

    @property
    def length(self) -> int:
        """Tokens per row."""
        return self.config.data.max_length

    @property
    def tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.config.train.batch_size * self.length


def model_config(path: str, revision: str | None, named: str | None) -> dict[str, Any]:
    """Read only the `config.json` of a model.

    Args:
        path: `config.model.path`.
        revision: revision of a Hub id.
        named: a file, a folder with a `config.json`, or a name in `SHAPES`; None for the one of
            `path`.

    Raises:
        ConfigError: no such file or shape exists.
        WeightsError: the file cannot be read.
    """
    if named is not None and named in SHAPES:
        return dict(SHAPES[named])
    if named is not None:
        file = Path(named) / "config.json" if Path(named).is_dir() else Path(named)
        if not file.is_file():
            raise ConfigError(
                f"--model-config: {named!r} is neither a file nor a known"
                f" shape{nearest(named, SHAPES)} (known: {', '.join(SHAPES)})"
            )
        return text_config(read_json(file))
    folder = Path(path).expanduser()
    if folder.is_dir() or path.startswith("package:"):
        return read_model_config(sources.resolve(path, revision).folder)
    return text_config(read_json(_from_hub(path, revision)))


def _from_hub(name: str, revision: str | None) -> Path:
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        return Path(
            hub.hf_hub_download(
                name,
                "config.json",
                revision=revision,
                local_files_only=hub.constants.HF_HUB_OFFLINE,
            )
        )
    except (
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
        errors.HFValidationError,
        OSError,
    ) as error:
        raise ConfigError(
            f"config.model.path: {name!r}: its config.json is not available"
            f" ({type(error).__name__}); give it with --model-config, as a file or one of"
            f" {', '.join(SHAPES)}"
        ) from error


def subject(
    config: Config, described: Mapping[str, Any], attention: str, remat: str, *, scan: bool
) -> Subject:
    """Make an abstract run.

    Args:
        config: a checked config.
        described: contents of the model's `config.json`.
        attention: attention kernel.
        remat: remat policy.
        scan: whether the layers are scanned.

    Raises:
        ConfigError: the model is not supported, or the options are incompatible.
        TargetError: the method's targets match no module of the model.
    """
    request = model_request(config.model, _labels(config), scan_layers=scan, attention=attention)
    outlined = outline_of(dataclasses.replace(request, remat=remat), DescribedCheckpoint(described))
    params = abstract_rewrite(config.method, outlined.leaves)
    trainable, frozen = tree.partition(params, trainable_mask(config.method, params))
    optimizer = optimizers.build(
        optimizers.options_for(config), config.train.steps or _STEPS, config.method
    )
    problem = _problem(config)
    return Subject(
        config=config,
        outline=outlined,
        state=jax.eval_shape(
            lambda leaves: init_state(leaves, optimizer, config.train.seed), trainable
        ),
        frozen=frozen,
        loss=training_loss(config, problem),
        optimizer=optimizer,
        batch=_batch(config, problem, outlined.model.options.num_labels, described),
    )


def with_changes(config: Config, **changes: Any) -> Config:
    """Return a config with changed options, each named `section__option`."""
    out = config
    for key, value in changes.items():
        section, _, option = key.partition("__")
        out = dataclasses.replace(
            out, **{section: dataclasses.replace(getattr(out, section), **{option: value})}
        )
    return out


def _labels(config: Config) -> int | None:
    """Return the number of classes from the config alone; None to use `config.json`."""
    if config.model.task == "causal_lm":
        return None
    return 1 if config.data.problem == "regression" else len(config.data.labels) or None


def _problem(config: Config) -> ProblemType | None:
    """Return the problem type of a sequence classification from the config alone; None for other
    tasks.
    """
    if config.model.task != "sequence_classification":
        return None
    if config.data.problem == "auto":
        return "multi_label" if config.data.label_separator else "single_label"
    return config.data.problem


def _batch(
    config: Config, problem: ProblemType | None, labels: int | None, described: Mapping[str, Any]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the abstract arrays of a batch."""
    train, data = config.train, config.data
    arrays = batch_like(
        problem,
        labels or 0,
        train.batch_size,
        data.max_length,
        train.accumulation,
        packed=data.packing,
        types=described.get("type_vocab_size", 0) > 1,
    )
    return {name: jax.ShapeDtypeStruct(one.shape, one.dtype) for name, one in arrays.items()}


def described_in_json(described: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model sizes in a `config.json`, for a report."""
    keys = (
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "dtype",
        "torch_dtype",
    )
    return json.loads(json.dumps({key: described[key] for key in keys if key in described}))
