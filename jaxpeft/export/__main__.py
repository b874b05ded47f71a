"""Export an adapter: `python -m jaxpeft.export --adapter DIR --to FORMAT --out DIR`.

The formats:

    peft      a folder in the file format of Hugging Face PEFT, or of the method's own library
    merged    the adapter folded into its base, as `transformers` loads it: safetensors, config and
              tokenizer
    merged_quantized_reference
              the same, for an adapter of a quantized base: into that base, rounded as it was

The command loads again what it wrote, and compares, before the folder gets its name. Exit codes: 0
done, 2 bad input, 143 and 130 stopped by SIGTERM and SIGINT, 1 any other failure; after a failure
nothing is left.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from jaxpeft.choices import Dtype, Task
from jaxpeft.command.parser import Arguments
from jaxpeft.command.running import run_command
from jaxpeft.core.options import option
from jaxpeft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ExportArguments(Arguments):
    """The arguments of `export`."""

    adapter: str | None = option(None, "folder of the adapter")
    to: Literal["peft", "merged", "merged_quantized_reference"] | None = option(
        None, "what to write"
    )
    out: str | None = option(None, "folder to write; a new one")
    base: str | None = option(
        None, "folder or hub id of the base; by default what the adapter names"
    )
    dtype: Dtype | None = option(None, "of merged weights; by default that of the base's")
    task: Task | None = option(None, "of an adapter that names no task")
    pooling: str | None = option(
        None, "what a classifier reads, of an adapter that does not say it"
    )
    vocab_size: int | None = option(
        None, "of a base that tokens were added to, of an adapter that does not say it"
    )
    allow_base: bool = option(False, "export though the base is another than the adapter's")


ARGUMENTS = ExportArguments


def main(argv: list[str]) -> int:
    """Export an adapter; return the exit code."""
    with _ending_on_signals():
        return run_command(ExportArguments, argv, __doc__, lambda given, _: _run(given))


def _run(given: ExportArguments) -> int:
    missing = [name for name in ("adapter", "to", "out") if getattr(given, name) is None]
    if given.adapter is None or given.to is None or given.out is None:
        raise ConfigError([f"--{name}: is not given; see --help" for name in missing])
    from jaxpeft.export.export import (
        ExportRequest,
        export,
    )  # JAX is imported for arguments that are good

    request = ExportRequest(
        Path(given.adapter),
        to=given.to,
        out=Path(given.out),
        base=given.base,
        dtype=given.dtype,
        task=given.task,
        pooling=given.pooling,
        vocab_size=given.vocab_size,
        allow_base=given.allow_base,
    )
    sys.stdout.write("\n".join(export(request).lines) + "\n")
    return 0


@contextmanager
def _ending_on_signals() -> Generator[None]:
    """Let SIGTERM and SIGINT end the command as an exception does: what is half-written is
    removed.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        del frame
        raise SystemExit(128 + signum)

    before = {signum: signal.signal(signum, end) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
