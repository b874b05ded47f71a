"""VB-LoRA's own: more vectors a part, dropout's leaf, and files without logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest

import jaxpeft
from jaxpeft.errors import AdapterError, ConfigError
from tests.core.helpers import load
from tests.hub.helpers import edit_json
from tests.methods.interop import case_of, exported, imported, quiet
from tests.models.conftest import reference  # noqa: F401 - a fixture

pytestmark = quiet
SITES = ("q_proj", "down_proj")


@pytest.mark.slow
def test_three_vectors_a_part_go_both_ways(reference: Any, tmp_path: Path) -> None:
    method = jaxpeft.VBLoRA(rank=3, vectors=9, vector_length=16, topk=3, targets=SITES)
    options = {
        "r": 3,
        "num_vectors": 9,
        "vector_length": 16,
        "topk": 3,
        "target_modules": list(SITES),
    }
    case = case_of(method, "llama", "VBLoRAConfig", size=0.4, **options)
    assert exported(reference, tmp_path / "ours", case) < 1e-4
    far, found = imported(reference, tmp_path / "theirs", case)
    assert far < 1e-4
    assert (found.rank, found.vectors, found.vector_length, found.topk) == (3, 9, 16, 3)


def test_a_file_without_logits_is_refused(tmp_path: Path) -> None:
    model, base = load("llama")
    method = jaxpeft.VBLoRA(vectors=9, vector_length=16, targets=SITES)
    jaxpeft.save_adapter(tmp_path, method, jaxpeft.rewrite(method, base, jax.random.key(0)), model)
    edit_json(
        tmp_path / "adapter_config.json", lambda config: config.update(save_only_topk_weights=True)
    )
    with pytest.raises(AdapterError, match="save_only_topk_weights: the file has no logits"):
        jaxpeft.load_adapter(tmp_path, model, base)


def test_a_tree_of_another_topk_is_not_saved(tmp_path: Path) -> None:
    model, base = load("llama")
    method = jaxpeft.VBLoRA(vectors=9, vector_length=16, targets=SITES)
    params = jaxpeft.rewrite(method, base, jax.random.key(0))
    other = jaxpeft.VBLoRA(vectors=9, vector_length=16, topk=1, targets=SITES)
    with pytest.raises(
        AdapterError, match=r"vblora_topk is \[2\] in the tree, the method makes \[1\]"
    ):
        jaxpeft.save_adapter(tmp_path, other, params, model)


def test_what_does_not_fit_is_refused() -> None:
    _, base = load("llama")
    with pytest.raises(ConfigError, match="topk: 5 is more than vectors, 4"):
        jaxpeft.VBLoRA(vectors=4, topk=5)
    with pytest.raises(
        ConfigError,
        match=r"vblora.vector_length: 256 does not divide the 32 inputs and 32 outputs of model",
    ):
        jaxpeft.rewrite(jaxpeft.VBLoRA(targets=("q_proj",)), base, jax.random.key(0))
