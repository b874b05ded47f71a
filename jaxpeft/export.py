"""`python -m jaxpeft.export --adapter DIR --to {peft,merged,merged_quantized_reference} --out DIR [--base PATH_OR_HUB_ID]`.

    peft     a folder in the file format of Hugging Face PEFT, or of the library that has the method
    merged   the adapter folded into its base: safetensors, config and tokenizer, which `transformers` loads
    merged_quantized_reference   the same, for an adapter of a quantised base: into that base, rounded as it was

What was written is loaded again and compared before it gets its name. Exit codes: 0 done, 2 bad input, 143 and 130 stopped by
SIGTERM and SIGINT, 1 any other failure; after a failure nothing is left.
"""

from __future__ import annotations

import logging
import re
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from absl import flags

from jaxpeft import logs
from jaxpeft.command import guarded
from jaxpeft.errors import ConfigError

_TARGETS = ("peft", "merged", "merged_quantized_reference")
_TASKS = ("causal_lm", "sequence_classification", "token_classification", "encoder")
_DTYPES = ("float32", "bfloat16", "float16")


def _flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string("adapter", None, "folder of the adapter", flag_values=values)
    flags.DEFINE_enum("to", None, _TARGETS, "what to write", flag_values=values)
    flags.DEFINE_string("out", None, "folder to write; a new one", flag_values=values)
    flags.DEFINE_string(
        "base", None, "folder or hub id of the base; by default what the adapter names", flag_values=values
    )
    flags.DEFINE_enum("dtype", None, _DTYPES, "of merged weights; by default that of the base's", flag_values=values)
    flags.DEFINE_enum("task", None, _TASKS, "of an adapter that names no task", flag_values=values)
    flags.DEFINE_string(
        "pooling", None, "what a classifier reads, of an adapter that does not say it", flag_values=values
    )
    flags.DEFINE_integer(
        "vocab_size",
        None,
        "of a base that tokens were added to, of an adapter that does not say it",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "allow_base", False, "--allow-base: export though the base is another than the adapter's", flag_values=values
    )
    flags.DEFINE_bool("traceback", False, "show Python's traceback of an error", flag_values=values)
    return values


def main(argv: list[str]) -> int:
    """Exports an adapter; gives the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[logs.StderrHandler()])
    logging.getLogger("jaxpeft").setLevel(logging.INFO)
    if {"--help", "-h", "-help"} & set(argv):
        sys.stdout.write(f"{__doc__}\n{_flags().get_help()}")
        return 0
    with _ending_on_signals():
        return guarded(lambda: _checked(argv), show_traceback="--traceback" in argv)


def _checked(argv: list[str]) -> int:
    given = _flags()
    try:
        left = given(["jaxpeft.export", *(re.sub("^--?allow-base", "--allow_base", word) for word in argv)])[1:]
    except flags.Error as error:
        raise ConfigError(f"{error}; see --help") from error
    missing = [f"--{name}: is not given; see --help" for name in ("adapter", "to", "out") if given[name].value is None]
    if left or missing:
        raise ConfigError([*(f"{word!r}: not an option; see --help" for word in left), *missing])
    from jaxpeft.hub.exporting import Request, export  # JAX is imported for arguments that are good

    options: dict[str, Any] = {
        name: given[name].value for name in ("to", "base", "dtype", "task", "pooling", "vocab_size", "allow_base")
    }
    report = export(Request(Path(given.adapter), out=Path(given.out), **options))
    sys.stdout.write("\n".join(report.lines) + "\n")
    return 0


@contextmanager
def _ending_on_signals() -> Generator[None]:
    """Lets SIGTERM and SIGINT end the command as an exception does: what is half-written is removed."""

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
