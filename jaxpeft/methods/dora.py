r"""DoRA: the magnitude and the direction of a kernel's columns are trained separately.

    y = m / n (x W + s (x A) B),    n = ||W + s A B||,    A: [in, r],  B: [r, out],  m, n: [out]

The norm is that of each column, and a constant to the gradient (section 4.3). `m` begins as
`n0 = ||W||` and `B` at zero, so `m / n` is one. With dropout, `D(x)` stands in place of `x`
everywhere but in the base's own product, as in PEFT:

    y = x W + (m / n - 1) D(x) W + m / n s (D(x) A) B

`n` is computed without the matrix `W + s A B`, which for one site is as large as its kernel:

    n = n0 + e / (n0 + sqrt(n0^2 + e)),    e = n^2 - n0^2 = sum over r of C (2 A'W + A'A C),
        C = s B

so that it is `n0` bit by bit where `B` is zero, and a fresh adapter does not change any output.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", sections 4.1 to 4.3
(arXiv:2402.09353).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from jaxpeft.core.method import Call, Kernel, Leaves
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec, LowRank, SiteSpec
from jaxpeft.core.targets import Site
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods.dropping import drop_input
from jaxpeft.methods.lora import LoRA, LoRAFormat, low_rank_update, update
from jaxpeft.methods.low_rank import product


@dataclass(frozen=True)
class DoRAFormat(LoRAFormat["DoRA"]):
    """The file format of `DoRA` adapters."""

    def pack(self, method: DoRA, site: Site, leaves: Leaves) -> dict[str, Any]:
        """Return LoRA's tensors and the magnitude."""
        return super().pack(method, site, _lora(leaves)) | {
            "lora_magnitude_vector": leaves["dora_magnitude"]
        }

    def unpack(self, method: DoRA, site: Site, tensors: Leaves, fresh: Leaves) -> dict[str, Any]:
        """Return LoRA's leaves and the magnitude."""
        leaves = super().unpack(method, site, tensors, _lora(fresh))
        return _dora(leaves) | {"dora_magnitude": tensors["lora_magnitude_vector"]}

    def write_options(self, method: DoRA) -> dict[str, Any]:
        """Return LoRA's options, and the one that makes it this method."""
        return super().write_options(method) | {"use_dora": True}

    def reads(self, kind: type[DoRA], config: Mapping[str, Any]) -> bool:
        """Return whether an `adapter_config.json` is of a LoRA with `use_dora`."""
        return str(config.get("peft_type")) == self.type and bool(config.get("use_dora"))

    def read_options(
        self, kind: type[DoRA], config: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Read LoRA's options."""
        return super().read_options(
            kind, {key: value for key, value in config.items() if key != "use_dora"}
        )


def _low_rank_update(shape: tuple[int, int], leaves: Leaves) -> LowRank | None:
    """Return LoRA's update of a site, with the magnitude."""
    found = low_rank_update(shape, _lora(leaves))
    return found and dataclasses.replace(found, magnitude=leaves["dora_magnitude"])


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation of linear sites and embeddings.

    Leaves of a site: those of LoRA under this name, without `dora_bias`; `dora_magnitude [out]`,
    trained; `dora_norm [out]`, the norm of the kernel's columns, not trained. All float32.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "dora"
    paper: ClassVar[str] = "arXiv:2402.09353"
    # the update is scaled together with the kernel
    sites: ClassVar[SiteSpec] = dataclasses.replace(
        LoRA.sites, low_rank=SiteSpec().low_rank, update=_low_rank_update
    )
    leaves: ClassVar[LeafSpec] = dataclasses.replace(
        LoRA.leaves,
        site=(
            "dora_a",
            "dora_b",
            "dora_magnitude",
            "dora_scale",
            "dora_dropout",
            "dora_norm",
            "dora_a0",
            "dora_b0",
        ),
        trained=frozenset({"dora_a", "dora_b", "dora_magnitude"}),
        zero_is_base=False,
    )
    peft: ClassVar[PeftFormat[Any]] = LoRA.peft.replace(
        DoRAFormat,
    )

    def problems(self) -> list[str]:
        """List incompatible options."""
        found = super().problems()
        if self.lora_bias:
            found.append("lora_bias: is not supported by DoRA; remove it")
        if self.init_weights == "loftq":
            found.append(
                "init_weights: 'loftq' would not match the kernels' magnitudes; choose another"
                " initialization"
            )
        return found

    def init(self, site: Site, kernel: Kernel, rng: jax.Array) -> dict[str, jax.Array]:
        """Initialize A and B as in LoRA, and the magnitude to that of the kernel."""
        norm = _norm(kernel())
        return _dora(super().init(site, kernel, rng)) | {"dora_magnitude": norm, "dora_norm": norm}

    @staticmethod
    def compute(call: Call) -> Any:
        """Compute `x W + (m / n - 1) D(x) W + m / n s (D(x) A) B`, `[..., in] -> [..., out]`, in
        the dtype of `x W`.
        """
        y = call.base(*call.args)
        if jnp.issubdtype(call.x.dtype, jnp.integer):
            return call.each(partial(_scale, call.kernel), call.x, y, y)
        x = call.x.astype(y.dtype)
        plain = y
        if "dora_dropout" in call.leaves and call.dropout_key is not None:
            x = drop_input(call, x, "dora_dropout")
            plain = call.base(x)
        if call.bias is not None:
            plain = plain - call.bias.astype(y.dtype)
        return call.each(partial(_scale, call.kernel), x, y, plain)

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Return `m / n (W + s A B)`."""
        whole = LoRA.fold(_lora(leaves), base)["kernel"]
        alone = whole - base["kernel"] + base["original"] if "original" in base else whole
        return {"kernel": leaves["dora_magnitude"] / _positive(_norm(alone)) * whole}


def _scale(kernel: Kernel, leaves: Leaves, x: Any, y: Any, plain: Any) -> Any:
    """Return `y + f plain + (1 + f) s (x A) B`, `f = (m - n) / n`, in the dtype of `y`
    `[..., out]`.
    """
    norm = _column_norms(jax.lax.stop_gradient(dict(leaves)), kernel())
    f = ((leaves["dora_magnitude"] - norm) / norm).astype(y.dtype)
    return y + f * plain + (1 + f) * update(_lora(leaves), x).astype(y.dtype)


def _column_norms(leaves: Leaves, kernel: Any) -> Any:
    """Return n `[out]` from the kernel `[in, out]` and its norm n0."""
    a, b, before = leaves["dora_a"], leaves["dora_scale"] * leaves["dora_b"], leaves["dora_norm"]
    if "dora_a0" in leaves:
        a = jnp.concatenate([a, leaves["dora_a0"]], axis=1)
        b = jnp.concatenate([b, -leaves["dora_scale"] * leaves["dora_b0"]])
    more = jnp.sum(b * (2 * product(a.T, kernel) + product(product(a.T, a), b)), axis=0)
    after = jnp.sqrt(jnp.maximum(before * before + more, 0))
    return _positive(before + more / _positive(before + after))


def _norm(kernel: Any) -> Any:
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=0))


def _positive(norm: Any) -> Any:
    """Replace zeros by one: a column of zeros, or padding, has no direction."""
    return jnp.where(norm > 0, norm, jnp.ones_like(norm))


def _lora(leaves: Leaves) -> dict[str, Any]:
    return {key.replace("dora_", "lora_", 1): leaf for key, leaf in leaves.items()}


def _dora(leaves: Leaves) -> dict[str, Any]:
    return {key.replace("lora_", "dora_", 1): leaf for key, leaf in leaves.items()}
