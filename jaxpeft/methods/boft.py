r"""BOFT: the input of a frozen kernel is rotated by a product of sparse rotations, the outputs are
rescaled.

    y = ((x R) W) * s + b,    R = Bm ... B1,    Bi = Pi diag(Ri1, ..., Rid) Pi',
        Rij: [k, k] orthogonal,    in = d k

A factor rotates blocks of `k` inputs that a permutation `Pi` brings together, in factor i out of
`2^(i-1) k` neighbors (the butterfly): with m factors an output depends on `2^(m-1) k` inputs, at
`m k in` numbers. One factor is OFT with scales. A block is the Cayley transform of the
skew-symmetric part of a trained matrix. Matrices start at zero and `s` at one, so a fresh adapter
does not change any output.

Liu et al. 2023, "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", section 4
(arXiv:2311.06243). PEFT computes more than one factor with its CUDA extension only; here all are
plain products.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from jaxpeft.core.method import Call, Kernel, Leaves
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec
from jaxpeft.core.targets import Site
from jaxpeft.errors import ConfigError
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods import dropping, rotations
from jaxpeft.methods.biases import Biased, bias_option
from jaxpeft.methods.targeted import TARGET_OPTIONS, TargetedFormat

if TYPE_CHECKING:
    from jax import Array

_SIZE = 4


@dataclass(frozen=True)
class BOFTFormat(TargetedFormat["BOFT"]):
    """The file format of `BOFT` adapters."""

    def write_options(self, method: BOFT) -> dict[str, Any]:
        """Return the options; PEFT writes 0 for either the size or the number of blocks."""
        size = 0 if method.blocks else method.block_size or _SIZE
        return super().write_options(method) | {
            "boft_block_size": size,
            "boft_block_num": method.blocks or 0,
        }

    def read_options(
        self, kind: type[BOFT], config: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Read BOFT's options."""
        values, problems = super().read_options(kind, config)
        return {
            key: value
            for key, value in values.items()
            if value or key not in ("blocks", "block_size")
        }, problems

    def fit(self, method: BOFT, shapes: Mapping[str, tuple[int, ...]]) -> BOFT:
        """Return BOFT with one factor if the file has one.

        PEFT without its CUDA extension uses one factor whatever the option says.
        """
        factors = {shape[0] for name, shape in shapes.items() if name.endswith(".boft_R") and shape}
        return dataclasses.replace(method, factors=1) if factors == {1} else method


@dataclass(frozen=True, kw_only=True)
class BOFT(Biased):
    """Butterfly orthogonal fine-tuning of linear sites.

    Leaves of a site: `boft_r [m, d, k, k]` and `boft_s [1, out]`, trained; `boft_dropout []` where
    the rate is not zero, not trained. All float32.

    Raises:
        ConfigError: An option is out of range, options are incompatible, or blocks do not divide
            a site's inputs.
    """

    name: ClassVar[str] = "boft"
    paper: ClassVar[str] = "arXiv:2311.06243"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=("boft_r", "boft_s", "boft_dropout"),
        trained=frozenset({"boft_r", "boft_s"}),
        zero_is_base=False,
    )
    peft: ClassVar[PeftFormat[Any]] = BOFTFormat(
        tensors={"boft_r": "boft_R", "boft_s": "boft_s"},
        type="BOFT",
        options={
            **TARGET_OPTIONS,
            "boft_block_size": "block_size",
            "boft_block_num": "blocks",
            "boft_n_butterfly_factor": "factors",
            "boft_dropout": "dropout",
            "bias": "bias",
        },
        required=("boft_block_size", "boft_block_num"),
        ignored=frozenset({"init_weights", "fan_in_fan_out"}),
    )

    block_size: int | None = option(
        None, f"size k of the blocks; None for {_SIZE}, or as implied by blocks", at_least=2
    )
    blocks: int | None = option(None, "number d of blocks, instead of block_size", at_least=1)
    factors: int = option(1, "number m of butterfly factors", at_least=1)
    dropout: float = option(
        0.0,
        "probability that a block of a randomly chosen factor is not rotated",
        at_least=0,
        below=1,
    )
    bias: Literal["none", "all", "boft_only"] = bias_option()

    def problems(self) -> list[str]:
        """List incompatible options."""
        both = self.blocks is not None and self.block_size is not None
        return super().problems() + (
            ["blocks: replaces block_size; remove one of them"] if both else []
        )

    def site_blocks(self, site: Site) -> tuple[int, int]:
        """Return the number and the size of the blocks at a site.

        Raises:
            ConfigError: They do not divide its inputs as required by the factors.
        """
        n_in, size = site.shape[0], self.block_size or _SIZE
        count, over = (
            (self.blocks, n_in % self.blocks) if self.blocks else (n_in // size, n_in % size)
        )
        spread = 2 ** (self.factors - 1)
        if over or not count or count % spread or (self.factors > 1 and (n_in // count) % 2):
            blocks = f"{self.blocks} blocks" if self.blocks else f"blocks of {size}"
            even = (
                f" of even size, {spread} or a multiple of them, for {self.factors} factors"
                if self.factors > 1
                else ""
            )
            raise ConfigError(
                f"boft: the {n_in} inputs of {site.name} do not split into {blocks}{even}"
            )
        return count, n_in // count

    def init(self, site: Site, kernel: Kernel, rng: Array) -> dict[str, Array]:
        """Initialize the matrices to zeros and the scales to ones."""
        del kernel, rng
        count, size = self.site_blocks(site)
        leaves = {
            "boft_r": jnp.zeros((self.factors, count, size, size), jnp.float32),
            "boft_s": jnp.ones((1, site.shape[1]), jnp.float32),
        }
        return leaves | (
            {"boft_dropout": jnp.asarray(self.dropout, jnp.float32)} if self.dropout else {}
        )

    @staticmethod
    def compute(call: Call) -> Any:
        """Compute `((x R) W) * s + b`, `[..., in] -> [..., out]`; dropout skips blocks of one
        factor.
        """
        drawn, stay = dropping.rate(call, "boft_dropout"), None
        if drawn is not None:
            factors, count = call.leaves["boft_r"].shape[-4:-2]
            which, blocks = jax.random.split(drawn[0])
            chosen = jnp.arange(factors)[:, None] == jax.random.randint(which, (), 0, factors)
            stay = 1.0 - (chosen & jax.random.bernoulli(blocks, drawn[1], (factors, count))).astype(
                jnp.float32
            )
        y = rotations.compute_with_input(call, partial(_rotate, stay=stay))
        return call.each(partial(_rescale, bias=call.bias), y)

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Return `(R W) * s`; the bias stays as it is."""
        kernel = base["kernel"]
        for difference, there, back in _factors(leaves):
            kernel = rotations.rotate_kernel(kernel[there], difference)[back]
        return {"kernel": kernel * leaves["boft_s"]}


def _rotate(leaves: Leaves, x: Any, stay: Any) -> Any:
    """Return `x R`; blocks where `stay`, `[m, d]`, is zero are the identity."""
    for i, (difference, there, back) in reversed(list(enumerate(_factors(leaves)))):
        kept = difference if stay is None else difference * stay[i][:, None, None]
        x = rotations.rotate(x[..., there], kept)[..., back]
    return x


def _rescale(leaves: Leaves, y: Any, bias: Any) -> Any:
    """Return `(y - b) * s + b`, which is bit-identical to `y` where `s` is one."""
    scale = leaves["boft_s"][0]
    out = y * scale.astype(y.dtype)
    return out if bias is None else out + (bias.astype(jnp.float32) * (1.0 - scale)).astype(y.dtype)


def _factors(leaves: Leaves) -> list[tuple[Any, Any, Any]]:
    """Return `R - I` of the blocks of each factor, `[d, k, k]`, and the permutation of the inputs
    and its inverse, `[in]`.
    """
    matrices = leaves["boft_r"]
    _, count, size, _ = matrices.shape
    differences = rotations.cayley(0.5 * (matrices - jnp.swapaxes(matrices, -1, -2)))
    orders = [
        _butterfly(count * size, size << i, size // 2 if i else size << i)
        for i in range(len(matrices))
    ]
    return [
        (difference, np.argsort(order), order)
        for difference, order in zip(differences, orders, strict=True)
    ]


def _butterfly(n: int, width: int, piece: int) -> Any:
    """Return the order of `n` inputs that, in each stretch of `width`, puts even pieces before odd
    ones.
    """
    pieces = np.arange(n).reshape(-1, width // piece, piece)
    return np.concatenate([pieces[:, 0::2], pieces[:, 1::2]], axis=1).reshape(-1)
