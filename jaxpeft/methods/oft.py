r"""OFT: the input of a frozen kernel is rotated block by block, which preserves the angles between
its columns.

    y = (x R) W + b,    R = diag(R1, ..., Rb),    Ri: [k, k] orthogonal,  in = b k

A block is the Cayley transform of a skew-symmetric matrix `S`, of which the numbers above the
diagonal are trained: `R = (I - S) (I + S)^-1`, or, much cheaper and nearly orthogonal, some terms
of the Neumann series of its inverse (as in PEFT):

    R = I + 2 S + 2 S^2 + ... + 2 S^(n-2) + S^(n-1),    n = neumann_terms

With `eps` (COFT) each `S` is kept within a ball about zero, of radius `eps / sqrt(b)` in Frobenius
norm. `S` starts at zero, so a fresh adapter does not change any output.

Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", section 3
(arXiv:2306.07280); on the input's side and with the Neumann series, Qiu et al. 2025, "Orthogonal
Finetuning Made Scalable" (arXiv:2506.19847).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

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

_SIZE, _TERMS, _TINY = 32, 5, 1e-30


@dataclass(frozen=True)
class OFTFormat(TargetedFormat["OFT"]):
    """The file format of `OFT` adapters."""

    def write_options(self, method: OFT) -> dict[str, Any]:
        """Return the options; the version marks the Neumann series of PEFT since 0.18."""
        size = 0 if method.blocks else method.block_size or _SIZE
        own = {
            "r": method.blocks or 0,
            "oft_block_size": size,
            "peft_version": "0.18.0",
            "coft": method.eps is not None,
        }
        own |= {
            "use_cayley_neumann": method.neumann_terms > 0,
            "num_cayley_neumann_terms": method.neumann_terms or _TERMS,
        }
        return (
            super().write_options(method)
            | own
            | ({} if method.eps is None else {"eps": method.eps})
        )

    def read_options(
        self, kind: type[OFT], config: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Read OFT's options; the different Neumann series before PEFT 0.18 is an error."""
        values, problems = super().read_options(kind, config)
        values = {
            key: value
            for key, value in values.items()
            if value or key not in ("blocks", "block_size")
        }
        series = bool(config.get("use_cayley_neumann"))
        values["neumann_terms"] = config.get("num_cayley_neumann_terms", _TERMS) if series else 0
        if config.get("coft"):
            values["eps"] = config.get("eps", 6e-5)
        version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version")))
        if series and (version is None or (int(version[1]), int(version[2])) < (0, 18)):
            problems.append(
                f"use_cayley_neumann: peft_version is {config.get('peft_version')!r}, but the"
                " series was different before PEFT 0.18; train the adapter again, or merge it in"
                " that version"
            )
        return values, problems


@dataclass(frozen=True, kw_only=True)
class OFT(Biased):
    """Orthogonal fine-tuning of linear sites.

    A size or number of blocks that does not divide `in` gives way to the nearest that does, as in
    PEFT.

    Leaves of a site: `oft_r [b, k (k - 1) / 2]`, or `[1, ...]` where blocks share, trained;
    `oft_terms [n]` of the Neumann series, `oft_eps []` and `oft_dropout []` where they are asked
    for, not trained. All float32.

    Raises:
        ConfigError: An option is out of range, options are incompatible, or blocks would be of
            one element.
    """

    name: ClassVar[str] = "oft"
    paper: ClassVar[str] = "arXiv:2306.07280"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=("oft_r", "oft_terms", "oft_eps", "oft_dropout"),
        trained=frozenset({"oft_r"}),
        # zeros compute the base, but would not stay zero in training
        zero_is_base=False,
    )
    peft: ClassVar[PeftFormat[Any]] = OFTFormat(
        tensors={"oft_r": "oft_R.weight"},
        untransposed=frozenset({"oft_r"}),
        type="OFT",
        options={
            **TARGET_OPTIONS,
            "r": "blocks",
            "oft_block_size": "block_size",
            "block_share": "block_share",
            "module_dropout": "dropout",
            "bias": "bias",
        },
        required=("r", "oft_block_size", "use_cayley_neumann"),
        ignored=frozenset(
            {
                "init_weights",
                "fan_in_fan_out",
                "peft_version",
                "use_cayley_neumann",
                "num_cayley_neumann_terms",
                "coft",
                "eps",
            }
        ),
    )

    block_size: int | None = option(
        None, f"size k of the blocks; None for {_SIZE}, or as implied by blocks", at_least=2
    )
    blocks: int | None = option(None, "number b of blocks, instead of block_size", at_least=1)
    block_share: bool = option(False, "use the same rotation for all blocks of a site")
    neumann_terms: int = option(
        _TERMS,
        "terms n of the Neumann series; 0 for the exact Cayley transform",
        at_least=0,
        at_most=1000,
    )
    eps: float | None = option(
        None, "bound of COFT on the norm of S, times sqrt(b); None for no bound", above=0
    )
    dropout: float = option(0.0, "probability that a block is not rotated", at_least=0, below=1)
    bias: Literal["none", "all", "oft_only"] = bias_option()

    def problems(self) -> list[str]:
        """List incompatible options."""
        found = super().problems()
        if self.blocks is not None and self.block_size is not None:
            found.append("blocks: replaces block_size; remove one of them")
        if self.neumann_terms == 1:
            found.append(
                "neumann_terms: one term is the identity, which has no effect; set at least 2, or 0"
            )
        return found

    def site_block_size(self, site: Site) -> int:
        """Return the size of the blocks at a site.

        Raises:
            ConfigError: The size would be 1, which has no rotation.
        """
        n_in = site.shape[0]
        if self.blocks is None:
            size = rotations.nearest_divisor(n_in, self.block_size or _SIZE)
        else:
            size = n_in // rotations.nearest_divisor(n_in, self.blocks)
        if size == 1:
            raise ConfigError(
                f"oft: {site.name} has {n_in} inputs, so the blocks would have size 1; choose other"
                " blocks"
            )
        return size

    def init(self, site: Site, kernel: Kernel, rng: Array) -> dict[str, Array]:
        """Initialize `S` to zeros."""
        del kernel, rng
        size = self.site_block_size(site)
        count = 1 if self.block_share else site.shape[0] // size
        leaves = {"oft_r": jnp.zeros((count, size * (size - 1) // 2), jnp.float32)}
        if self.neumann_terms:
            # PEFT uses four terms for three
            ends = (
                [2.0]
                if self.neumann_terms == 2
                else [2.0] * (max(self.neumann_terms, 4) - 2) + [1.0]
            )
            leaves["oft_terms"] = jnp.asarray(ends, jnp.float32)
        if self.eps is not None:
            leaves["oft_eps"] = jnp.asarray(self.eps, jnp.float32)
        if self.dropout:
            leaves["oft_dropout"] = jnp.asarray(self.dropout, jnp.float32)
        return leaves

    @staticmethod
    def compute(call: Call) -> Any:
        """Compute `(x R) W + b`, `[..., in] -> [..., out]`; dropout skips entire blocks."""
        drawn, stay = dropping.rate(call, "oft_dropout"), None
        if drawn is not None:
            size = _size(call.leaves["oft_r"].shape[-1])
            stay = jax.random.bernoulli(
                drawn[0], 1 - drawn[1], (call.x.shape[-1] // size, 1, 1)
            ).astype(jnp.float32)
        return rotations.compute_with_input(call, partial(_rotate, stay=stay))

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Return `R W`."""
        return {"kernel": rotations.rotate_kernel(base["kernel"], _difference(leaves))}


def _rotate(leaves: Leaves, x: Any, stay: Any) -> Any:
    difference = _difference(leaves)
    return rotations.rotate(x, difference if stay is None else difference * stay)


def _difference(leaves: Leaves) -> Any:
    """Return `R - I` of each block, float32."""
    skew = _skew(
        _project(leaves["oft_r"], leaves["oft_eps"]) if "oft_eps" in leaves else leaves["oft_r"]
    )
    if "oft_terms" not in leaves:
        return rotations.cayley(skew)
    terms, total = leaves["oft_terms"], jnp.zeros_like(skew)
    for i in reversed(range(terms.shape[0])):
        total = terms[i] * skew + jnp.matmul(skew, total, precision="highest")
    return total


def _project(vectors: Any, eps: Any) -> Any:
    """Project each `S` onto the ball of COFT."""
    radius = eps / math.sqrt(vectors.shape[0])
    squares = 2.0 * jnp.sum(jnp.square(vectors), axis=1, keepdims=True)
    return vectors * radius / jnp.sqrt(jnp.maximum(jnp.maximum(squares, jnp.square(radius)), _TINY))


def _size(numbers: int) -> int:
    """Return the size of a block from the number of entries above its diagonal."""
    return (1 + math.isqrt(1 + 8 * numbers)) // 2


def _skew(vectors: Any) -> Any:
    """Build skew-symmetric matrices from the entries above the diagonal,
    `[b, k (k - 1) / 2] -> [b, k, k]`.
    """
    size = _size(vectors.shape[1])
    rows, columns = jnp.triu_indices(size, 1)
    upper = (
        jnp.zeros((vectors.shape[0], size, size), vectors.dtype).at[:, rows, columns].set(vectors)
    )
    return upper - jnp.swapaxes(upper, 1, 2)
