"""Export an adapter: `python -m jaxpeft.export --adapter DIR --to FORMAT --out DIR`.

The formats:

    peft      a folder in the file format of Hugging Face PEFT, or of the method's own library
    merged    the adapter merged into its base, in the format of `transformers`: safetensors,
              config and tokenizer
    merged_quantized_reference
              the same, merged into the base with the quantization error of training

The command loads the result again and compares its logits before it renames the folder. Exit codes:
0 done, 2 bad input, 143 and 130 stopped by SIGTERM and SIGINT, 1 any other failure. After a failure
no files remain.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from jaxpeft.choices import Dtype, ExportTarget, Task
from jaxpeft.command.parser import Arguments
from jaxpeft.command.running import run_command
from jaxpeft.core.options import option
from jaxpeft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ExportArguments(Arguments):
    """The arguments of `export`."""

    adapter: str | None = option(None, "folder of the adapter")
    to: ExportTarget | None = option(None, "output format")
    out: str | None = option(None, "folder to write, which must be new")
    base: str | None = option(
        None, "folder or hub id of the base; by default the one recorded in the adapter"
    )
    dtype: Dtype | None = option(None, "dtype of merged weights; by default the base's")
    task: Task | None = option(None, "task, if the adapter does not record it")
    pooling: str | None = option(
        None, "input of a sequence classifier, if the adapter does not record it"
    )
    vocab_size: int | None = option(
        None, "number of tokens with added ones, if the adapter does not record it"
    )
    allow_base: bool = option(False, "export even if the base is not the adapter's")
    allow_no_op: bool = option(
        False, "export even if the adapter does not change the base's outputs"
    )


ARGUMENTS = ExportArguments


def main(argv: list[str]) -> int:
    """Export an adapter; return the exit code."""
    with _ending_on_signals():
        return run_command(ExportArguments, argv, __doc__, lambda args, _: _run(args))


def _run(args: ExportArguments) -> int:
    missing = [name for name in ("adapter", "to", "out") if getattr(args, name) is None]
    if args.adapter is None or args.to is None or args.out is None:
        raise ConfigError([f"--{name}: is required; see --help" for name in missing])
    # imports JAX, so only for valid arguments
    from jaxpeft.export.export import ExportRequest, export

    request = ExportRequest(
        Path(args.adapter),
        to=args.to,
        out=Path(args.out),
        base=args.base,
        dtype=args.dtype,
        task=args.task,
        pooling=args.pooling,
        vocab_size=args.vocab_size,
        allow_base=args.allow_base,
        allow_no_op=args.allow_no_op,
    )
    sys.stdout.write("\n".join(export(request).lines) + "\n")
    return 0


@contextmanager
def _ending_on_signals() -> Generator[None]:
    """Raise SystemExit on SIGTERM and SIGINT, so that incomplete output is removed."""

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
