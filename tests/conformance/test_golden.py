"""Adapters that the real `peft` saved, with the logits that it computed: jaxpeft's, and those of
the `peft` that is installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxpeft
from tests.conformance import golden
from tests.conformance.golden import FOLDER, GOLDEN, LOGITS, base_of, last, theirs
from tests.conformance.test_peft import MARK, pytestmark  # noqa: F401 - what peft warns of
from tests.hub.helpers import peft_load
from tests.models.conftest import LABELS, forward

Logits = dict[str, np.ndarray[Any, Any]]
every_method = pytest.mark.parametrize("name", GOLDEN)


@pytest.fixture(scope="module")
def logits() -> Logits:
    return load_file(LOGITS)


@every_method
@pytest.mark.representatives(
    *("lora", "dora", "ia3", "ln_tuning", "trainable_tokens", "lokr", "vera", "adalora", "shira"),
    *("oft", "hra", "road", "prefix", "prompt", "ptuning", "miss"),
)
def test_jaxpeft_gives_the_logits_that_peft_gave(logits: Logits, name: str) -> None:
    assert (FOLDER / name).is_dir(), f"make it: python -m tests.conformance.golden '{name}'"
    case = GOLDEN[name]
    labels = None if case.task == "causal_lm" else LABELS
    model, base = jaxpeft.load(base_of(case), task=case.task, num_labels=labels, dtype=jnp.float32)
    method, params = jaxpeft.load_adapter(FOLDER / name, model, base)
    assert isinstance(case.method, type(method))
    found = last(case.batch, np.asarray(forward(model, params, case.batch.ids, case.batch.mask)))
    assert np.abs(logits[name] - logits[f"base {case.kind}"]).max() > 0.02, (
        "the adapter changes too little to tell anything"
    )
    assert np.abs(found - logits[name]).max() <= MARK * max(1.0, float(np.abs(logits[name]).max()))


@pytest.mark.slow
@every_method
def test_the_peft_that_is_installed_gives_them_too(logits: Logits, name: str) -> None:
    case = GOLDEN[name]
    np.testing.assert_allclose(
        theirs(case, peft_load(base_of(case), case.task, FOLDER / name)), logits[name], atol=1e-5
    )


@pytest.mark.slow
@every_method
def test_the_peft_that_is_installed_saves_files_of_the_same_form(tmp_path: Path, name: str) -> None:
    golden.save(name, tmp_path)
    one, other = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, FOLDER / name)
    )
    assert {key: (leaf.shape, leaf.dtype) for key, leaf in one.items()} == {
        key: (leaf.shape, leaf.dtype) for key, leaf in other.items()
    }
    configs = [
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (tmp_path, FOLDER / name)
    ]
    assert configs[0].keys() == configs[1].keys(), (
        f"make it anew: python -m tests.conformance.golden '{name}'"
    )
