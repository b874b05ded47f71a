"""What the methods with structured updates have in common: IA3, LoHa, LoKr, OFT, BOFT, HRA, DeLoRA,
MiSS.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft.core import paths
from jaxpeft.core.rewriting import trainable_mask
from jaxpeft.core.tree import combine
from jaxpeft.hub.adapters.peft_config import COMMON
from tests.conformance.conftest import moved
from tests.core.helpers import BATCH, QUICK, load, run

SITES = ("q_proj", "down_proj")
METHODS = {
    "ia3": jaxpeft.IA3(targets=SITES, feedforward=("down_proj",)),
    "loha": jaxpeft.LoHa(rank=3, targets=SITES),
    "lokr": jaxpeft.LoKr(rank=2, decompose_both=True, decompose_factor=6, targets=SITES),
    "oft": jaxpeft.OFT(block_size=8, targets=SITES),
    "oft cayley": jaxpeft.OFT(block_size=8, neumann_terms=0, eps=0.7, targets=SITES),
    "boft": jaxpeft.BOFT(block_size=4, factors=2, targets=SITES),
    "hra": jaxpeft.HRA(rank=4, targets=SITES),
    "hra gram schmidt": jaxpeft.HRA(rank=3, gram_schmidt=True, targets=SITES),
    "delora": jaxpeft.DeLoRA(rank=3, boundary=2.0, targets=SITES),
    "miss": jaxpeft.MiSS(rank=5, targets=SITES),
    "miss bat": jaxpeft.MiSS(rank=4, variant="bat", targets=SITES),
}
every_method = pytest.mark.parametrize(
    "method", [pytest.param(m, id=name) for name, m in METHODS.items()]
)


@every_method
@pytest.mark.representatives("ia3")
def test_layers_that_are_not_adapted_compute_the_base_and_are_not_trained(method: Any) -> None:
    method = dataclasses.replace(method, layers_to_transform=(1,))
    model, base = load("llama", scan_layers=True)
    params = moved(method, jaxpeft.rewrite(method, base, jax.random.key(0)), size=0.1)
    other, unrolled = load("llama"), jaxpeft.unstack_layers(params)
    first = unrolled["model"]["layers"]["0"]
    keep = {name for name in method.leaves.site if name not in ("kernel", "bias")} | {
        method.leaves.names[-1]
    }
    bare = paths.build(
        [(p, x) for p, x in paths.walk(unrolled) if "0" not in p or p[-1] not in keep]
    )
    assert any(name in first["self_attn"]["q_proj"] for name in keep)
    np.testing.assert_allclose(run(model, params), run(other[0], bare), atol=1e-5)

    trainable, frozen = jaxpeft.partition(params, trainable_mask(method, params))

    def total(part: Any) -> Any:
        return jnp.sum(
            jnp.square(jaxpeft.apply(model, combine(part, frozen), BATCH.ids, BATCH.mask))
        )

    for path, grad in paths.walk(jax.jit(jax.grad(total), compiler_options=QUICK)(trainable)):
        assert np.isfinite(grad).all(), path
        assert not np.asarray(grad[0]).any(), path
        assert np.asarray(grad[1]).any(), path


@every_method
@pytest.mark.representatives("ia3")
def test_each_row_computes_with_its_own_adapter(method: Any) -> None:
    method = dataclasses.replace(method, layers_to_transform=(1,))
    model, base = load("llama", scan_layers=True)
    fresh = jaxpeft.rewrite(method, base, jax.random.key(0))
    given = [(method, moved(method, fresh, size=0.1, seed=seed)) for seed in (1, 2)]
    tree = jaxpeft.bank(given)
    call = jax.jit(
        lambda which: jaxpeft.apply(model, tree, BATCH.ids, BATCH.mask, adapter=which),
        compiler_options=QUICK,
    )
    alone = [np.asarray(run(model, params)) for _, params in given]
    np.testing.assert_allclose(call(1), alone[1], atol=2e-5)
    rows = call(jnp.asarray([1, 0, 1]))
    for row, i in enumerate((1, 0, 1)):
        np.testing.assert_allclose(rows[row], alone[i][row], atol=2e-5)


DROPPING = {
    "loha outputs": jaxpeft.LoHa(rank=3, rank_dropout=0.5, targets=SITES),
    "loha whole": jaxpeft.LoHa(rank=3, module_dropout=0.5, targets=SITES),
    "lokr outputs": jaxpeft.LoKr(rank=2, rank_dropout=0.5, rank_dropout_scale=True, targets=SITES),
    "oft": jaxpeft.OFT(block_size=8, dropout=0.5, targets=SITES),
    "boft": jaxpeft.BOFT(block_size=4, factors=2, dropout=0.5, targets=SITES),
    "delora": jaxpeft.DeLoRA(rank=3, boundary=2.0, dropout=0.5, targets=SITES),
    "miss": jaxpeft.MiSS(rank=5, dropout=0.5, targets=SITES),
}


@pytest.mark.parametrize("method", [pytest.param(m, id=name) for name, m in DROPPING.items()])
@pytest.mark.representatives("miss")
def test_dropout_is_in_training_calls_alone_and_never_on_the_base(method: Any) -> None:
    rates = {f.name: 0.0 for f in dataclasses.fields(method) if f.name.endswith("dropout")}
    without = dataclasses.replace(method, **rates)
    model, base = load("llama", scan_layers=True)
    fresh = jaxpeft.rewrite(method, base, jax.random.key(0))
    params = moved(method, fresh, size=0.1)
    plain = moved(without, jaxpeft.rewrite(without, base, jax.random.key(0)), size=0.1)
    np.testing.assert_array_equal(run(model, params), run(model, plain))
    calls = [np.asarray(run(model, params, {"dropout": jax.random.key(i)})) for i in range(3)]
    assert all(np.isfinite(call).all() for call in calls)
    assert max(np.abs(calls[0] - calls[1]).max(), np.abs(calls[1] - calls[2]).max()) > 1e-3
    np.testing.assert_array_equal(
        run(model, fresh, {"dropout": jax.random.key(0)}), run(model, base)
    )


@pytest.mark.parametrize(
    ("method", "config"),
    [
        (jaxpeft.IA3, "IA3Config"),
        (jaxpeft.LoHa, "LoHaConfig"),
        (jaxpeft.LoKr, "LoKrConfig"),
        (jaxpeft.OFT, "OFTConfig"),
        (jaxpeft.BOFT, "BOFTConfig"),
        (jaxpeft.HRA, "HRAConfig"),
        (jaxpeft.DeLoRA, "DeloraConfig"),
        (jaxpeft.MiSS, "MissConfig"),
    ],
)
def test_every_option_of_the_real_peft_is_read_or_known_to_change_nothing(
    method: Any, config: str
) -> None:
    import peft

    fields = {f.name for f in dataclasses.fields(getattr(peft, config))}
    assert fields - COMMON - method.peft.options.keys() <= method.peft.ignored
    assert set(method.peft.options) <= fields, "is no option of peft"
    assert method.peft.ignored <= fields, "is no option of peft"
    _, problems = method.peft.read_options(
        method,
        {"target_modules": ["q_proj"], "unheard_of": 1, **dict.fromkeys(method.peft.required, 1)},
    )
    assert (
        f"unheard_of: 1 is not supported by the {method.name} method; nothing was loaded"
        in problems
    )
    _, problems = method.peft.read_options(method, {"target_modules": ["q_proj"]})
    missing = [
        f"{key}: is not set; use the value of the adapter's training"
        for key in method.peft.required
    ]
    assert missing == [problem for problem in problems if "is not set" in problem]
