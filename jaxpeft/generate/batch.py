"""Complete the rows of a file: `--prompts IN.jsonl --output OUT.jsonl`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxpeft import atomic
from jaxpeft.data.rows.columns import Columns
from jaxpeft.data.rows.read import Rows, read_rows
from jaxpeft.errors import ConfigError
from jaxpeft.generate.output_rows import json_line
from jaxpeft.generate.session import Session
from jaxpeft.hub.adapters.adapter_folder import read_adapter
from jaxpeft.inference.generation import Completion
from jaxpeft.inference.prompts import Prompt, read_prompts
from jaxpeft.processes.lock import lock_output
from jaxpeft.train.progress import row_progress

if TYPE_CHECKING:
    from jaxpeft.generate.__main__ import GenerateArguments

_log = logging.getLogger(__name__)


def read_file(
    args: GenerateArguments, source: str, columns: Mapping[str, str]
) -> tuple[Rows, list[Prompt]]:
    """Return the rows of a file, and their prompts.

    Args:
        args: arguments of the command.
        source: path of the rows.
        columns: columns that the user named, by field.

    Raises:
        DataError: A row cannot be used.
    """
    rows = read_rows(source)
    separator = _separator(args)
    return rows, read_prompts(rows, Columns(**columns), args.system, separator)


def _separator(args: GenerateArguments) -> str:
    """Return the separator of the run that trained the adapter, before it is loaded."""
    if args.adapter is None:
        return ""
    return read_adapter(Path(args.adapter)).settings.separator or ""


def complete_file(session: Session, rows: Rows, prompts: Sequence[Prompt], output: str) -> int:
    """Complete the rows of a file, and write them, with the completions, to another.

    The rows are written in order to `OUTPUT.partial`, whose first line identifies the run, and
    which becomes the output at the end. A run that was interrupted continues from it.

    Args:
        session: the model.
        rows: the rows.
        prompts: the prompt of each.
        output: path of the JSONL file to write.

    Returns:
        The exit code.

    Raises:
        ConfigError: The output is incomplete and from another run.
        DataError: The template cannot render a row; nothing is written then.
    """
    out = Path(output)
    encoded = [session.encode(prompt, rows.where(i)) for i, prompt in enumerate(prompts)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with lock_output(out):
        if out.exists():
            raise ConfigError(f"--output {output}: exists already; choose another file")
        return _complete_rows(session, rows, encoded, out)


def _complete_rows(
    session: Session, rows: Rows, encoded: Sequence[Sequence[int]], out: Path
) -> int:
    """Complete the rows that an incomplete output does not have yet; return the exit code."""
    args, partial = session.args, out.with_name(f"{out.name}.partial")
    done = _begin(partial, _identity(session, rows.sha256, encoded))
    if done:
        _log.info("%s: continuing after %d of %d rows", partial, done, len(encoded))
    try:
        with partial.open("a", encoding="utf-8") as file, row_progress("auto", "rows") as bar:
            for start in range(done, len(encoded), args.batch_size):
                stop = min(start + args.batch_size, len(encoded))
                lines = _complete(session, rows.records[start:stop], encoded[start:stop], start)
                file.writelines(lines)
                file.flush()
                done = stop
                if bar is not None:
                    bar(stop, len(encoded))
                elif stop < len(encoded):
                    _log.info("%d of %d rows", stop, len(encoded))
    except KeyboardInterrupt:
        _log.info("stopped after %d of %d rows; the same command continues", done, len(encoded))
        return 128 + signal.SIGINT
    _finish(partial, out)
    _log.info("%s: %d rows", out, len(encoded))
    return 0


def _identity(session: Session, rows: str, encoded: Sequence[Sequence[int]]) -> str:
    """Return the hash of everything that determines the output.

    Args:
        session: the model.
        rows: hash of the rows.
        encoded: token ids of the prompts, which depend on tokenizer and template.
    """
    loaded, args = session.loaded, dataclasses.asdict(session.args)
    ignored = {"prompts", "output", "batch_size", "strategy", "traceback", "model", "adapter"}
    options = {name: value for name, value in args.items() if name not in ignored}
    adapter = None if loaded.adapter is None else read_adapter(loaded.adapter).sha256
    base = [
        (file.name, stat.st_size, stat.st_mtime_ns)
        for file in sorted(loaded.model.source.folder.glob("*.safetensors"))
        if (stat := file.stat())
    ]
    architecture = (loaded.model.source.folder / "config.json").read_text()
    prompts = [list(ids) for ids in encoded]
    parts = [options, rows, adapter, base, architecture, prompts, sorted(session.ends)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _begin(partial: Path, identity: str) -> int:
    """Begin or continue an incomplete output; return the number of rows that it has.

    Raises:
        ConfigError: It is from another run.
    """
    first = json.dumps({"jaxpeft_generate": identity}) + "\n"
    if not partial.exists():
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(first)
        return 0
    content = partial.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]  # without an incomplete last line
    if whole and not whole.startswith(first.encode()):
        raise ConfigError(
            f"{partial}: was begun with other rows, options or another model; remove it, or choose"
            " another --output"
        )
    partial.write_bytes(whole or first.encode())
    return max(0, whole.count(b"\n") - 1)


def _finish(partial: Path, out: Path) -> None:
    """Write the output without the first line of the incomplete one, which is removed."""
    with atomic.replace_when_done(out) as temporary:
        _, _, rows = partial.read_bytes().partition(b"\n")
        temporary.write_bytes(rows)
    partial.unlink()


def _complete(
    session: Session,
    records: Sequence[Mapping[str, Any]],
    prompts: Sequence[Sequence[int]],
    first: int,
) -> list[str]:
    """Return the lines of the output for some rows, of which `first` is the index."""
    count = session.args.samples
    repeated = [prompt for prompt in prompts for _ in range(count)]
    completions = session.complete(repeated, first * count)
    lines: list[str] = []
    for i, record in enumerate(records):
        own = completions[i * count : (i + 1) * count]
        fields = _fields([session.text(prompts[i], each) for each in own], own, session)
        lines.append(json_line(record, fields))
    return lines


def _fields(
    texts: Sequence[str], completions: Sequence[Completion], session: Session
) -> dict[str, Any]:
    """Return the fields that are added to a row; lists if there are several completions."""
    several = session.args.samples > 1
    found: dict[str, Any] = {"completions": [*texts]} if several else {"completion": texts[0]}
    if session.args.log_probs:
        tokens = [list(each.tokens) for each in completions]
        log_probs = [list(each.log_probs) for each in completions]
        found |= {
            "completion_tokens": tokens if several else tokens[0],
            "completion_log_probs": log_probs if several else log_probs[0],
        }
    return found
