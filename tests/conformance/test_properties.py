"""The table of properties: every method, scanned and unrolled, decoder and encoder."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft.checkpoint.manager import Checkpoints
from jaxpeft.core import paths
from jaxpeft.core.folding import can_fold
from jaxpeft.core.tree import combine
from jaxpeft.errors import ConfigError
from jaxpeft.train.begin import fixed_leaves
from tests.conformance.conftest import (
    Subject,
    every_method,
    every_subject,
    moved,
    subject_of,
    subjects_in_turn,
)
from tests.conformance.probing import in_one_batch, on_quantized, quantized
from tests.conformance.rows import ROWS
from tests.core.helpers import BATCH, QUICK, assert_bits, largest, load
from tests.models.conftest import forward

TOLERANCE = 1e-4
BATCH_ROWS = (BATCH.ids, BATCH.mask)


def close(a: Any, b: Any, tolerance: float = TOLERANCE) -> bool:
    scale = max(1.0, float(np.abs(b).max()))
    return (
        float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max())
        < tolerance * scale
    )


@subjects_in_turn
@pytest.mark.representatives("ia3-*", "prefix-*", "prompt-*")
def test_a_fresh_adapter_leaves_the_output_bit_identical_op_by_op_or_says_why_not(
    subject: Subject,
) -> None:
    if not subject.method.fresh_is_base:
        assert subject.row.why
        assert np.isfinite(subject.logits(subject.fresh)).all()
        return
    # compiled as one program, what XLA fuses with the added zeros is rounded in another order
    assert close(subject.logits(subject.fresh), subject.logits(subject.base), 1e-6)
    with jax.disable_jit():
        fresh, base = subject.logits(subject.fresh), subject.logits(subject.base)
    np.testing.assert_array_equal(fresh, base)


@subjects_in_turn
def test_a_moved_adapter_changes_the_output(subject: Subject) -> None:
    assert not close(subject.logits(subject.moved), subject.logits(subject.base), 1e-3)


@subjects_in_turn
@pytest.mark.representatives("lora-*", "vera-*", "prefix-*", "ia3-*", "ln_tuning-*")
def test_only_trained_leaves_receive_gradient_and_every_one_does(subject: Subject) -> None:
    state, frozen, _ = subject.trained
    trainable, _ = jaxpeft.partition(subject.fresh, subject.mask)
    before, after = dict(paths.walk(trainable)), dict(paths.walk(state.trainable))
    assert before.keys() == after.keys()
    assert not before.keys() & dict(paths.walk(frozen)).keys()
    still = [paths.text(path) for path, leaf in after.items() if np.array_equal(leaf, before[path])]
    assert not [name for name in still if not may_stand_still(name)]


def may_stand_still(name: str) -> bool:
    """Return whether a leaf has no influence on these outputs: types and positions that no token
    has, unread poolers.
    """
    return any(
        part in name
        for part in ("token_type_embeddings", "pooler", "embed_tokens", "word_embeddings")
    )


@subjects_in_turn
def test_the_base_is_bit_unchanged_after_training(subject: Subject) -> None:
    trained = dict(paths.walk(subject.mask))
    after = dict(paths.walk(subject.after))
    for path, leaf in paths.walk(subject.base):
        if not trained[path]:
            np.testing.assert_array_equal(
                np.asarray(leaf), np.asarray(after[path]), err_msg=paths.text(path)
            )


@subjects_in_turn
def test_the_optimizer_holds_no_array_for_a_frozen_leaf(subject: Subject) -> None:
    state, _, _ = subject.trained
    sizes = {leaf.shape for _, leaf in paths.walk(state.trainable)}
    held = {leaf.shape for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim}
    assert held <= sizes


@subjects_in_turn
def test_no_second_program_is_compiled_at_the_second_step(subject: Subject) -> None:
    assert subject.trained[2] == 1


@subjects_in_turn
def test_merged_is_unmerged_or_merging_refuses(subject: Subject) -> None:
    if not all(can_fold(type(part)) for part in subject.method.parts()):
        with pytest.raises(
            ConfigError,
            match="cannot be merged: its computation cannot be expressed by plain weights",
        ):
            jaxpeft.merge(subject.method, subject.moved)
        return
    if why := subject.row.unmerged.get(subject.kind):
        with pytest.raises(ConfigError, match=why):
            jaxpeft.merge(subject.method, subject.moved)
        return
    merged = jaxpeft.merge(subject.method, subject.moved)
    assert {p: x.shape for p, x in paths.walk(merged)} == {
        p: x.shape for p, x in paths.walk(subject.base)
    }
    assert close(subject.logits(merged), subject.logits(subject.moved))
    if subject.method.parts()[0].leaves.site:
        with pytest.raises(ConfigError, match="nothing to merge"):
            jaxpeft.merge(subject.method, merged)


@subjects_in_turn
def test_rewriting_twice_is_refused(subject: Subject) -> None:
    if any(part.leaves.site or part.leaves.root for part in subject.method.parts()):
        with pytest.raises(ConfigError, match="already has"):
            jaxpeft.rewrite(subject.method, subject.fresh, jax.random.key(0))


@subjects_in_turn
def test_saved_and_loaded_computes_the_same_bits(subject: Subject, tmp_path: Any) -> None:
    jaxpeft.save_adapter(tmp_path / "adapter", subject.method, subject.after, subject.model)
    method, loaded = jaxpeft.load_adapter(tmp_path / "adapter", subject.model, subject.base)
    if {p for p, _ in paths.walk(loaded)} == {p for p, _ in paths.walk(subject.after)}:
        assert_bits(loaded, subject.after)
    jaxpeft.save_adapter(tmp_path / "again", method, loaded, subject.model)
    again = jaxpeft.load_adapter(tmp_path / "again", subject.model, subject.base)[1]
    assert_bits(again, loaded)
    assert close(subject.logits(loaded), subject.logits(subject.after), 1e-5)


@every_subject
def test_scanned_and_unrolled_layers_give_the_same_numbers(subject: Subject) -> None:
    if subject.scan:
        name = next(name for name, row in ROWS.items() if row is subject.row)
        other = subject_of(name, subject.kind, False)
        assert_bits(jaxpeft.unstack_layers(subject.fresh), other.fresh)
        unrolled = jaxpeft.unstack_layers(subject.moved)
        assert close(subject.logits(subject.moved), other.logits(unrolled), 1e-5)


@every_method(scan=False, kind="bert")
@pytest.mark.representatives("lora-*", "ia3-*", "prefix-*")
def test_it_works_in_bfloat16_and_under_vmap(subject: Subject) -> None:
    model, params = subject.model, subject.moved
    halved = load(subject.kind, dtype=jnp.bfloat16, scan_layers=subject.scan)[0]
    out = np.asarray(
        jax.jit(lambda p: jaxpeft.apply(halved, p, BATCH.ids, BATCH.mask), compiler_options=QUICK)(
            params
        )
    )
    out = out[BATCH.mask.astype(bool)] if out.ndim == 3 else out
    assert np.isfinite(out).all()
    assert close(out, subject.logits(params), 0.15)

    pair = jnp.stack([BATCH.ids, BATCH.ids[::-1]])
    rows = jax.jit(jax.vmap(lambda ids: jaxpeft.apply(model, params, ids)), compiler_options=QUICK)(
        pair
    )
    assert close(rows[0], jnp.flip(rows[1], 0), 1e-5)


@every_method(scan=True, kind="llama")
@pytest.mark.representatives("vera-*", "prefix-*")
def test_it_works_under_remat_and_sharded(subject: Subject) -> None:
    model, params = subject.model, subject.moved
    remat = load(subject.kind, scan_layers=subject.scan, remat="full")[0]
    trainable, frozen = jaxpeft.partition(params, subject.mask)

    def total(m: Any, p: Any) -> Any:
        return jnp.sum(jnp.square(jaxpeft.apply(m, combine(p, frozen), BATCH.ids, BATCH.mask)))

    grads = [
        jax.jit(jax.grad(lambda p, m=m: total(m, p)), compiler_options=QUICK)(trainable)
        for m in (model, remat)
    ]
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads[0]))
    assert largest(*grads) < 1e-4 * max(1.0, size)
    assert close(sharded(model, params), subject.logits(params), 1e-5)


def sharded(model: Any, params: Any) -> Any:
    """Compute with the base spread over eight devices."""
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def place(path: Any, leaf: Any) -> Any:
        split = path[-1] == "kernel" and leaf.shape[-1] % 8 == 0
        spec = PartitionSpec(*(None,) * (leaf.ndim - 1), "x") if split else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    placed = paths.map_with_path(place, params)
    out = np.asarray(
        jax.jit(lambda p: jaxpeft.apply(model, p, BATCH.ids, BATCH.mask), compiler_options=QUICK)(
            placed
        )
    )
    return out[BATCH.mask.astype(bool)] if out.ndim == 3 else out


def mover(subject: Subject) -> Any:
    return lambda method, params, **options: moved(
        method, params, size=subject.row.moved, **options
    )


@every_method(scan=False)
@pytest.mark.representatives(
    "lora-*",
    "ia3-*",
    "oft-*",
    "prompt-*",
    "prefix-*",
    "mixed-*",
    "ln_tuning-*",
    "adapter houlsby-bert-*",
)
def test_one_adapter_for_each_row_of_a_batch_or_a_clear_refusal(subject: Subject) -> None:
    why = in_one_batch(subject.method, subject.model, subject.base, mover(subject))
    assert bool(why) == bool(subject.row.alone), why
    assert subject.row.alone in (why or "")


@functools.cache
def quantized_base(kind: str, scan: bool) -> tuple[Any, Any]:
    return quantized(load(kind, scan_layers=scan)[1])


@every_method(scan=True, kind="llama")
@pytest.mark.representatives("lora-*", "oft-*", "prefix-*")
def test_it_computes_on_a_quantized_base(subject: Subject) -> None:
    why = on_quantized(
        subject.method, subject.model, quantized_base(subject.kind, subject.scan), mover(subject)
    )
    assert bool(why) == bool(subject.row.unquantized), why
    assert subject.row.unquantized in (why or "")


@every_method(scan=False)
@pytest.mark.representatives("lora-*", "prompt-*", "mixed-*")
def test_interrupted_and_restored_it_goes_on_bit_by_bit(subject: Subject, tmp_path: Any) -> None:
    begun = subject.begun
    state, _ = subject.step(begun[0], begun[1])
    saved = Checkpoints(tmp_path, keep=1)
    fixed = fixed_leaves(subject.method, begun[1])
    saved.save(1, state, None, {}, fixed)
    empty = jax.tree.map(jnp.zeros_like, (state, fixed))
    found, _, again = saved.restore(1, empty[0], None, empty[1])
    saved.close()
    # placed as what the step was compiled for
    found, again = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), (found, again))
    frozen = paths.map_with_path(lambda path, leaf: again.get(paths.text(path), leaf), begun[1])
    resumed, _ = subject.step(type(state)(*found), frozen)
    straight, _ = subject.step(state, begun[1])
    for one, other in zip(jax.tree.leaves(resumed), jax.tree.leaves(straight), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@every_subject
@pytest.mark.representatives(
    "lora-*", "vera-*", "prefix-*", "ia3-*", "prompt-*", "mixed-*", "adapter houlsby-*"
)
def test_it_generates_what_passes_over_the_whole_text_choose(subject: Subject) -> None:
    if subject.model.options.task != "causal_lm":
        with pytest.raises(ConfigError, match="needs a language model"):
            jaxpeft.generate(subject.model, subject.moved, [[5]], max_new_tokens=1)
        return
    prompts = [ids[mask.astype(bool)].tolist() for ids, mask in zip(*BATCH_ROWS, strict=True)]
    texts = jaxpeft.generate(subject.model, subject.moved, prompts, max_new_tokens=5, eos=())
    whole = [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)]
    ids = np.zeros((len(whole), max(map(len, whole))), np.int32)
    mask = np.zeros_like(ids)
    for row, text in enumerate(whole):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    logits = np.asarray(forward(subject.model, subject.moved, ids, mask))
    for row, text in enumerate(whole):
        chosen = logits[row, np.arange(len(text) - 6, len(text) - 1)]
        assert (chosen.max(1) - chosen[np.arange(5), text[-5:]]).max() < 1e-3
