"""LoftQ: A and B are initialized to the best low-rank approximation of the quantization error.

    s A B = the r largest singular triples of W - Q

`W` is the kernel in the model's files and `Q` the dequantized kernel of the base. This is one round
of the paper's alternation, which does not change `Q`. The kernels are read from the files one by
one; a site whose kernel is not quantized is initialized as in LoRA.

Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", section 3.2,
algorithm 1 with T = 1 (arXiv:2310.08659).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpeft.core.method import Leaves, Method
from jaxpeft.errors import ConfigError
from jaxpeft.lazy import jnp
from jaxpeft.methods import starts

if TYPE_CHECKING:
    from jaxpeft.methods.lora import LoRA


def start(method: LoRA, params: Leaves, run: Any) -> tuple[Method, Leaves]:
    """Initialize A and B from the quantization error.

    Args:
        method: LoRA with `init_weights="loftq"`.
        params: the quantized base, rewritten with it.
        run: model and base: a `jaxpeft.train.data_start.Start`.

    Returns:
        `(method, params)`: a plain LoRA, and the tree with these A and B.

    Raises:
        ConfigError: No adapted kernel is quantized, or the model has no files.
    """
    from jaxpeft import kernels
    from jaxpeft.core import paths
    from jaxpeft.core.rewriting import chosen_sites, kernel_of

    original = run.original_kernels()
    names = (method.leaves.site[0], method.leaves.site[1])
    made: dict[Any, Any] = {}
    for site, on in chosen_sites(method, params).items():
        node = paths.get(params, site.path)
        if not kernels.is_quantized(node):
            continue
        a, b = (np.array(node[name]) for name in names)
        for i, name in enumerate(site.names):
            if not on[i]:
                continue
            error = original(site, i) - kernel_of(site, node, i)
            own_a, own_b = starts.largest_triples(
                error, method.site_rank(name), method.site_scale(name)
            )
            index = site.index(i)
            a[*index, :, : own_a.shape[1]] = (
                own_a  # where the kernel has fewer, the other columns start as LoRA's do
            )
            b[*index, : own_b.shape[0]] = own_b
        made |= {
            (*site.path, name): jnp.asarray(leaf) for name, leaf in zip(names, (a, b), strict=True)
        }
    if not made:
        raise ConfigError(
            "method.init_weights: 'loftq' needs a quantized base, but no adapted kernel is"
            " quantized; choose another initialization"
        )
    tree = paths.map_with_path(made.get, params)
    return dataclasses.replace(method, init_weights="default"), tree
