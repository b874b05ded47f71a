"""From a config to what a run needs: tokenizer, rows, model, loss. What is the same for every method."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jaxpeft import data
from jaxpeft.config.schema import Config, as_dict
from jaxpeft.core.paths import Tree
from jaxpeft.data import plan
from jaxpeft.errors import ConfigError, DataError, nearest
from jaxpeft.evaluation.metrics import FIGURES
from jaxpeft.hub import sources
from jaxpeft.hub.loading import load
from jaxpeft.models.base import Pretrained
from jaxpeft.training.losses import Loss, loss_for
from jaxpeft.training.progress import rows_shown

_log = logging.getLogger(__name__)
_KINDS: dict[str, data.Kind] = {
    "sequence_classification": "classification",
    "token_classification": "token_classification",
}
Encoded = data.Encoded


@dataclass(frozen=True)
class Setup:
    """A prepared run.

    Attributes:
        config: its options.
        model: the Linen module.
        params: the base, with a newly made head.
        loss: from logits and batch to sum and weight.
        train: the training rows as tokens.
        validation: the rows to choose the best step by.
        test: the rows for the final figures.
        batches: the training batches by step.
        steps: optimizer steps of the whole run.
        pad_id: token to pad with.
        labels: names of the classes.
        problem: `single_label`, `multi_label`, `regression`, `token` or `lm`.
        identity: what makes this run this run, for the checkpoints.
    """

    config: Config
    model: Pretrained
    params: Tree
    loss: Loss
    train: Encoded
    validation: Encoded
    test: Encoded
    batches: data.Batches
    steps: int
    pad_id: int
    labels: tuple[str, ...]
    problem: str
    identity: Mapping[str, Any]


def prepare(config: Config) -> Setup:
    """Reads tokenizer, rows and weights.

    Args:
        config: a checked config.

    Raises:
        JaxpeftError: whatever cannot be used, named.
    """
    source = sources.resolve(config.model.path, config.model.revision)
    model_config = sources.read_json(source.folder / "config.json")
    vocab = _vocabulary(model_config, source)
    tokenizer = load_tokenizer(source)
    splits = _examples(config)
    problem = _problem(splits[0])
    _check_metric(config.evaluation.metric, problem, splits[0].num_labels)
    train, validation = (_encode(examples, tokenizer, config, vocab) for examples in splits[:2])
    test = _encode(splits[2], tokenizer, config, vocab) if splits[2] is not splits[1] else validation
    labels = splits[0].label_names
    model, params = load(
        config.model.path,
        task=config.model.task,
        num_labels=splits[0].num_labels or None,
        dtype=_dtype(config.model.dtype),
        compute_dtype=_dtype(config.model.compute_dtype),
        scan_layers=config.model.scan_layers,
        pooling=config.model.pooling,
        remat=config.model.remat,
        revision=config.model.revision,
        seed=config.train.seed,
    )
    pad = data.pad_id(tokenizer, vocab)
    lengths = padded_lengths(config, train)
    batches = data.Batches(
        train, config.train.batch_size, lengths, config.train.seed, pad, accumulation=config.train.accumulation
    )
    _check_positions(model, batches.lengths[-1])
    return Setup(
        config=config,
        model=model,
        params=params,
        loss=loss_for(config.model.task, train.problem),
        train=train,
        validation=validation,
        test=test,
        batches=batches,
        steps=config.train.steps or max(1, round((config.train.epochs or 0) * batches.steps_per_epoch)),
        pad_id=pad,
        labels=labels,
        problem=problem,
        identity={
            "config": as_dict(config),
            "base": {"sha256": sources.fingerprint(source)},
            "data": {name: e.fingerprint for name, e in (("train", train), ("validation", validation), ("test", test))},
        },
    )


def padded_lengths(config: Config, split: Encoded) -> tuple[int, ...]:
    """Gives the lengths that the rows of a split are padded to."""
    if config.data.packing:
        return (config.data.max_length,)
    return config.data.lengths or data.choose_lengths(split.lengths, config.data.max_length)


def load_tokenizer(source: sources.Source) -> Any:
    """Loads the tokenizer of a model folder; no code of the folder is run.

    Raises:
        DataError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{source.folder}: no tokenizer that can be used ({str(error).splitlines()[0][:200]}); "
            "the folder must hold tokenizer.json and tokenizer_config.json"
        ) from error


def _vocabulary(model_config: Mapping[str, Any], source: sources.Source) -> int:
    size = model_config.get("vocab_size")
    if not isinstance(size, int):
        raise ConfigError(f"{source.folder / 'config.json'}: vocab_size must be an integer, is {size!r}")
    return size


def _check_positions(model: Pretrained, length: int) -> None:
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and length > most:
        raise ConfigError(
            f"data.max_length: rows of {length} tokens, the model has {most} positions; set it to {most} or less"
        )


def _problem(examples: data.Examples) -> str:
    return {"classification": str(examples.problem), "token_classification": "token"}.get(examples.kind, "lm")


def _check_metric(metric: str | None, problem: str, labels: int) -> None:
    known = ("loss", *FIGURES[problem], *(("f1",) if problem == "single_label" and labels == 2 else ()))
    if metric is not None and metric not in known:
        raise ConfigError(
            f"evaluation.metric: {metric!r} is not a figure of this data{nearest(metric, known)} (known: {', '.join(known)})"
        )


def _dtype(name: str) -> Any:
    return None if name == "auto" else jnp.dtype(name)


def _examples(config: Config) -> tuple[data.Examples, data.Examples, data.Examples]:
    options, columns = config.data, data.Columns(**config.data.columns)
    problem = None if options.problem == "auto" else options.problem
    rows = _read(options.train, "train", config)
    kind = _kind(config, rows, columns)
    # labels are those of all rows: which of them are drawn to be trained on or held out must not change the classes
    whole = data.make_examples(rows, kind=kind, problem=problem, columns=columns) if "class" in kind else None
    rows = _drawn(rows, config)
    if not options.validation:
        share, seed = options.validation_share, config.train.seed
        text = kind == "text"
        rows, held_out = data.hold_out_text(rows, share, seed, columns) if text else data.hold_out(rows, share, seed)
    else:
        held_out = _drawn(_read(options.validation, "validation", config), config)
    train = data.make_examples(rows, kind=kind, problem=problem, columns=columns, like=whole)
    validation = data.make_examples(held_out, kind=kind, like=train)
    if not options.test:
        return train, validation, validation
    test = data.make_examples(_drawn(_read(options.test, "test", config), config), kind=kind, like=train)
    return train, validation, test


def _kind(config: Config, rows: data.Rows, columns: data.Columns) -> data.Kind:
    task, given = config.model.task, config.data.format
    if task in _KINDS:
        if given != "auto":
            raise ConfigError(f"data.format: {given!r} is for task 'causal_lm', task is {task!r}; set it to 'auto'")
        return _KINDS[task]
    kind = data.find_format(rows.columns(), columns, rows.name) if given == "auto" else given
    _log.info("%s: rows of format %s", rows.name, kind)
    return kind


def _read(path: str, split: str, config: Config) -> data.Rows:
    if not data.is_hub_id(path):
        return data.read_rows(path)
    return data.read_rows(path, split=split, config=config.data.subset, revision=config.data.revision)


def _drawn(rows: data.Rows, config: Config) -> data.Rows:
    most = config.data.max_rows
    if most is None or most >= len(rows):
        return rows
    return rows.take(sorted(plan.order(len(rows), config.train.seed)[:most].tolist()))


def _encode(examples: data.Examples, tokenizer: Any, config: Config, vocab: int) -> Encoded:
    text, options = "classification" not in examples.kind, config.data
    with rows_shown(config.log.progress, f"tokenising {examples.rows.name}") as progress:
        encoded = data.encode(
            examples,
            tokenizer,
            max_length=options.max_length,
            vocab_size=vocab,
            add_bos=text and options.add_bos and tokenizer.bos_token_id is not None,
            add_eos=text and options.add_eos and tokenizer.eos_token_id is not None,
            chat_template=options.chat_template,
            most_dropped=options.most_dropped,
            progress=progress,
        )
    counts = encoded.counts
    cut = f", {counts['truncated']} cut at {options.max_length} tokens" if counts["truncated"] else ""
    learned = f", {counts['learned'] / max(1, counts['tokens']):.0%} of them learned" if text else ""
    dropped = f", {counts['dropped']} rows dropped: nothing learned is left of them" if counts["dropped"] else ""
    _log.info("%s: %d rows, %d tokens%s%s%s (%s)", examples.rows.name, counts["rows"], counts["tokens"], learned, cut,
              dropped, "from the cache" if encoded.cache == "hit" else "tokenised")  # fmt: skip
    if not options.packing:
        return encoded
    packed = data.pack(encoded, options.max_length)
    full = data.fill(packed, options.max_length)
    _log.info("packed %d sequences into %d rows of %d tokens, %.1f%% full",
              len(encoded), len(packed), options.max_length, 100 * full)  # fmt: skip
    return packed
