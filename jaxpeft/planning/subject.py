"""What is planned: model, adapter, optimizer and batch of a run as shapes, from its config and a `config.json`; no weight is read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import models
from jaxpeft.config.schema import Config
from jaxpeft.core import paths, tree
from jaxpeft.core.paths import Tree
from jaxpeft.core.rewriting import trainable_mask
from jaxpeft.errors import ConfigError, TargetError, nearest
from jaxpeft.hub import sources
from jaxpeft.json_files import read_json
from jaxpeft.models.base import Options, Pretrained, abstract_params
from jaxpeft.planning.shapes import SHAPES
from jaxpeft.quant.tree import Quant
from jaxpeft.training import optimizers
from jaxpeft.training.head_loss import CrossEntropy
from jaxpeft.training.losses import Loss, loss_for
from jaxpeft.training.step import TrainState, init_state
from jaxpeft.transforms.rewrite import rewrite

_STEPS = 1000
"""Of a run whose length depends on its rows: the schedule's shape changes no program."""


@dataclass(frozen=True)
class Subject:
    """A run of which everything is known but the numbers.

    Attributes:
        config: its options.
        model: the Linen module.
        base: shape and dtype of every leaf of the base, as it is stored.
        state: what a step changes.
        frozen: the rest of the tree.
        loss: of the task.
        optimizer: the run's own.
        batch: of an optimizer step, with an axis of parts in front where it is computed in several.
    """

    config: Config
    model: Pretrained
    base: Tree
    state: TrainState
    frozen: Tree
    loss: Loss
    optimizer: Any
    batch: Mapping[str, jax.ShapeDtypeStruct]

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
    """Reads the `config.json` of a model, and nothing else of it.

    Args:
        path: as `config.model.path`.
        revision: of a hub id.
        given: a file, a folder that holds `config.json`, or a name in `SHAPES`; None for that of `path`.

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
                f"--model-config: {given!r} is no file, and no shape that is known{nearest(given, SHAPES)} (known: {', '.join(SHAPES)})"
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
            hub.hf_hub_download(name, "config.json", revision=revision, local_files_only=hub.constants.HF_HUB_OFFLINE)
        )
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError, OSError) as error:
        raise ConfigError(
            f"config.model.path: {name!r}: its config.json is not to be had ({type(error).__name__}); name it with --model-config, a "
            f"file or one of {', '.join(SHAPES)}"
        ) from error


def subject(config: Config, described: Mapping[str, Any], attention: str, remat: str, *, scan: bool) -> Subject:
    """Makes the shapes of a run.

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
    dtype = _dtype(config.model.dtype, described)
    compute = jnp.dtype(config.model.compute_dtype) if config.model.compute_dtype != "auto" else dtype
    quant = _quant(config, described)
    options = Options(
        config.model.task, _labels(config, described), compute, scan_layers=scan, pooling=config.model.pooling,
        remat=remat, attention=attention, right_padded=True, quant=quant,
    )  # fmt: skip
    grown = {} if config.model.vocab_size is None else {"vocab_size": config.model.vocab_size}
    model = models.build({**described, **grown}, options)
    base = _stored(abstract_params(model), dtype, quant, config.model.task)
    try:
        params = jax.eval_shape(partial(rewrite, config.method), base, jax.eval_shape(lambda: jax.random.key(0)))
    except TargetError as error:
        raise TargetError([f"config.method.{problem}" for problem in error.problems]) from error
    trainable, frozen = tree.partition(params, trainable_mask(config.method, params))
    optimizer = optimizers.build(optimizers.options_for(config), config.train.steps or _STEPS, config.method)
    entropy = CrossEntropy(config.train.label_smoothing, config.train.z_loss)
    problem = _problem(config)
    return Subject(
        config=config,
        model=model,
        base=base,
        state=jax.eval_shape(lambda leaves: init_state(leaves, optimizer, config.train.seed), trainable),
        frozen=frozen,
        loss=loss_for(config.model.task, problem, entropy),
        optimizer=optimizer,
        batch=_batch(config, problem, options.num_labels, described),
    )


def with_changes(config: Config, **changes: Any) -> Config:
    """Gives a config with some options of its sections changed, each named `section__option`."""
    out = config
    for key, value in changes.items():
        section, _, option = key.partition("__")
        out = dataclasses.replace(out, **{section: dataclasses.replace(getattr(out, section), **{option: value})})
    return out


def _dtype(asked: str, described: Mapping[str, Any]) -> Any:
    """Gives the dtype of the base: the one asked for, or the one that `config.json` says the files have."""
    named = str(described.get("dtype") or described.get("torch_dtype") or "float32") if asked == "auto" else asked
    named = named.removeprefix("torch.")
    if named not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"config.json: dtype {named!r} is not supported; set config.model.dtype")
    return jnp.dtype(named)


def _quant(config: Config, described: Mapping[str, Any]) -> Quant | None:
    asked = config.model
    if asked.quant != "none":
        return Quant(asked.quant, asked.quant_targets, asked.quant_exclude, asked.quant_group)
    return Quant("nf4") if described.get("quantization_config") else None


def _stored(abstract: Tree, dtype: Any, quant: Quant | None, task: str) -> Tree:
    """Gives the leaves as they are stored: in the files' dtype, quantised where they are to be; a new head in float32."""
    sites = quant.sites(abstract) if quant else {}
    items: list[tuple[paths.Path, Any]] = []
    for path, leaf in paths.walk(abstract):
        own = jnp.float32 if task != "causal_lm" and paths.is_head(path) else dtype
        if path not in sites or quant is None:
            items.append((path, jax.ShapeDtypeStruct(leaf.shape, own)))
            continue
        made = quant.abstract((leaf.shape[-2], leaf.shape[-1]), jnp.float32)
        layers = leaf.shape[:-2]
        items += [
            ((*path[:-1], key), jax.ShapeDtypeStruct((*layers, *one.shape), one.dtype)) for key, one in made.items()
        ]
    return paths.build(items)


def _labels(config: Config, described: Mapping[str, Any]) -> int | None:
    """Gives the classes of a head: those that the config names, or `config.json`, or two; no row is read."""
    if config.model.task == "causal_lm":
        return None
    if config.data.problem == "regression":
        return 1
    named: Any = described.get("id2label")
    return len(config.data.labels) or (len(named) if isinstance(named, Mapping) and named else 2)


def _problem(config: Config) -> str:
    if config.model.task != "sequence_classification":
        return {"causal_lm": "lm"}.get(config.model.task, "token")
    if config.data.problem == "auto":
        return "multi_label" if config.data.label_separator else "single_label"
    return config.data.problem


def _batch(
    config: Config, problem: str, labels: int | None, described: Mapping[str, Any]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Gives the arrays of a batch, as `jaxpeft.data.batches` makes them."""
    parts = config.train.accumulation
    lead = (config.train.batch_size,) if parts == 1 else (parts, config.train.batch_size // parts)
    per_token = (*lead, config.data.max_length)
    classes: dict[str, tuple[tuple[int, ...], Any]] = {
        "single_label": (lead, np.int32),
        "regression": (lead, np.float32),
        "multi_label": ((*lead, labels or 0), np.float32),
    }
    arrays: dict[str, tuple[tuple[int, ...], Any]] = {
        "input_ids": (per_token, np.int32),
        "attention_mask": (per_token, np.int32),
        "labels": classes.get(problem, (per_token, np.int32)),
        "weights": (lead, np.float32),
    }
    if config.data.packing:
        arrays["segment_ids"] = (per_token, np.int32)
    if described.get("type_vocab_size", 0) > 1:
        arrays["token_type_ids"] = (per_token, np.int32)
    return {name: jax.ShapeDtypeStruct(*one) for name, one in arrays.items()}


def described_in_json(described: Mapping[str, Any]) -> dict[str, Any]:
    """Gives what a report says of a model: those of its sizes that its `config.json` names."""
    keys = (
        "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "dtype", "torch_dtype",
    )  # fmt: skip
    return json.loads(json.dumps({key: described[key] for key in keys if key in described}))
