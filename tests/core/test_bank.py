"""Several adapters in one tree: switched without compiling, one for each row of a batch, merged
with weights as peft does.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft.errors import ConfigError
from tests.conformance.conftest import moved
from tests.core.helpers import BATCH, load
from tests.models.conftest import forward

LINEAR = ("q_proj", "v_proj", "down_proj")


def adapters(base: Any, ranks: tuple[int, ...] = (2, 4, 3)) -> list[Any]:
    made = []
    for i, rank in enumerate(ranks):
        method = jaxpeft.LoRA(rank=rank, alpha=4.0 + i, targets=LINEAR)
        made.append(
            (method, moved(method, jaxpeft.rewrite(method, base, jax.random.key(i)), seed=i))
        )
    return made


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.representatives("scanned")
def test_each_row_computes_with_its_own_adapter_and_switching_compiles_nothing(scan: bool) -> None:
    model, base = load("llama", scan_layers=scan)
    given = adapters(base)
    tree = jaxpeft.bank(given)
    run = jax.jit(lambda ids, which: jaxpeft.apply(model, tree, ids, BATCH.mask, adapter=which))
    alone = [np.asarray(forward(model, params, BATCH.ids, BATCH.mask)) for _, params in given]
    for i, wanted in enumerate(alone):
        np.testing.assert_allclose(run(BATCH.ids, i), wanted, atol=2e-5)
        np.testing.assert_allclose(
            forward(model, jaxpeft.pick(given[i][0], tree, i), BATCH.ids, BATCH.mask),
            wanted,
            atol=2e-5,
        )
    assert run._cache_size() == 1
    rows = run(BATCH.ids, jnp.asarray([2, 0, 1]))
    for row, i in enumerate((2, 0, 1)):
        np.testing.assert_allclose(rows[row], alone[i][row], atol=2e-5)


def test_what_cannot_be_put_into_one_tree_is_refused() -> None:
    model, base = load("bert")
    del model
    methods = [jaxpeft.LoRA(rank=2, targets=("query",)), jaxpeft.LoRA(rank=2, targets=("value",))]
    trees = [jaxpeft.rewrite(method, base, jax.random.key(0)) for method in methods]
    with pytest.raises(ConfigError, match="adapters 0 and 1 have different leaves, such as bert/"):
        jaxpeft.bank(list(zip(methods, trees, strict=True)))
    with pytest.raises(ConfigError, match="different methods"):
        jaxpeft.bank([(methods[0], trees[0]), (jaxpeft.Head(), base)])
    other = moved(methods[0], trees[0])
    with pytest.raises(
        ConfigError, match="classifier/bias is a leaf of the base that adapters 0 and 1 trained"
    ):
        jaxpeft.bank([(methods[0], trees[0]), (methods[0], other)])
    with pytest.raises(ConfigError, match="needs at least one adapter"):
        jaxpeft.bank([])


# ---------------------------------------------------------------------------------- weighted merges


def torch_merge(pair: Any, how: str, **options: Any) -> tuple[Any, Any]:
    """Merge two adapters of one linear module with the real peft; return A and B as ours are."""
    import torch
    from peft import LoraConfig, get_peft_model

    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = torch.nn.Linear(6, 5, bias=False)

        def forward(self, x: Any) -> Any:
            return self.proj(x)

    model = get_peft_model(
        Holder(), LoraConfig(r=pair[0][0].shape[1], lora_alpha=4, target_modules=["proj"]), "one"
    )
    model.add_adapter(
        "two", LoraConfig(r=pair[1][0].shape[1], lora_alpha=6, target_modules=["proj"])
    )
    site = model.base_model.model.proj
    for name, (a, b) in zip(("one", "two"), pair, strict=True):
        site.lora_A[name].weight.data = torch.tensor(np.array(a.T))
        site.lora_B[name].weight.data = torch.tensor(np.array(b.T))
    model.base_model.add_weighted_adapter(["one", "two"], [0.7, -0.4], "new", how, **options)
    return (
        site.lora_A["new"].weight.detach().numpy().T,
        site.lora_B["new"].weight.detach().numpy().T,
    )


def pair_of(ranks: tuple[int, int]) -> Any:
    rng = np.random.default_rng(0)
    return [
        (
            rng.standard_normal((6, r)).astype(np.float32),
            rng.standard_normal((r, 5)).astype(np.float32),
        )
        for r in ranks
    ]


def merged(pair: Any, how: Any, **options: Any) -> Any:
    given = []
    for (a, b), alpha in zip(pair, (4.0, 6.0), strict=True):
        method = jaxpeft.LoRA(rank=a.shape[1], alpha=alpha, targets=("proj",))
        tree = jaxpeft.rewrite(method, {"proj": {"kernel": jnp.ones((6, 5))}}, jax.random.key(0))
        tree["proj"] |= {"lora_a": jnp.asarray(a), "lora_b": jnp.asarray(b)}
        given.append((method, tree))
    method, tree = jaxpeft.merge_adapters(given, [0.7, -0.4], how, **options)
    assert float(tree["proj"]["lora_scale"]) == 1.0
    assert method.rank == tree["proj"]["lora_a"].shape[1]
    return tree["proj"]["lora_a"], tree["proj"]["lora_b"]


@pytest.mark.parametrize(
    ("how", "ranks", "ours", "theirs"),
    [
        ("linear", (3, 3), {}, {}),
        ("cat", (3, 2), {}, {}),
        ("svd", (3, 2), {}, {}),
        ("svd", (3, 2), {"rank": 2}, {"svd_rank": 2}),
        ("ties", (3, 3), {"density": 0.5}, {"density": 0.5}),
        (
            "ties",
            (3, 3),
            {"density": 0.5, "sign": "frequency"},
            {"density": 0.5, "majority_sign_method": "frequency"},
        ),
        ("ties_svd", (3, 2), {"density": 0.6}, {"density": 0.6}),
        ("magnitude_prune", (3, 3), {"density": 0.4}, {"density": 0.4}),
        ("magnitude_prune_svd", (3, 2), {"density": 0.4}, {"density": 0.4}),
    ],
)
def test_weighted_merges_are_those_of_the_real_peft(
    how: str, ranks: Any, ours: Any, theirs: Any
) -> None:
    pair = pair_of(ranks)
    a, b = merged(pair, how, **ours)
    wanted_a, wanted_b = torch_merge(pair, how, **theirs)
    assert a.shape == wanted_a.shape
    np.testing.assert_allclose(a @ b, wanted_a @ wanted_b, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "plain"), [("dare_linear", "linear"), ("dare_linear_svd", "svd"), ("dare_ties", "ties")]
)
def test_dropping_nothing_at_random_is_the_merge_without_dropping(how: str, plain: str) -> None:
    pair = pair_of((3, 3))
    same = {"density": 1.0} if plain == "ties" else {}
    one, other = merged(pair, how, density=1.0, rng=jax.random.key(0)), merged(pair, plain, **same)
    np.testing.assert_allclose(one[0] @ one[1], other[0] @ other[1], atol=2e-5)
    mean = [
        merged(pair, "dare_linear_svd", density=0.5, rng=jax.random.key(i), rank=5)
        for i in range(400)
    ]
    whole = merged(pair, "svd", rank=5)
    average = np.mean([a @ b for a, b in mean], axis=0)
    if plain == "svd":  # entries that are kept grow, so the mean stays
        np.testing.assert_allclose(average, whole[0] @ whole[1], atol=0.8)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(
        ConfigError, match="linear needs equal ranks, but they are 2 and 3; use svd or cat"
    ):
        merged(pair_of((3, 2)), "linear")
    with pytest.raises(
        ConfigError,
        match=r"density: must be above 0 and at most 1 for ties, is None",
    ):
        merged(pair_of((3, 3)), "ties")
    with pytest.raises(ConfigError, match="rng: dare_ties drops entries at random; pass a key"):
        merged(pair_of((3, 3)), "dare_ties", density=0.5)
    with pytest.raises(ConfigError, match="how: must be one of linear, cat"):
        merged(pair_of((3, 3)), "mean")


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.representatives("scanned")
def test_a_cat_merge_of_a_model_computes_the_weighted_sum_of_the_updates(scan: bool) -> None:
    _, base = load("llama", scan_layers=scan)
    given = adapters(base, (2, 3))
    method, tree = jaxpeft.merge_adapters(given, [0.5, -2.0], "cat")
    folded = jaxpeft.merge(method, tree)
    for path in (("self_attn", "q_proj"), ("mlp", "down_proj")):
        where = ("model", "layers", *(() if scan else ("0",)), *path)
        kernels = [_kernel(jaxpeft.merge(m, p), where) - _kernel(base, where) for m, p in given]
        np.testing.assert_allclose(
            _kernel(folded, where) - _kernel(base, where),
            0.5 * kernels[0] - 2.0 * kernels[1],
            atol=1e-5,
        )


def _kernel(tree: Any, where: Any) -> Any:
    for key in where:
        tree = tree[key]
    return np.asarray(tree["kernel"])
