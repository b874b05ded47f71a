"""`samples.jsonl` in a run's folder: test rows, answered by the base and the tuned model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jaxpeft import atomic
from jaxpeft.errors import DataError
from jaxpeft.json_files import parse_json
from jaxpeft.train.records import SAMPLES

if TYPE_CHECKING:
    from jaxpeft.train.setup import Setup


@dataclass(frozen=True)
class Sample:
    """A row with its answers.

    Attributes:
        prompt: text before the answer, without special tokens.
        expected: answer of the row.
        base: answer of the base.
        tuned: answer of the trained model.
    """

    prompt: str
    expected: str
    base: str
    tuned: str


_FIELDS = tuple(field.name for field in dataclasses.fields(Sample))


def collect(setup: Setup, base: Sequence[str], tuned: Sequence[str]) -> tuple[Sample, ...]:
    """Return the sample rows of a run with their answers.

    Args:
        setup: prepared run.
        base: answer of the base to each row.
        tuned: answer of the trained model to each row.
    """
    decode = setup.data.tokenizer.decode
    return tuple(
        Sample(decode(prompt, skip_special_tokens=True), expected, before, after)
        for (prompt, expected), before, after in zip(setup.data.samples, base, tuned, strict=True)
    )


def describe(number: int, sample: Sample) -> str:
    """Return the text that is logged for a sample.

    Args:
        number: number of the sample, from 1.
        sample: the row with its answers.
    """
    rows = (f"  {name}: {getattr(sample, name).strip()!r}" for name in _FIELDS)
    return "\n".join([f"\nsample {number}", *rows])


def write(folder: Path, samples: Sequence[Sample]) -> None:
    """Write the samples of a run atomically, one JSON object per line."""
    lines = (json.dumps(dataclasses.asdict(sample)) + "\n" for sample in samples)
    atomic.write_text(folder / SAMPLES, "".join(lines))


def read(folder: Path) -> tuple[Sample, ...]:
    """Read the samples of a run; none if it recorded none.

    Raises:
        DataError: a line has other fields.
        WeightsError: a line is not a JSON object.
    """
    file = folder / SAMPLES
    if not file.is_file():
        return ()
    found: list[Sample] = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        values = parse_json(line, f"{file}, line {number}")
        if values.keys() != set(_FIELDS) or not all(isinstance(v, str) for v in values.values()):
            raise DataError(
                f"{file}, line {number}: must have the texts {', '.join(_FIELDS)}; remove the line"
            )
        found.append(Sample(**values))
    return tuple(found)
