"""Report the data before training: rows as the model sees them, and statistics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from jaxpeft.config.schema import Config
from jaxpeft.data.chat.dialogs import Completion, Dialog
from jaxpeft.data.chat.supervise import IGNORED
from jaxpeft.data.examples.make import Examples
from jaxpeft.data.pipeline import Splits, make_batches
from jaxpeft.data.tokens.packing import fill
from jaxpeft.data.tokens.token_arrays import Encoded
from jaxpeft.errors import printable

MOST_LABELS = 20
MOST_NOTES = 20


def rows(splits: Splits, n: int, *, color: bool) -> Iterator[Text]:
    """Yield the decoded text of the first training rows.

    Tokens in the loss are green and masked ones dim; without colors, text in the loss is enclosed
    by `⟦` and `⟧`. A line separates the documents in a packed row.

    Args:
        splits: the data of a run.
        n: number of rows.
        color: whether the terminal supports colors.
    """
    encoded = splits.train
    for row in range(min(n, len(encoded))):
        at = slice(*encoded.offsets[row : row + 2].tolist())
        in_loss = (
            encoded.labels[at] != IGNORED
            if encoded.per_token
            else np.zeros(encoded.lengths[row], bool)
        )
        counts = f"{encoded.lengths[row]} tokens" + (
            f", {int(in_loss.sum())} learned" if encoded.per_token else ""
        )
        yield _text(f"--- row {row + 1}: {counts}{_label(splits, row)}", "bold")
        yield _render_tokens(splits.tokenizer, encoded, at, in_loss, color)


def reading_notes(examples: Examples) -> Iterator[Text]:
    """Yield how the training rows were read: the files and the columns in use.

    Args:
        examples: the training rows.
    """
    notes = examples.rows.notes
    for note in notes[:MOST_NOTES]:
        yield _text(note)
    if len(notes) > MOST_NOTES:
        yield _text(f"({len(notes) - MOST_NOTES} more files)")
    used = examples.columns.named_fields()
    unused = [column for column in examples.rows.columns() if column not in used.values()]
    parts = [f"{field} is {column!r}" for field, column in used.items()]
    if unused:
        more = ", ..." if len(unused) > MOST_LABELS else ""
        parts.append(f"unused: {', '.join(map(repr, unused[:MOST_LABELS]))}{more}")
    yield _text(f"columns: {'; '.join(parts)}")


def pairs(examples: Examples, n: int) -> Iterator[Text]:
    """Yield the first preference pairs: the shared prompt, then the chosen answer in green and the
    rejected one in red.

    Args:
        examples: examples with preference pairs.
        n: number of pairs.
    """
    for row, pair in enumerate(examples.texts[:n], 1):
        yield _text(f"--- pair {row}", "bold")
        chosen, rejected = _answer_text(pair.chosen), _answer_text(pair.rejected)
        shared = [turn for turn, other in zip(chosen, rejected, strict=False) if turn == other]
        yield _text("\n".join(shared), "dim")
        for name, turns, style in (("chosen", chosen, "green"), ("rejected", rejected, "red")):
            yield _text(f"{name}: " + "\n".join(turns[len(shared) :]), style)


def _text(text: str, style: str = "") -> Text:
    """Return text as it is shown: without control characters, which rows may contain."""
    return Text(printable(text), style)


def _answer_text(answer: Dialog | Completion) -> list[str]:
    if isinstance(answer, Completion):
        return [*([answer.prompt] if answer.prompt else []), answer.completion]
    return [f"{message['role']}: {message['content']}" for message in answer.messages]


def _label(splits: Splits, row: int) -> str:
    encoded = splits.train
    if encoded.per_token:
        return ""
    label: Any = encoded.labels[row]
    names = encoded.label_names
    if encoded.problem == "multi_label":
        return f", labels {', '.join(names[i] for i in np.flatnonzero(label)) or 'none'}"
    return f", label {names[int(label)]}" if names else f", target {float(label):g}"


def _render_tokens(
    tokenizer: Any, encoded: Encoded, at: slice, in_loss: np.ndarray, color: bool
) -> Text:
    ids = encoded.tokens[at]
    segments = np.ones(len(ids), np.int32) if encoded.segments is None else encoded.segments[at]
    # decode runs of one kind, not single tokens: a character may consist of several tokens
    edges = np.flatnonzero((np.diff(in_loss.astype(np.int8)) != 0) | (np.diff(segments) != 0)) + 1
    text = Text()
    for run in np.split(np.arange(len(ids)), edges):
        first = int(run[0])
        if first and segments[first] != segments[first - 1]:
            text.append("\n- - -\n", style="bold")
        part = printable(tokenizer.decode(ids[run].tolist()))
        if color:
            text.append(part, style="green" if in_loss[first] or not encoded.per_token else "dim")
        else:
            text.append(f"⟦{part}⟧" if in_loss[first] else part)
    return text


def statistics(config: Config, splits: Splits) -> Table:
    """Return a table of the splits: rows, truncation, dropped rows, lengths, packing, padding and
    labels.

    Args:
        config: the config of the run.
        splits: the data of the run.
    """
    table = Table(
        title=_text(f"{splits.examples.rows.name}: {splits.examples.kind}"), title_justify="left"
    )
    parts = {"train": splits.train, "validation": splits.validation}
    if splits.test is not splits.validation:
        parts["test"] = splits.test
    table.add_column("")
    for name in parts:
        table.add_column(name, justify="right")
    for field in ("rows", "truncated", "dropped", "tokens", "learned"):
        name = "tokens in the loss" if field == "learned" else field
        table.add_row(name, *(f"{part.counts[field]:,}" for part in parts.values()))
    for name, share in (("shortest", 0.0), ("median", 0.5), ("95 %", 0.95), ("longest", 1.0)):
        table.add_row(
            f"length, {name}",
            *(f"{np.quantile(_documents(part), share):.0f}" for part in parts.values()),
        )
    if config.data.packing:
        length = config.data.max_length
        table.add_row("packed rows", *(f"{len(part):,}" for part in parts.values()))
        table.add_row("positions filled", *(f"{fill(part, length):.1%}" for part in parts.values()))
    batches = make_batches(config, splits)
    blank = [""] * (len(parts) - 1)
    table.add_row("padded to", " or ".join(map(str, batches.lengths)), *blank)
    table.add_row("padding", f"{batches.padding_share:.1%}", *blank)
    steps = batches.steps_per_epoch
    table.add_row("steps per epoch", "unknown: streamed" if steps is None else f"{steps:,}", *blank)
    for label, counts in _labels(parts):
        table.add_row(_text(f"label {label}"), *(f"{count:,}" for count in counts))
    return table


def _documents(encoded: Encoded) -> np.ndarray:
    """Return the length of each document, packed or not."""
    if encoded.segments is None:
        return encoded.lengths
    starts = np.zeros(len(encoded.tokens), bool)
    starts[encoded.offsets[:-1]] = True
    starts[1:] |= np.diff(encoded.segments) != 0
    return np.diff(np.append(np.flatnonzero(starts), len(encoded.tokens)))


def _labels(parts: dict[str, Encoded]) -> list[tuple[str, list[int]]]:
    first = next(iter(parts.values()))
    names = first.label_names
    if not names:
        return []
    counts = [_counts(part, len(names)) for part in parts.values()]
    order = np.argsort(-counts[0], kind="stable")
    shown = [(names[i], [int(count[i]) for count in counts]) for i in order[:MOST_LABELS]]
    rest = order[MOST_LABELS:]
    return (
        [*shown, (f"({len(rest)} more)", [int(c[rest].sum()) for c in counts])]
        if len(rest)
        else shown
    )


def _counts(encoded: Encoded, size: int) -> np.ndarray:
    labels = encoded.labels
    if encoded.problem == "multi_label":
        return labels.sum(0).astype(np.int64)
    return np.bincount(labels[labels != IGNORED].ravel().astype(np.int64), minlength=size)
