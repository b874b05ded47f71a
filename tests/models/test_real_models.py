"""Real pretrained models give the reference's numbers."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.representatives("False")
def test_stories260k_gives_the_recorded_logits_and_text(assets, scan_layers):
    folder = assets / "stories260K"
    if not (folder / "expected.json").is_file():
        pytest.skip(f"{folder} is absent: the shared test assets do not hold stories260K")
    expected = json.loads((folder / "expected.json").read_text())
    model, params = jaxpeft.load(
        folder / "hf", task="causal_lm", dtype=jnp.float32, scan_layers=scan_layers
    )
    run = jax.jit(lambda ids: jaxpeft.apply(model, params, ids))
    last = run(np.asarray([expected["prompt_ids"]]))[0, -1]
    for token, logit in expected["last_prompt_logits_top5"]:
        assert abs(float(last[token]) - logit) <= 1e-4
    ids = np.asarray([expected["greedy_ids"]])
    start = len(expected["prompt_ids"])
    np.testing.assert_array_equal(np.argmax(run(ids)[0, start - 1 : -1], -1), ids[0, start:])


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.representatives("True")
def test_minilm_gives_the_hidden_states_of_torch(minilm, scan_layers):
    import torch
    from transformers import AutoModel

    rng = np.random.default_rng(0)
    ids, mask = rng.integers(999, 20000, (3, 24)).astype(np.int32), np.ones((3, 24), np.int32)
    ids[1, 9:], mask[1, 9:], ids[2, :5], mask[2, :5] = 0, 0, 0, 0
    with torch.no_grad():
        reference = AutoModel.from_pretrained(minilm).eval()
        wanted = reference(
            torch.tensor(ids).long(), attention_mask=torch.tensor(mask)
        ).last_hidden_state.numpy()
    model, params = jaxpeft.load(minilm, task="encoder", dtype=jnp.float32, scan_layers=scan_layers)
    ours = np.asarray(jaxpeft.apply(model, params, ids, mask))
    assert np.abs(ours - wanted)[mask.astype(bool)].max() <= 1e-4
