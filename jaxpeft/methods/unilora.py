r"""Uni-LoRA: all entries of LoRA's matrices are entries of one short trained vector.

    y = x W + (D(x) A) B,    A_ij = v[a_ij] / sqrt(n[a_ij]),    B_ij = v[b_ij] / sqrt(n[b_ij])

`v: [d]` stands at the root of the tree. The places `a [in, r]` and `b [r, out]` of all sites
together are a random order in which every entry of `v` occurs equally often, up to one; `n` is how
often. So the map from `v` to all matrices preserves lengths. A fresh adapter changes the outputs a
little: with a vector of zeros, neither `A` nor `B` would have a gradient. `D` is dropout.

PEFT may leave the places out of a file and draw them again, in the order of torch's modules, which
a tree of parameters does not have. Here they are always written out, and a file without them is
refused.

Li et al. 2025, "Uni-LoRA: One Vector is All You Need" (arXiv:2506.00799).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from jaxpeft.core.method import Call, Kernel, Leaves
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec, LowRank, SiteSpec
from jaxpeft.core.targets import Site
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods.biases import Biased, bias_option
from jaxpeft.methods.dropping import drop_input
from jaxpeft.methods.low_rank import low_rank, product
from jaxpeft.methods.targeted import TargetedFormat

if TYPE_CHECKING:
    from jax import Array

_TENSORS = {
    f"unilora_{kind}_{key}": f"unilora_{kind}_{key.upper()}"
    for kind in ("indices", "scales")
    for key in ("a", "b")
}
Places = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class UniLoRAFormat(TargetedFormat["UniLoRA"]):
    """The file format of `UniLoRA` adapters."""

    def write_options(self, method: UniLoRA) -> dict[str, Any]:
        """Return the options; the places are always in the file."""
        return super().write_options(method) | {"save_indices": True}

    def read_options(
        self, kind: type[UniLoRA], config: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Read the options; a file without its places is an error."""
        values, problems = super().read_options(kind, config)
        if not config.get("save_indices"):
            problems.append(
                "save_indices: is false, so the file does not say where entries of the vector are,"
                " and drawing them again needs torch's modules; save the adapter in PEFT with"
                " save_indices=True"
            )
        return values, problems

    def wrong_numbers(self, method: UniLoRA, site: Site, tensors: Leaves) -> list[str]:
        """List places outside of the vector, or not integers."""
        found: list[str] = []
        for name in ("unilora_indices_A", "unilora_indices_B"):
            places = np.asarray(tensors[name])
            if np.any((places < 0) | (places >= method.length) | (places != np.floor(places))):
                found.append(f"{name}: has places outside of the vector, of length {method.length}")
        return found


@dataclass(frozen=True, kw_only=True)
class UniLoRA(Biased):
    """Low-rank updates of linear sites out of one vector.

    Leaves of a site: `unilora_indices_a [in, r]`, `unilora_indices_b [r, out]`, int32;
    `unilora_scales_a`, `unilora_scales_b` likewise, float32; `unilora_dropout []` where the rate is
    not zero; none of them trained. At the root: `unilora_theta [d]`, float32, trained.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "unilora"
    paper: ClassVar[str] = "arXiv:2506.00799"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=(*_TENSORS, "unilora_dropout"),
        root=("unilora_theta",),
        trained=frozenset({"unilora_theta"}),
    )
    sites: ClassVar[SiteSpec] = SiteSpec(
        update=lambda shape, leaves: LowRank(*_matrices(leaves), 1.0)
    )
    peft: ClassVar[PeftFormat[Any]] = UniLoRAFormat(
        tensors=_TENSORS,
        root_tensors={"unilora_theta": "base_model.unilora_theta_d"},
        type="UNILORA",
        options={
            "target_modules": "targets",
            "layers_to_transform": "layers_to_transform",
            "layers_pattern": "layers_pattern",
            "r": "rank",
            "theta_d_length": "length",
            "proj_seed": "projection_seed",
            "unilora_dropout": "dropout",
            "bias": "bias",
        },
        required=("r", "theta_d_length"),
        ignored=frozenset({"save_indices", "init_weights", "init_theta_d_bound"}),
    )

    rank: int = option(4, "rank r of the updates", at_least=1)
    length: int = option(256, "length d of the trained vector", at_least=1)
    projection_seed: int = option(
        42, "seed for drawing where its entries are", at_least=0, below=2**32
    )
    bound: float = option(0.02, "bound of its uniform initialization", above=0)
    dropout: float = option(0.0, "rate of dropout on the input of A", at_least=0, below=1)
    bias: Literal["none", "all", "unilora_only"] = bias_option()

    @property
    def fresh_is_base(self) -> bool:
        """Whether a fresh adapter leaves every output bit-identical."""
        return False

    def over(self, sites: tuple[Site, ...]) -> UniLoRA:
        """Return the method with the sites among which it distributes the vector."""
        options = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        return _Distributed(**options, among=tuple(sorted(sites, key=lambda site: site.name)))

    def init(self, site: Site, kernel: Kernel, rng: Array) -> dict[str, Array]:
        """Draw where the entries of the vector are, and scale them by how often they occur."""
        del kernel, rng
        return self._leaves(site, (site,))

    def _leaves(self, site: Site, among: tuple[Site, ...]) -> dict[str, Array]:
        sizes = [self.rank * sum(each.shape) for each in among]
        places, scales = _distribute(sum(sizes), self.length, self.projection_seed)
        begin = sum(sizes[: [each.name for each in among].index(site.name)])
        (n_in, n_out), rank = site.shape, self.rank
        middle, end = begin + n_in * rank, begin + (n_in + n_out) * rank
        own = {
            "a": places[begin:middle].reshape(n_in, rank),
            "b": places[middle:end].reshape(rank, n_out),
        }
        leaves = {
            **{f"unilora_indices_{key}": jnp.asarray(own[key], jnp.int32) for key in own},
            **{f"unilora_scales_{key}": jnp.asarray(scales[own[key]], jnp.float32) for key in own},
        }
        return leaves | (
            {"unilora_dropout": jnp.asarray(self.dropout, jnp.float32)} if self.dropout else {}
        )

    def init_root(self, params: Leaves, sites: tuple[Site, ...], rng: Array) -> dict[str, Array]:
        """Initialize the vector to uniform values."""
        del params, sites
        drawn = jax.random.uniform(rng, (self.length,), jnp.float32, -self.bound, self.bound)
        return {"unilora_theta": drawn}

    @staticmethod
    def compute(call: Call) -> Any:
        """Compute `x W + (D(x) A) B`, `[..., in] -> [..., out]`, in the dtype of `x W`."""
        y = call.base(*call.args)
        x = drop_input(call, call.x.astype(y.dtype), "unilora_dropout")
        return y + call.each(lambda leaves, x: low_rank(x, *_matrices(leaves)), x)

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Return `W + A B`."""
        return {"kernel": base["kernel"] + product(*_matrices(leaves))}


@dataclass(frozen=True, kw_only=True)
class _Distributed(UniLoRA):
    """The method with its sites, in the order in which the vector is distributed."""

    among: tuple[Site, ...]

    def init(self, site: Site, kernel: Kernel, rng: Array) -> dict[str, Array]:
        """Draw as if all sites were drawn together."""
        del kernel, rng
        return self._leaves(site, self.among)


@functools.lru_cache(maxsize=4)
def _distribute(count: int, length: int, seed: int) -> tuple[Places, np.ndarray[Any, Any]]:
    """Return the entry of the vector at each of `count` places, `[count]`, and `1 / sqrt(n)` of
    each entry, `[length]`.
    """
    rng = np.random.default_rng(seed)
    extra = rng.choice(length, count % length, replace=False)
    places = np.concatenate([np.tile(np.arange(length), count // length), extra])
    rng.shuffle(places)
    return places, np.maximum(np.bincount(places, minlength=length), 1) ** -0.5


def _matrices(leaves: Leaves) -> tuple[Any, Any]:
    """Return A `[in, r]` and B `[r, out]`."""
    a, b = (
        leaves["unilora_theta"][leaves[f"unilora_indices_{key}"]] * leaves[f"unilora_scales_{key}"]
        for key in ("a", "b")
    )
    return a, b
