"""Export an adapter: `python -m jaxpeft.export --adapter DIR --to FORMAT --output DIR`.

The formats:

    peft      a folder in the file format of Hugging Face PEFT, or of the method's own library
    merged    the adapter merged into its base, in the format of `transformers`: safetensors,
              config and tokenizer
    merged_quantized_reference
              the same, merged into the base with the quantization error of training
    vllm      a folder that vLLM's LoRA loader accepts, for --lora-modules
    gguf-lora llama.cpp's adapter file, for --lora (needs pip install 'jaxpeft[gguf]')
    mlx       MLX-LM's adapter files, for --adapter-path

The command loads the result again and compares its logits before it renames the folder. It refuses
an adapter that does not change the outputs of its base, and what a format cannot hold.

`--adapter DIR --verify URL --model NAME` asks an OpenAI-compatible server (/v1/completions) for
log-probabilities, and says whether it serves the adapter, the base, or something else.

Exit codes: 0 done (with --verify: the server serves the adapter), 2 bad input, 143 and 130 stopped
by SIGTERM and SIGINT, 1 any other failure. After a failure no files remain.
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
from jaxpeft.command.output_paths import folder_problem
from jaxpeft.command.parser import Arguments
from jaxpeft.command.running import run_command, write_lines
from jaxpeft.core.options import option
from jaxpeft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ExportArguments(Arguments):
    """The arguments of `export`."""

    adapter: str | None = option(None, "folder of the adapter")
    to: ExportTarget | None = option(None, "output format")
    output: str | None = option(None, "folder to write, which must be new", also=("out",))
    base: str | None = option(
        None,
        "folder or hub id of the base; by default the one recorded in the adapter; also --model,"
        " unless --verify is given",
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
    verify: str | None = option(
        None,
        "address of a server to verify, such as http://localhost:8000; without --to and --output",
    )
    model: str | None = option(
        None, "with --verify, the name of the model to ask the server for; otherwise --base"
    )
    timeout: float = option(60.0, "seconds to wait for an answer of the server", above=0)


ARGUMENTS = ExportArguments


def main(argv: list[str]) -> int:
    """Export an adapter; return the exit code."""
    with _ending_on_signals():
        return run_command(ExportArguments, argv, __doc__, lambda args, _: _run(args))


def _run(args: ExportArguments) -> int:
    if args.verify is not None:
        return _verify(args, args.verify)
    needed = ("adapter", "to", "output")
    missing = [f"--{name}: is required; see --help" for name in needed if not getattr(args, name)]
    both = args.model is not None and args.base is not None
    stray = ["--model: is the base, as --base is; give only one of them"] if both else []
    occupied = folder_problem("--output", args.output, is_new=True)
    stray += [occupied] if occupied else []
    if args.adapter is None or args.to is None or args.output is None or stray:
        raise ConfigError([*missing, *stray])
    # imports JAX, so only for valid arguments
    from jaxpeft.export.export import ExportRequest, export

    request = ExportRequest(
        Path(args.adapter),
        to=args.to,
        out=Path(args.output),
        base=args.base or args.model,
        dtype=args.dtype,
        task=args.task,
        pooling=args.pooling,
        vocab_size=args.vocab_size,
        allow_base=args.allow_base,
        allow_no_op=args.allow_no_op,
    )
    write_lines(*export(request).lines)
    return 0


def _verify(args: ExportArguments, url: str) -> int:
    """Verify a server; return the exit code."""
    missing = [
        f"--{name}: is required with --verify; see --help"
        for name in ("adapter", "model")
        if not getattr(args, name)
    ]
    stray = [
        f"--{name}: cannot be used with --verify, which writes no files"
        for name in ("to", "output")
        if getattr(args, name) is not None
    ]
    if args.adapter is None or args.model is None or stray:
        raise ConfigError([*missing, *stray])
    from jaxpeft.export.completions import Server

    server = Server(url, args.model, args.timeout)
    # imports JAX, so only for valid arguments
    from jaxpeft.export.request import VerifyRequest
    from jaxpeft.export.verify import verify

    request = VerifyRequest(
        Path(args.adapter),
        base=args.base,
        task=args.task,
        vocab_size=args.vocab_size,
        allow_base=args.allow_base,
    )
    verdict = verify(request, server)
    write_lines(*verdict.lines)
    return 0 if verdict.serves_adapter else 1


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
