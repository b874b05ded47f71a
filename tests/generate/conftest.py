"""A tiny model folder with a trained adapter that has a chat template."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import pytest

import jaxpeft
from jaxpeft.hub.adapters.settings import Settings
from tests.conformance.conftest import moved
from tests.train.runs import tiny_models

__all__ = ["tiny_models"]
CHATML = (
    "{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


@pytest.fixture(scope="session")
def llama(tiny_models: Mapping[str, Path]) -> str:
    """The folder of a tiny Llama."""
    return str(tiny_models["llama"])


@pytest.fixture(scope="session")
def adapter(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a LoRA that changes the answers."""
    from transformers import AutoTokenizer

    model, base = jaxpeft.load(llama, task="causal_lm")
    method = jaxpeft.LoRA(rank=2, targets=("q_proj", "v_proj", "down_proj"))
    params = moved(method, jaxpeft.rewrite(method, base, jax.random.key(0)), size=0.3)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = CHATML
    folder = tmp_path_factory.mktemp("run")
    settings = Settings(separator=" word9")
    jaxpeft.save_adapter(
        folder / "adapter", method, params, model, settings=settings, tokenizer=tokenizer
    )
    return folder


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    """Write rows to a JSONL file; return its path."""

    def write(*rows: dict[str, Any], name: str = "in.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write
