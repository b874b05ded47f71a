"""What is planned: model, adapter, optimizer and batch of a run as shapes, from its config and a
`config.json`; no weight is read.
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
from jaxpeft.json_files import read_json
from jaxpeft.models.base import Pretrained
from jaxpeft.plan.shapes import SHAPES
from jaxpeft.train import optimizers
from jaxpeft.train.from_config import abstract_rewrite, model_request, training_loss
from jaxpeft.train.losses import Loss
from jaxpeft.train.step import TrainState, init_state

_STEPS = 1000
"""Of a run whose length depends on its rows: the schedule's shape changes no program."""


@dataclass(frozen=True)
class Subject:
    """A run of which everything is known but the numbers.

    Attributes:
        config: its options.
        outline: of its model.
        state: what a step changes.
        frozen: the rest of the tree.
        loss: of the task.
        optimizer: the run's own.
        batch: of an optimizer step, with an axis of parts in front where it is computed in several.
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
        """Shape and dtype of every leaf of the base, as it is stored."""
        return self.outline.leaves

    def with_model(self, model: Pretrained) -> Subject:
        """Return the same run of a model with other options."""
        return dataclasses.replace(self, outline=dataclasses.replace(self.outline, model=model))

    @property
    def rows(self) -> int:
        """Rows that are computed at once, over all devices."""
        return self.config.train.batch_size // self.config.train.accumulation

    @property
    def length(self) -> int:
        """Tokens a row."""
        return self.config.data.max_length

    @property
    def tokens(self) -> int:
        """Tokens of an optimizer step."""
        return self.config.train.batch_size * self.length


def model_config(path: str, revision: str | None, given: str | None) -> dict[str, Any]:
    """Read the `config.json` of a model, and nothing else of it.

    Args:
        path: as `config.model.path`.
        revision: of a hub id.
        given: a file, a folder that holds `config.json`, or a name in `SHAPES`; None for that of
            `path`.

    Raises:
        ConfigError: there is no such file or shape.
        WeightsError: it cannot be read.
    """
    if given is not None and given in SHAPES:
        return dict(SHAPES[given])
    if given is not None:
        file = Path(given) / "config.json" if Path(given).is_dir() else Path(given)
        if not file.is_file():
            raise ConfigError(
                f"--model-config: {given!r} is neither a file nor a known"
                f" shape{nearest(given, SHAPES)} (known: {', '.join(SHAPES)})"
            )
        return read_json(file)
    folder = Path(path).expanduser()
    if folder.is_dir() or path.startswith("package:"):
        return read_json(sources.resolve(path, revision).folder / "config.json")
    return read_json(_from_hub(path, revision))


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
            f" ({type(error).__name__}); name it with --model-config, a file or one of"
            f" {', '.join(SHAPES)}"
        ) from error


def subject(
    config: Config, described: Mapping[str, Any], attention: str, remat: str, *, scan: bool
) -> Subject:
    """Make the shapes of a run.

    Args:
        config: a checked config.
        described: the content of the model's `config.json`.
        attention: the kernel that computes attention.
        remat: what the backward pass computes again.
        scan: whether the layers are scanned.

    Raises:
        ConfigError: the model is not supported, or what is asked of it does not go together.
        TargetError: the method's targets are none of the model's.
    """
    asked = model_request(config.model, _labels(config), scan_layers=scan, attention=attention)
    outlined = outline_of(dataclasses.replace(asked, remat=remat), DescribedCheckpoint(described))
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
    """Return a config with some options of its sections changed, each named `section__option`."""
    out = config
    for key, value in changes.items():
        section, _, option = key.partition("__")
        out = dataclasses.replace(
            out, **{section: dataclasses.replace(getattr(out, section), **{option: value})}
        )
    return out


def _labels(config: Config) -> int | None:
    """Return the classes of a head that the config names, None for those of `config.json`; no row
    is read.
    """
    if config.model.task == "causal_lm":
        return None
    return 1 if config.data.problem == "regression" else len(config.data.labels) or None


def _problem(config: Config) -> ProblemType | None:
    """Return the kind of a sequence classification, as far as the config alone says it; None of
    another task.
    """
    if config.model.task != "sequence_classification":
        return None
    if config.data.problem == "auto":
        return "multi_label" if config.data.label_separator else "single_label"
    return config.data.problem


def _batch(
    config: Config, problem: ProblemType | None, labels: int | None, described: Mapping[str, Any]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the arrays of a batch."""
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
    """Return what a report says of a model: those of its sizes that its `config.json` names."""
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
