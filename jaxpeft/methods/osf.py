r"""OSF: the small singular values of a kernel and their vectors are trained, orthogonally to the
large ones.

    y = x W + ((x V) * s) U - ((x V0) * s0) U0,    W = V1 diag(s1) U1 + V0 diag(s0) U0,
        dV := (I - V1 V1') dV,    dU := dU (I - U1' U1),    V: [in, l],  s: [l],  U: [l, out]

`V1`, `s1` and `U1` are the `k` largest singular values and their vectors, which keep what the model
knows, and `l = min(in, out) - k`. `V`, `s` and `U` start at `V0`, `s0` and `U0`, so a fresh adapter
does not change any output. Their gradients `d` are projected, so that what is learned stays outside
of the subspaces of the large values.

The trained leaves are about as large as half of the kernel, and the frozen ones as large as its
whole decomposition, all float32: this is for kernels that fit several times into memory. Files
contain `V`, `s` and `U`. The others are computed from the base; the signs of singular vectors
do not matter for them.

Nayak et al. 2025, "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual
Learning" (arXiv:2504.07097).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from jaxpeft.core.method import Call, Kernel, Leaves
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec
from jaxpeft.core.targets import Site
from jaxpeft.errors import ConfigError
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods.low_rank import low_rank, product
from jaxpeft.methods.targeted import Targeted, TargetedFormat

if TYPE_CHECKING:
    from jax import Array

_TRAINED = ("osf_v", "osf_s", "osf_u")


@dataclass(frozen=True, kw_only=True)
class OSF(Targeted):
    """Trained small singular values and vectors of linear sites.

    Leaves of a site: `osf_v [in, l]`, `osf_s [l]`, `osf_u [l, out]`, trained; `osf_v0`, `osf_s0`,
    `osf_u0` likewise, where they begin, and `osf_v1 [in, k]`, `osf_u1 [k, out]`, the vectors of the
    large values, not trained. All float32.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "osf"
    paper: ClassVar[str] = "arXiv:2504.07097"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=(*_TRAINED, "osf_v0", "osf_s0", "osf_u0", "osf_v1", "osf_u1"),
        trained=frozenset(_TRAINED),
    )
    peft: ClassVar[PeftFormat[Any]] = TargetedFormat(
        tensors={
            "osf_v": "osf_svd_params.V_low",
            "osf_s": "osf_svd_params.S_low",
            "osf_u": "osf_svd_params.U_low",
        },
        type="OSF",
        options={"target_modules": "targets", "effective_rank": "kept_rank"},
        # PEFT ignores the last one
        ignored=frozenset({"init_weights", "target_svd_config"}),
    )

    kept_rank: int | float | None = option(
        None,
        "number k of singular values that are kept, or their share, up to 1, of the smaller size of"
        " a kernel; None for half of them",
        above=0,
    )

    def problems(self) -> list[str]:
        """List invalid options: a share is at most 1."""
        kept = self.kept_rank
        many = isinstance(kept, float) and kept > 1
        why = f"kept_rank: {kept} is a share above 1; use an integer for a number"
        return super().problems() + ([why] if many else [])

    def init(self, site: Site, kernel: Kernel, rng: Array) -> dict[str, Array]:
        """Split the kernel at the kept rank.

        Raises:
            ConfigError: All singular values of the site would be kept, or none.
        """
        del rng
        smaller, kept = min(site.shape), self.kept_rank
        count = smaller // 2 if kept is None else kept
        count = int(smaller * count) if isinstance(count, float) else count
        if not 0 < count < smaller:
            raise ConfigError(
                f"osf.kept_rank: would keep {count} of the {smaller} singular values of"
                f" {site.name}; keep at least one and train at least one, or exclude the site"
            )
        v, s, u = jnp.linalg.svd(kernel(), full_matrices=False)
        v0, s0, u0 = v[:, count:], s[count:], u[count:]
        return {
            **dict(zip(_TRAINED, (v0, s0, u0), strict=True)),
            "osf_v0": v0,
            "osf_s0": s0,
            "osf_u0": u0,
            "osf_v1": v[:, :count],
            "osf_u1": u[:count],
        }

    @staticmethod
    def compute(call: Call) -> Any:
        """Compute `x W` and the update, `[..., in] -> [..., out]`, in the dtype of `x W`."""
        y = call.base(*call.args)
        return y + call.each(_update, call.x.astype(y.dtype))

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Return `W + V diag(s) U - V0 diag(s0) U0`."""
        new, old = (
            product(leaves[f"osf_v{end}"] * leaves[f"osf_s{end}"], leaves[f"osf_u{end}"])
            for end in ("", "0")
        )
        return {"kernel": base["kernel"] + new - old}


def _update(leaves: Leaves, x: Any) -> Any:
    """Return `((x V) * s) U - ((x V0) * s0) U0`, `[..., in] -> [..., out]`, in the dtype of `x`."""
    v = _orthogonal(leaves["osf_v"].T, leaves["osf_v1"].T).T
    u = _orthogonal(leaves["osf_u"], leaves["osf_u1"])
    new = low_rank(x, v * leaves["osf_s"], u)
    return new - low_rank(x, leaves["osf_v0"] * leaves["osf_s0"], leaves["osf_u0"])


def _orthogonal(vectors: Any, kept: Any) -> Any:
    """Return vectors whose gradient is projected to be orthogonal to other vectors.

    Args:
        vectors: `[l, n]`.
        kept: `[k, n]`, orthonormal.
    """
    project = jax.custom_vjp(lambda vectors, kept: vectors)
    project.defvjp(lambda vectors, kept: (vectors, kept), _project_gradient)
    return project(vectors, kept)


def _project_gradient(kept: Any, gradient: Any) -> tuple[Any, Any]:
    return gradient - product(product(gradient, kept.T), kept), jnp.zeros_like(kept)
