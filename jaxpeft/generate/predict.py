"""Predict the labels of the rows of a file: `--input IN.csv --output OUT.jsonl`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpeft import atomic
from jaxpeft.command.running import write_lines
from jaxpeft.config.model_config import ModelConfig
from jaxpeft.config.schema import Config
from jaxpeft.data.chat.supervise import IGNORED
from jaxpeft.data.examples.make import Examples, make_unlabeled
from jaxpeft.data.examples.reading import columns_of, read_source
from jaxpeft.data.rows.columns import Kind
from jaxpeft.data.tokens.row_encoder import RowEncoder
from jaxpeft.data.tokens.token_arrays import Encoded
from jaxpeft.errors import ConfigError
from jaxpeft.evaluate.prepared_rows import data_options, labeling_of, problem_of
from jaxpeft.evaluate.row_outputs import Runner
from jaxpeft.generate.output_rows import json_line
from jaxpeft.generate.session import find_task, load_requested
from jaxpeft.inference.adapted_model import AdaptedModel

if TYPE_CHECKING:
    from jaxpeft.generate.__main__ import GenerateArguments

_log = logging.getLogger(__name__)
_KINDS: dict[str, Kind] = {
    "sequence_classification": "classification",
    "token_classification": "token_classification",
}


def predict_file(
    args: GenerateArguments, source: str, output: str | None, columns: Mapping[str, str]
) -> None:
    """Predict the labels of the rows of a file, and write both.

    A row gets a `prediction`: a label, a list of labels (multi-label), a number (regression), or
    the label of each word (token classification), and the `probabilities` of the labels.

    Args:
        args: arguments of the command.
        source: path of the rows.
        output: path of the JSONL file to write; None for standard output.
        columns: columns that the user named, by field.

    Raises:
        ConfigError: The model is not a classifier.
        DataError: A row cannot be used.
    """
    task: Any = find_task(args)
    if task not in _KINDS:
        raise ConfigError(
            f"--input: needs a classifier, but the task is {task}; generate text with --prompts"
        )
    loaded = load_requested(args)
    examples, encoded = _read(loaded, source, columns)
    runner = Runner(loaded, args.batch_size, loaded.tokenizer.pad_token_id or 0)
    logits = runner.logits(loaded.params, encoded)
    by_row = _by_row(logits, examples, encoded)
    lines = [
        json_line(record, _prediction(own, examples))
        for record, own in zip(examples.rows.records, by_row, strict=True)
    ]
    text = "".join(lines)
    if output is None:
        write_lines(text.removesuffix("\n"))
        return
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(Path(output), text)
    _log.info("%s: %d rows", output, len(examples))


def _by_row(
    logits: Sequence[np.ndarray[Any, Any]], examples: Examples, encoded: Encoded
) -> list[np.ndarray[Any, Any]]:
    """Return the logits of each row, for token classification `[words, labels]`."""
    if examples.kind != "token_classification":
        return [*logits]
    return [
        _of_words(own, encoded, row, len(examples.texts[row])) for row, own in enumerate(logits)
    ]


def _read(
    loaded: AdaptedModel, source: str, columns: Mapping[str, str]
) -> tuple[Examples, Encoded]:
    """Read and tokenize rows as the run that trained the adapter did."""
    task: Any = loaded.model.options.task
    options = data_options(loaded.settings, source, {"columns": dict(columns)} if columns else {})
    config = Config(
        model=ModelConfig(path=str(loaded.model.source.folder), task=task), data=options
    )
    examples = make_unlabeled(
        read_source(source, "test", config),
        kind=_KINDS[task],
        problem=problem_of(loaded, _KINDS[task]) or _default_problem(task),
        columns=columns_of(config, _KINDS[task]),
        labels=labeling_of(options, loaded).names,
    )
    encoder = RowEncoder(options, loaded.tokenizer, loaded.model.config.vocab_size, use_cache=False)
    return examples, encoder(examples)


def _default_problem(task: str) -> Any:
    return "single_label" if task == "sequence_classification" else None


def _of_words(
    logits: np.ndarray[Any, Any], encoded: Encoded, row: int, words: int
) -> np.ndarray[Any, Any]:
    """Return the logits of each word, those of its first token; NaN for words beyond the length."""
    at = slice(*encoded.offsets[row : row + 2].tolist())
    found = np.full((words, logits.shape[-1]), np.nan, np.float32)
    first = logits[encoded.labels[at] != IGNORED]
    found[: len(first)] = first
    return found


def _prediction(logits: np.ndarray[Any, Any], examples: Examples) -> dict[str, Any]:
    """Return the prediction of a row and its probabilities, from its logits."""
    names = examples.label_names
    if examples.problem == "regression":
        return {"prediction": _rounded(logits[:1])[0]}
    if examples.kind == "token_classification":
        each = [None if np.isnan(word).any() else _label(word, names) for word in logits]
        return {
            "prediction": [None if one is None else one["prediction"] for one in each],
            "probabilities": [None if one is None else one["probabilities"] for one in each],
        }
    if examples.problem == "multi_label":
        each = 1 / (1 + np.exp(-logits.astype(np.float64)))
        probabilities = dict(zip(names, _rounded(each), strict=True))
        chosen = [name for name, share in probabilities.items() if share > 0.5]
        return {"prediction": chosen, "probabilities": probabilities}
    return _label(logits, names)


def _label(logits: np.ndarray[Any, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return the most likely label of logits `[labels]`, and the softmax by label."""
    raised = np.exp(logits.astype(np.float64) - logits.max())
    shares = _rounded(raised / raised.sum())
    return {
        "prediction": names[int(logits.argmax())],
        "probabilities": dict(zip(names, shares, strict=True)),
    }


def _rounded(values: np.ndarray[Any, Any]) -> list[float]:
    """Return numbers with six digits after the point."""
    return np.round(values.astype(np.float64), 6).tolist()
