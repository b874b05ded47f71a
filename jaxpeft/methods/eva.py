"""EVA: A begins in the directions in which a site's inputs vary most, and ranks go where they explain most.

For each site the inputs `X [tokens, in]` of the first batches are reduced to their leading right singular vectors, a batch
merged into those before it (Ross et al. 2008, incremental SVD). `A` takes the first of them; `B` stays zero. With `eva_rho`
above 1 the total rank, that of `rank` at every site, is given to the sites by the share of variance that a direction
explains, `eva_rho * rank` at most to one; the scaling of each site stays what it was.

Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation", section 3 and
algorithm 1 (arXiv:2410.07170).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpeft.core.method import Leaves, Method

if TYPE_CHECKING:
    from jaxpeft.methods.lora import LoRA

Array = np.ndarray[Any, Any]


def start(method: LoRA, params: Leaves, run: Any) -> tuple[Method, Leaves]:
    """Gives the sites their ranks and A its directions.

    Args:
        method: LoRA with `init_weights="eva"`.
        params: the base, rewritten with it.
        run: model, batches and seed: a `jaxpeft.training.start.Start`.

    Returns:
        `(method, params)`: a LoRA with these ranks, and the tree with these A.
    """
    from jaxpeft.core import paths
    from jaxpeft.core.rewriting import chosen_sites

    most = max(1, round(method.eva_rho * method.rank))
    found: dict[str, tuple[Array, Array]] = {}
    for inputs in run.inputs_of_sites(params, method, method.eva_batches):
        for name, rows in inputs.items():
            found[name] = _merged(found.get(name), rows, most)
    ranks = _ranks({name: share for name, (share, _) in found.items()}, method.rank * len(found), most)
    kept = {name: rank for name, rank in ranks.items() if rank}
    alphas = {name: method.site_scale(name) * (rank**0.5 if method.rslora else rank) for name, rank in kept.items()}
    rank_of = {_whole(name): rank for name, rank in kept.items()}
    alpha_of = {_whole(name): alpha for name, alpha in alphas.items()}
    made = dataclasses.replace(
        method, targets=tuple(kept), exclude=(), layers_to_transform=None, layers_pattern=(), init_weights="default",
        rank_pattern=rank_of, alpha_pattern=alpha_of, eva_batches=8, eva_rho=2.0,
    )  # fmt: skip
    rewritten = run.rewrite(made)
    for site, on in chosen_sites(made, rewritten).items():
        node = paths.get(rewritten, site.path)
        a = np.array(node["lora_a"])
        for i, name in enumerate(site.names):
            if on[i]:
                where = np.unravel_index(i, site.layers) if site.layers else ()
                a[(*where, slice(None), slice(0, kept[name]))] = found[name][1][: kept[name]].T
        node["lora_a"] = run.place(a)
    return made, rewritten


def _merged(before: tuple[Array, Array] | None, rows: Array, most: int) -> tuple[Array, Array]:
    """Gives the variances and directions `[k, in]` of the rows so far.

    Args:
        before: `(variances, directions)` of the rows before.
        rows: `[tokens, in]` float32.
        most: how many directions are kept.
    """
    stacked = rows if before is None else np.concatenate([np.sqrt(before[0])[:, None] * before[1], rows])
    _, values, directions = np.linalg.svd(stacked, full_matrices=False)
    return values[:most] ** 2, directions[:most]


def _ranks(variances: Mapping[str, Array], total: int, most: int) -> dict[str, int]:
    """Gives each site its rank: the `total` directions that explain the largest share of their site's variance."""
    shares = [(float(v / values.sum()), name) for name, values in variances.items() for v in values[:most]]
    chosen = sorted(shares, key=lambda pair: -pair[0])[:total]
    return {name: sum(1 for _, other in chosen if other == name) for name in variances}


def _whole(name: str) -> str:
    return "^" + name.replace(".", r"\.")
