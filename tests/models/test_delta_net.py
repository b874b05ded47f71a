"""Layers with a gated delta net: rows longer than a chunk, padding, documents, states, meshes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft.core import paths
from jaxpeft.errors import ConfigError
from jaxpeft.hub.loading import outline
from jaxpeft.hub.model_request import ModelRequest
from jaxpeft.models.base import PAST
from jaxpeft.models.kv_cache import STATE, WINDOW, read_layers
from jaxpeft.models.masks import positions
from jaxpeft.train import memory
from tests.hub.helpers import peft_load, trained
from tests.inference.test_generation import theirs as generated
from tests.models.conftest import PAD, VOCAB, Batch, Reference, forward

CAUSAL, KIND = "causal_lm", "qwen3_5_text"
LENGTHS = (150, 7, 1, 81)
Make = Callable[..., Reference]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)


def long_batch(side: str) -> Batch:
    """Make rows of `LENGTHS`, longer and shorter than a chunk and the window, padded on a side."""
    ids = np.random.default_rng(0).integers(4, VOCAB, (len(LENGTHS), max(LENGTHS)))
    at = np.arange(max(LENGTHS))[None]
    sizes = np.asarray(LENGTHS)[:, None]
    mask = at < sizes if side == "right" else at >= max(LENGTHS) - sizes
    return Batch(np.where(mask, ids, PAD).astype(np.int32), mask.astype(np.int32))


@pytest.mark.slow
def test_rows_longer_than_a_chunk_are_those_of_torch(reference: Make) -> None:
    made = reference(KIND, CAUSAL)
    batches = [long_batch("right"), long_batch("left")]
    assert made.difference(batches, *made.load()) < 1e-4


@pytest.mark.slow
def test_gradients_of_every_parameter_are_those_of_torch(reference: Make) -> None:
    import torch

    made = reference(KIND, CAUSAL)
    model, params = made.load()
    batch = long_batch("left")
    real = batch.mask[..., None].astype(np.float32)

    def loss(params: Any) -> Any:
        logits = jaxpeft.apply(model, params, batch.ids, batch.mask)
        return jnp.mean(jnp.square(logits) * real)

    gradients = jax.jit(jax.grad(loss))(params)
    ids, mask = (torch.tensor(x, dtype=torch.long) for x in (batch.ids, batch.mask))
    made.model.zero_grad()
    logits = made.model(input_ids=ids, attention_mask=mask).logits
    torch.mean(logits**2 * torch.tensor(real)).backward()
    wanted = {name: leaf.grad.numpy() for name, leaf in made.model.named_parameters()}
    made.model.zero_grad()
    compared = set[str]()
    for path, leaf in paths.walk(gradients):
        (name,) = paths.hf_names(path)
        theirs = wanted[name].T if path[-1] == "kernel" else wanted[name]
        np.testing.assert_allclose(leaf, theirs, atol=1e-4 * np.abs(theirs).max(), err_msg=name)
        compared.add(name)
    assert compared == set(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["products", "full"])
@pytest.mark.alternatives("products", "full")
def test_remat_changes_no_gradient(reference: Make, remat: str) -> None:
    made, batch = reference(KIND, CAUSAL), long_batch("right")

    def gradient(model: Any, params: Any) -> Any:
        def loss(params: Any) -> Any:
            return jnp.mean(jnp.square(jaxpeft.apply(model, params, batch.ids, batch.mask)))

        return jax.jit(jax.grad(loss))(params)

    plain, again = gradient(*made.load()), gradient(*made.load(remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4), plain, again)


@pytest.mark.slow
def test_documents_that_begin_within_a_chunk_are_those_of_their_own_rows(reference: Make) -> None:
    model, params = reference(KIND, CAUSAL).load()
    ids = long_batch("right").ids[:1]
    sizes = (50, 2, 70, 28)
    segments = np.repeat(np.arange(1, 5), sizes)[None].astype(np.int32)
    where = np.asarray(positions(jnp.asarray(segments), *ids.shape))
    packed = forward(model, params, ids, None, {"segment_ids": segments, "position_ids": where})
    alone = [
        forward(model, params, part, None)
        for part in np.split(ids, np.cumsum(sizes)[:-1].tolist(), axis=1)
    ]
    np.testing.assert_allclose(packed, np.concatenate(alone, axis=1), atol=1e-4)


def test_the_state_is_that_of_the_last_token_before_padding(reference: Make) -> None:
    model, params = reference(KIND, CAUSAL).load()
    run = jax.jit(
        lambda ids, mask: model.apply({"params": params}, ids, mask, mutable=[PAST])[1][PAST]
    )
    batch = long_batch("right")
    padded = read_layers(run(batch.ids, batch.mask))
    assert {name: set(own) for name, own in padded.items()} == {
        "0": {WINDOW, STATE},
        "1": {"keys", "values"},
        "2": {WINDOW, STATE},
    }
    for row, length in enumerate(LENGTHS[1:3], start=1):
        alone = read_layers(run(batch.ids[row : row + 1, :length], None))
        for i in ("0", "2"):
            for name in (WINDOW, STATE):
                np.testing.assert_allclose(
                    padded[i][name][row], alone[i][name][0], atol=1e-5, err_msg=f"{i} {name}"
                )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["none", "fsdp_tensor"])
def test_greedy_tokens_after_long_prompts_are_those_of_torch(
    reference: Make, strategy: str
) -> None:
    made = reference(KIND, CAUSAL)
    batch = long_batch("right")
    prompts = [row[:size].tolist() for row, size in zip(batch.ids, LENGTHS, strict=True)]
    options: dict[str, Any] = {}
    if strategy != "none":
        config = jaxpeft.MeshConfig(strategy=strategy, tensor=2, fsdp=4)
        mesh = jaxpeft.create_device_mesh(config)
        options = {"mesh": mesh, "rules": jaxpeft.sharding_rules(config)}
    model, params = made.load(**options)
    found = jaxpeft.generate(model, params, prompts, max_new_tokens=8, eos=())
    assert found == generated(made.model, prompts, 8)


@pytest.mark.slow
def test_in_bfloat16_the_state_is_float32_and_the_logits_are_near(reference: Make) -> None:
    made, batch = reference(KIND, CAUSAL), long_batch("right")
    exact = forward(*made.load(), batch.ids, batch.mask)
    model, params = made.load(dtype=jnp.bfloat16)
    sown = jax.eval_shape(
        lambda params: model.apply({"params": params}, batch.ids, mutable=[PAST])[1], params
    )
    kept = read_layers(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), sown[PAST]))
    assert {name: leaf.dtype for name, leaf in kept["0"].items()} == {
        WINDOW: jnp.bfloat16,
        STATE: jnp.float32,
    }
    found = np.asarray(forward(model, params, batch.ids, batch.mask))
    real = batch.mask.astype(bool)
    scale = np.abs(np.asarray(exact)[real]).mean()
    assert np.abs(found - exact)[real].mean() < 0.05 * scale


def test_prefixes_are_refused_where_layers_have_no_keys(reference: Make) -> None:
    _, params = reference(KIND, CAUSAL).load()
    with pytest.raises(ConfigError, match=r"2 of the 3 layers have a recurrence .* no keys, which"):
        jaxpeft.rewrite(jaxpeft.PrefixTuning(num_virtual_tokens=3), params, jax.random.key(0))


@pytest.mark.slow
def test_a_prompt_runs_through_the_recurrence_as_in_peft(reference: Make, tmp_path: Any) -> None:
    import torch

    made = reference(KIND, CAUSAL)
    model, base = made.load()
    method = jaxpeft.PromptTuning(num_virtual_tokens=5)
    params = trained(method, jaxpeft.rewrite(method, base, jax.random.key(0)))
    jaxpeft.save_adapter(tmp_path, method, params, model)
    batch = long_batch("right")
    ids, mask = (torch.tensor(x, dtype=torch.long) for x in (batch.ids, batch.mask))
    with torch.no_grad():
        adapted = peft_load(made.folder, CAUSAL, tmp_path)
        wanted = adapted(input_ids=ids, attention_mask=mask).logits[:, 5:].numpy()
    real = batch.mask.astype(bool)
    found = np.asarray(forward(model, params, batch.ids, batch.mask))
    np.testing.assert_allclose(found[real], wanted[real], atol=1e-4)
    assert (
        np.abs(found - np.asarray(forward(model, base, batch.ids, batch.mask)))[real].max() > 0.01
    )


@pytest.mark.slow
def test_bottlenecks_follow_delta_nets_as_they_follow_attention(reference: Make) -> None:
    model, base = reference(KIND, CAUSAL).load()
    method = jaxpeft.Adapter(placement="houlsby")
    params = jaxpeft.rewrite(method, base, jax.random.key(0))
    adapted = {path[:-1][-2:] for path, _ in paths.walk(params) if path[-1] == "adapter_down"}
    assert adapted == {("linear_attn", "out_proj"), ("self_attn", "o_proj"), ("mlp", "down_proj")}
    ids = long_batch("right").ids[:, :9]
    moved = forward(model, trained(method, params), ids, None)
    assert np.abs(np.asarray(moved) - np.asarray(forward(model, base, ids, None))).max() > 0.01


def test_the_memory_of_unequal_layers_is_that_of_each(reference: Make) -> None:
    outlined = outline(reference(KIND, CAUSAL).folder, ModelRequest(CAUSAL))
    kept = memory.estimate(outlined, 0, 2, 8).kept
    hidden, mlp = 32, 2 * 48
    delta = (16 + 16 + 48) + 48 + 4 + 4 + 48  # queries, keys and values, three gates, the output
    attention = 4 * 16 + 4 * 16 + 2 * 16 + 2 * 16 + 4 * 16  # queries, gates, keys, values, output
    numbers = 2 * delta + attention + 3 * (hidden + mlp)
    wanted = 2 * 8 * 4 * numbers
    # the means over three layers of two kinds of activations are rounded
    assert wanted - 6 < kept["products"] - kept["full"] <= wanted
