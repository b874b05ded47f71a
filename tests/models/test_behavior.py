"""What every architecture shows beside parity: scan, remat, bf16, documents in one row, dropout,
empty rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft.errors import DataError
from jaxpeft.models.masks import positions
from tests.models.conftest import forward
from tests.models.test_encoder_parity import ENCODERS

ALL = ("llama", "mistral", "qwen2", "qwen3", *ENCODERS)
WINDOWED = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
SWITCHES = {"mistral": {"sliding_window": 4}, "qwen2": WINDOWED, "qwen3": WINDOWED}
TASK = "token_classification"
QUICK = {
    "xla_backend_optimization_level": 0
}  # programs with gradients or dropout compile in half the time
RUNS = [
    *((kind, False) for kind in ALL),
    ("qwen3", True),
    ("bert", True),
    ("distilbert", True),
    ("deberta-v2", True),
]
"""Every architecture unrolled, and one of each kind of block scanned;
`test_scanned_and_unrolled...` joins the two.
"""


@pytest.fixture
def load(reference):
    return lambda kind, **options: reference(kind, TASK, **SWITCHES.get(kind, {})).load(**options)


def loss_and_gradient(model, params, batch, key=None):
    rngs = None if key is None else {"dropout": key}

    def loss(params):
        logits = jaxpeft.apply(model, params, batch.ids, batch.mask, rngs=rngs)
        return jnp.mean(jnp.square(logits) * batch.mask[..., None].astype(np.float32))

    return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params)


def assert_close(a, b, tolerance):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance), a, b
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mistral", "qwen3", "bert", "distilbert", "deberta-v2"])
@pytest.mark.representatives("mistral")
def test_scanned_and_unrolled_layers_agree_in_loss_and_gradient(load, padded, kind):
    losses, gradients = zip(
        *(loss_and_gradient(*load(kind, scan_layers=scan), padded[1]) for scan in (False, True)),
        strict=True,
    )
    assert_close(losses[0], losses[1], 1e-6)
    assert_close(jaxpeft.stack_layers(gradients[0]), gradients[1], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "scan_layers"), [("qwen2", False), ("qwen2", True), ("bert", True)]
)
def test_remat_changes_no_gradient_dropout_included(load, padded, kind, scan_layers):
    key = jax.random.key(3)
    plain = loss_and_gradient(*load(kind, scan_layers=scan_layers), padded[2], key)
    for remat in ("full", "attention", "products"):
        model, params = load(kind, scan_layers=scan_layers, remat=remat)
        assert_close(plain, loss_and_gradient(model, params, padded[2], key), 1e-6)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.representatives("False")
def test_remat_keeps_what_its_policy_names(load, padded, scan_layers):
    def saved(remat):
        model, params = load("llama", scan_layers=scan_layers, remat=remat)
        return count_kept(
            lambda p: jaxpeft.apply(model, p, padded[0].ids, padded[0].mask).sum(), params
        )

    kept = {remat: saved(remat) for remat in ("none", "full", "attention", "products")}
    assert kept["full"] < kept["attention"] < kept["products"] < kept["none"]


def count_kept(function, params):
    """Count the bytes that the forward pass hands to the backward pass."""
    residuals = jax.eval_shape(lambda p: jax.vjp(function, p)[1], params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))


@pytest.mark.parametrize(("kind", "scan_layers"), RUNS)
@pytest.mark.representatives("bert-True")
def test_bf16(load, padded, kind, scan_layers):
    exact = forward(*load(kind), padded[1].ids, padded[1].mask)
    model, params = load(kind, dtype=jnp.bfloat16, scan_layers=scan_layers)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(params)}
    assert jnp.dtype(jnp.bfloat16) in dtypes
    logits = forward(model, params, padded[1].ids, padded[1].mask)
    assert logits.dtype == jnp.float32
    real = padded[1].mask.astype(bool)
    gap = np.abs(np.asarray(exact) - np.asarray(logits))[real]
    assert gap.mean() < 0.1 * np.abs(np.asarray(exact))[real].mean()


@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification", "encoder"])
@pytest.mark.representatives("encoder")
def test_bf16_of_the_other_tasks(reference, padded, task):
    model, params = reference("llama", task).load(dtype=jnp.bfloat16)
    out = forward(model, params, padded[2].ids, padded[2].mask)
    assert out.dtype == (jnp.bfloat16 if task == "encoder" else jnp.float32)
    assert bool(jnp.isfinite(out).all())


@pytest.mark.parametrize(("kind", "scan_layers"), RUNS)
@pytest.mark.representatives("mistral-False")
def test_documents_in_one_row_do_not_see_each_other(load, padded, kind, scan_layers):
    model, params = load(kind, scan_layers=scan_layers)
    ids = padded[0].ids[:1]
    segments = np.array([[1] * 6 + [2] * 7 + [3] * 3], np.int32)
    mask = None if scan_layers else (segments < 3).astype(np.int32)
    run = jax.jit(lambda ids: jaxpeft.apply(model, params, ids, mask, segment_ids=segments))
    before, changed = run(ids), ids.copy()
    changed[:, 6:13] = changed[:, 6:13][:, ::-1]
    after = run(changed)
    # a place of padding may see nothing
    others = (segments[0] != 2) & (True if mask is None else mask[0] != 0)
    np.testing.assert_array_equal(before[:, others], after[:, others])
    assert not np.array_equal(before[:, 6:13], after[:, 6:13])
    alone = jax.jit(lambda ids: jaxpeft.apply(model, params, ids))(ids[:, 6:13])
    np.testing.assert_allclose(before[:, 6:13], alone, atol=1e-5)


def test_positions_start_anew_in_each_segment():
    segments = jnp.array([[5, 5, 5, 2, 2, 9], [0, 0, 0, 0, 0, 0]])
    wanted = [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    np.testing.assert_array_equal(positions(segments, 2, 6), wanted)


@pytest.mark.parametrize(("kind", "scan_layers"), RUNS)
@pytest.mark.representatives("bert-True")
def test_dropout_needs_a_key_and_differs_by_it(reference, padded, kind, scan_layers):
    decoder = {"attention_dropout": 0.5, "classifier_dropout": 0.0}
    own = kind in ENCODERS and kind != "modernbert"  # whose rates are not zero by default
    switches = SWITCHES.get(kind, {}) | ({} if own else decoder)
    model, params = reference(kind, TASK, **switches).load(scan_layers=scan_layers)

    def forward(rngs):
        return jaxpeft.apply(model, params, padded[0].ids, padded[0].mask, rngs=rngs)

    program = jax.jit(forward, compiler_options=QUICK)

    def run(seed):
        rngs = None if seed is None else {"dropout": jax.random.key(seed)}
        return np.asarray(program(rngs))

    run_once = {seed: run(seed) for seed in (None, 0, 1)}
    np.testing.assert_array_equal(run_once[None], run(None))
    np.testing.assert_array_equal(run_once[0], run(0))
    assert not np.array_equal(run_once[0], run_once[None])
    assert not np.array_equal(run_once[0], run_once[1])


@pytest.mark.parametrize(
    ("kind", "scan_layers"), [("mistral", False), ("qwen3", True), ("bert", False)]
)
@pytest.mark.representatives("mistral-False")
def test_a_row_of_padding_alone_gives_numbers_and_finite_gradients(load, padded, kind, scan_layers):
    batch = type(padded[0])(padded[1].ids, padded[1].mask.copy())
    batch.mask[1] = 0
    model, params = load(kind, scan_layers=scan_layers)
    loss, gradient = loss_and_gradient(model, params, batch)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in [loss, *jax.tree.leaves(gradient)])


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.representatives("bert", "mistral")
def test_a_mask_may_be_bools_and_absent(load, padded, kind):
    model, params = load(kind)
    ids = padded[0].ids
    plain = jaxpeft.apply(model, params, ids)
    for mask in (
        np.ones(ids.shape, bool),
        np.ones(ids.shape, np.float32),
        jnp.ones(ids.shape, jnp.int8),
    ):
        np.testing.assert_allclose(plain, jaxpeft.apply(model, params, ids, mask), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "inputs", "text"),
    [
        (
            "bert",
            {"token_type_ids": [[0, 5, 0]]},
            "token_type_ids: 5 is outside the model's table of 2",
        ),
        (
            "bert",
            {"position_ids": [[0, 1, 99]]},
            "position_ids: 99 is outside the model's table of 40",
        ),
        ("llama", {"position_ids": [[0, 1, -1]]}, "position_ids: -1 is outside"),
        ("roberta", {"token_type_ids": [[0, 2, 0]]}, "token_type_ids: 2 is outside"),
        (
            "bert",
            {"token_type_ids": [[0, 0]]},
            r"token_type_ids: has shape \[1, 2\], input_ids has \[1, 3\]",
        ),
    ],
)
def test_inputs_that_no_table_holds_are_refused(load, kind, inputs, text):
    model, params = load(kind)
    with pytest.raises(DataError, match=text):
        jaxpeft.apply(model, params, [[4, 5, 6]], **inputs)


@pytest.mark.parametrize("ids", [[[4, 5], [6]], [], [[]]])
def test_ragged_and_empty_ids_are_refused(load, ids):
    model, params = load("bert")
    with pytest.raises(DataError, match=r"input_ids: (rows differ in length|must be integers)"):
        jaxpeft.apply(model, params, ids)
