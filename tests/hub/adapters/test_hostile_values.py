"""Seeded mutations of `config.json` and `adapter_config.json`: whatever they hold, it loads or is
refused by our own errors.
"""

from __future__ import annotations

import json
import random
from typing import Any

import jax
import pytest

import jaxpeft
from jaxpeft.errors import JaxpeftError
from jaxpeft.hub.loading import outline
from jaxpeft.hub.model_request import ModelRequest
from tests.hub.helpers import edited

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 10**9, 10**25, -(10**25), 0.5, -0.5, 1e-300, 1e300, float("nan"), float("inf"), "",
    "8", "x" * 5000, "a(b", ".*", [], [1], ["q_proj"], [[["a"]]], [None], {}, {"a": 1}, {"q_proj": 2}, {"": 0.5}, {"a": {"b": []}},
)  # fmt: skip
METHODS = {
    "lora": jaxpeft.LoRA(rank=2, targets=("q_proj",)),
    "prompt": jaxpeft.METHODS["prompt"](num_virtual_tokens=3),
    "boft": jaxpeft.METHODS["boft"](targets=("q_proj",)),
    "vera": jaxpeft.METHODS["vera"](rank=2, targets=("q_proj",)),
    "ia3": jaxpeft.IA3(),
    "trainable_tokens": jaxpeft.TrainableTokens(tokens=(3, 5)),
}


def mutations(own: dict[str, Any], seed: int, count: int):
    """Yield changed copies: one or two fields set, removed or added, at the top or a level
    below.
    """
    rng = random.Random(seed)
    for _ in range(count):
        content = json.loads(json.dumps(own))
        for _ in range(rng.randint(1, 2)):
            name = rng.choice(sorted(content))
            inner = content[name]
            if isinstance(inner, dict) and inner and rng.random() < 0.7:
                inner[rng.choice(sorted(inner))] = rng.choice(VALUES)
            elif rng.random() < 0.1:
                del content[name]
            else:
                content[name] = rng.choice(VALUES)
        yield content


def outcomes(file: Any, load: Any, seed: int, count: int) -> dict[str, int]:
    """Count how loading ends with each changed file."""
    own, found = json.loads(file.read_text()), dict[str, int]()
    for content in mutations(own, seed, count):
        file.write_text(json.dumps(content))
        try:
            load()
            end = "loaded"
        except JaxpeftError as error:
            end = (
                "refused"
                if all(len(one) < 2000 for one in error.problems)
                else f"long: {max(error.problems, key=len)[:200]}"
            )
        except Exception as error:  # noqa: BLE001 - what this counts
            changed = {key: content.get(key) for key in own if content.get(key) != own[key]}
            end = f"{type(error).__name__}: {str(error)[:200]} of {str(changed)[:200]}"
        found[end] = found.get(end, 0) + 1
    file.write_text(json.dumps(own))
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen3", "bert", "distilbert"])
@pytest.mark.representatives("llama", "bert")
def test_config_json(reference, tmp_path, kind):
    task = "causal_lm" if kind in ("llama", "qwen3") else "sequence_classification"
    folder = edited(reference(kind, task).folder, tmp_path / "m")
    found = outcomes(folder / "config.json", lambda: outline(folder, ModelRequest(task)), 0, 25)
    assert set(found) <= {"loaded", "refused"}, found


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.representatives("ia3", "lora", "vera")
def test_adapter_config_json(reference, tmp_path, name):
    model, base = reference("llama", "causal_lm").load()
    method = METHODS[name]
    jaxpeft.save_adapter(tmp_path, method, jaxpeft.rewrite(method, base, jax.random.key(0)), model)
    found = outcomes(
        tmp_path / "adapter_config.json", lambda: jaxpeft.load_adapter(tmp_path, model, base), 1, 25
    )
    assert set(found) <= {"loaded", "refused"}, found
