"""The options of the data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from jaxpeft.core.options import option
from jaxpeft.errors import nearest, show

ESCAPED = ("data.separator", "data.delimiter")
"""Options whose `\\n`, `\\t`, `\\r` and `\\\\` are unescaped on the command line, as in Python."""
DATA_FIELDS = (
    "text",
    "text_pair",
    "label",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "messages",
    "chosen",
    "rejected",
    "system",
    "history",
    "tools",
)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The rows and their tokenization."""

    train: str | tuple[str, ...] = option(
        "",
        "training rows: a file, a folder of files, 'package:support_tickets/train', a Hub id, or a"
        " list of these",
    )
    weights: tuple[float, ...] = option(
        (),
        "mixing weights of the training sources, in order; uses as many rows as possible without"
        " repeating any; empty for all rows",
        above=0,
    )
    validation: str = option(
        "", "rows that select the best step; empty to hold out a share of the training rows"
    )
    test: str = option(
        "",
        "rows for the final metrics; empty for a test split next to a folder of training rows, else"
        " the validation rows",
    )
    subset: str | None = option(
        None, "configuration of a Hub data set, such as 'mrpc' of 'nyu-mll/glue'"
    )
    revision: str | None = option(None, "branch, tag or commit of a Hub data set")
    validation_share: float = option(
        0.1, "share of the training rows to hold out if validation is empty", above=0, below=1
    )
    format: Literal[
        "auto", "text", "prompt_completion", "instruction", "messages", "preference"
    ] = option("auto", "format of a language model's rows; auto detects it from the columns")
    columns: dict[str, str] = option(
        {},
        "column of each field without a usual column name, 'a.b' for a nested value; fields:"
        f" {', '.join(DATA_FIELDS)}",
    )
    chat_template: str | None = option(
        None,
        "chat template: the name of one of the tokenizer's, 'chatml', 'alpaca' or a Jinja file;"
        " None for the tokenizer's default",
    )
    encoding: str = option(
        "auto",
        "Python's name of the encoding of text files, such as 'cp1252'; auto for UTF-8, or UTF-16"
        " if detected",
    )
    delimiter: str = option(
        "auto", "field delimiter of a CSV or TSV; auto detects a comma, tab, semicolon or bar"
    )
    quoting: Literal["auto", "quoted", "none"] = option(
        "auto",
        "whether quotes enclose fields, as in a CSV, or are plain characters, as in a TSV; auto"
        " detects it",
    )
    header: bool | None = option(
        None,
        "whether a CSV or TSV has a header row; otherwise its columns are named '1', '2', ...; None"
        " detects it",
    )
    field: str = option(
        "", "key of the rows in a JSON file, such as 'data' or 'result.rows'; empty to detect it"
    )
    most_gib: float = option(
        1.0, "maximum size of a source's uncompressed files in GiB, unless streamed", above=0
    )
    problem: Literal["auto", "single_label", "multi_label", "regression"] = option(
        "auto", "type of sequence classification; auto detects it from the labels"
    )
    labels: tuple[str, ...] = option(
        (),
        "class names in order; rows may contain names or integers from 0; empty to use those of the"
        " base's head if it is kept, else of the rows (of a stream, of the validation rows)",
    )
    label_separator: str = option(
        "", "separator of several labels in a string, such as ',' in '4,27'"
    )
    unlabeled: tuple[str, ...] = option(
        (),
        "labels that mean no label, such as '-' or '-1', or '' for empty cells; such rows are"
        " dropped, such tags are masked",
    )
    max_length: int = option(
        128, "tokens per row; longer rows are truncated, texts are split", at_least=2, at_most=2**24
    )
    lengths: tuple[int, ...] = option(
        (), "padded lengths, ascending; empty to choose them from the data", at_least=2
    )
    packing: bool = option(
        False,
        "pack several texts or dialogs into a row of max_length, without attention between them",
    )
    separator: str = option(
        "",
        "text between prompt and completion, such as '\\nA: '; not in the loss; texts are truncated"
        " there",
    )
    add_bos: bool = option(
        True, "start a text with the tokenizer's beginning-of-text token, if it has one"
    )
    add_eos: bool = option(
        True, "end a text or an answer with the tokenizer's end-of-text token, if it has one"
    )
    most_dropped: float = option(
        0.05,
        "maximum share of rows dropped because truncation leaves no token in the loss",
        at_least=0,
        at_most=1,
    )
    max_rows: int | None = option(
        None, "maximum number of rows per training source, sampled by the seed", at_least=1
    )
    streaming: bool = option(
        False, "stream the training rows, if they do not fit in memory or on disk"
    )
    buffer_rows: int = option(
        10_000,
        "streamed rows, over all sources, that are tokenized, shuffled and packed together",
        at_least=1,
    )
    workers: int = option(
        0,
        "worker processes that prepare batches (and tokenize a stream); 0 for a thread",
        at_least=0,
        at_most=1024,
    )
    worker_timeout: float = option(
        60.0, "seconds to wait for worker processes before giving up", above=0
    )

    def problems(self) -> list[str]:
        """List problems across options."""
        found = (
            [] if self.train and all(self.sources) else ["train: is not set; give a file of rows"]
        )
        if self.weights and len(self.weights) != len(self.sources):
            found.append(
                f"weights: has {len(self.weights)} weights for {len(self.sources)} training"
                " sources; give one for each"
            )
        if self.streaming and not self.validation:
            found.append("streaming: a stream cannot hold out rows; set data.validation")
        if self.streaming and len(self.sources) > 1 and not self.weights:
            found.append("weights: is required for several streamed sources; set it")
        if self.streaming and self.max_rows is not None:
            found.append("max_rows: does not apply to a stream; remove it, and set train.steps")
        if not self.streaming and self.buffer_rows != DataConfig.buffer_rows:
            found.append(
                f"buffer_rows: {self.buffer_rows} is only for data.streaming, which is off;"
                " remove it"
            )
        if twice := [name for name, count in Counter(self.labels).items() if count > 1]:
            found.append(f"labels: lists {show(twice[0])} twice; list it once")
        found += self._file_problems()
        for name in self.columns:
            if name not in DATA_FIELDS:
                found.append(
                    f"columns: {show(name)} is not a field{nearest(name, DATA_FIELDS)} (known:"
                    f" {', '.join(DATA_FIELDS)})"
                )
        if list(self.lengths) != sorted(set(self.lengths)):
            found.append(f"lengths: must be ascending, are {show(list(self.lengths))}")
        if self.packing and self.lengths:
            found.append(
                "lengths: packed rows all have max_length; remove either lengths or packing"
            )
        if self.lengths and self.lengths[-1] != self.max_length:
            found.append(
                f"lengths: the last must be max_length {show(self.max_length)}, is"
                f" {show(self.lengths[-1])}"
            )
        return found

    def _file_problems(self) -> list[str]:
        found: list[str] = []
        if self.delimiter != "auto" and (len(self.delimiter) != 1 or self.delimiter in '"\r\n'):
            found.append(
                f"delimiter: must be one character, or 'auto', is {show(self.delimiter)}; a tab is"
                " '\\t'"
            )
        if self.encoding != "auto" and not _is_encoding(self.encoding):
            found.append(
                f"encoding: {show(self.encoding)} is not an encoding that Python knows, such as"
                " 'utf-8', 'cp1252' or 'shift_jis'"
            )
        return found

    @property
    def sources(self) -> tuple[str, ...]:
        """The training sources."""
        return (self.train,) if isinstance(self.train, str) else self.train


def _is_encoding(name: str) -> bool:
    try:
        b"x".decode(name)  # for empty bytes Python does not look up the codec
    except UnicodeDecodeError:
        return True
    except (LookupError, ValueError):
        return False
    return True
