"""Text printed at the end of a run: its metrics, and Python code that predicts with the adapter."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from jaxpeft.hub.adapters.usage import apply_lines, generation_lines

if TYPE_CHECKING:
    from jaxpeft.train.setup import Setup

_CHAT = (
    "chat = tokenizer.apply_chat_template([{'role': 'user', 'content': 'a question'}],"
    " tokenize=False, add_generation_prompt=True)"
)


def row(name: str, figure: str, share: float | None = None, seconds: float | None = None) -> str:
    """Return a row of the table at the end of a run.

    Args:
        name: name of the method.
        figure: formatted metric.
        share: share of trainable parameters.
        seconds: training time.
    """
    cost = (
        "" if share is None or seconds is None else f"   {share:>8.3%} trained   {seconds:>6.1f} s"
    )
    return f"  {name:<18}{figure:>9}{cost}"


def report(workdir: Path) -> str:
    """Return the command that writes the page of a run."""
    return _command("report", "--run", str(workdir))


def commands(setup: Setup, workdir: Path) -> str:
    """Return the commands that use, evaluate and show a run.

    Args:
        setup: prepared run.
        workdir: folder of the run.
    """
    decided, data = setup.provenance.decided, setup.config.data
    prompt = ("--chat",) if decided.chats else ("--prompt", "TEXT")
    use = prompt if setup.config.model.task == "causal_lm" else ("--input", "FILE")
    rows = data.test or data.validation or "FILE"
    found = (
        _command("generate", "--adapter", str(workdir), *use),
        _command("evaluate", "--adapter", str(workdir), "--data", str(rows), "--against", "base"),
        report(workdir),
    )
    return "\n".join(f"  {command}" for command in found)


def _command(verb: str, *arguments: str) -> str:
    return shlex.join(["python", "-m", f"jaxpeft.{verb}", *arguments])


def prediction(setup: Setup, adapter: Path) -> str:
    """Return Python code that loads the adapter onto its base and prints a prediction.

    Args:
        setup: prepared run.
        adapter: folder of the adapter.
    """
    model, folder = setup.config.model, str(adapter)
    revision = f", revision={model.revision!r}" if model.revision else ""
    lines = [
        "import jaxpeft, transformers",
        f"settings = jaxpeft.read_settings({folder!r})",
        f"model, params = jaxpeft.load({model.path!r}{revision}, **settings.load_options)",
        f"method, params = jaxpeft.load_adapter({folder!r}, model, params)",
        f"tokenizer = transformers.AutoTokenizer.from_pretrained({folder!r})",
        *(_generation_lines(setup) if model.task == "causal_lm" else _classification_lines(setup)),
    ]
    return "\n".join(f"  {line}" for line in lines)


def _generation_lines(setup: Setup) -> tuple[str, ...]:
    prompt = (
        "'a prompt' + settings.separator"
        if setup.provenance.decided.kind == "prompt_completion"
        else "'the beginning of a text'"
    )
    if setup.provenance.decided.chats:
        return (_CHAT, *generation_lines("tokenizer(chat, add_special_tokens=False)['input_ids']"))
    return generation_lines(f"tokenizer({prompt})['input_ids']")


def _classification_lines(setup: Setup) -> tuple[str, ...]:
    pairs = setup.provenance.decided.pairs
    types = (
        ", token_type_ids=inputs['token_type_ids']"
        if pairs and setup.data.train.type_ids is not None
        else ""
    )
    text = "'one text', 'the other'" if pairs else "'some text'"
    return apply_lines(text, types, "settings.predict(outputs)")
