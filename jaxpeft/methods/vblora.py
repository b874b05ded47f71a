r"""VB-LoRA: the matrices of LoRA are composed of vectors shared by all sites.

    y = x W + (D(x) A) B,    of each part of A and B of length l:
        sum over the k largest of its logits of softmax(logits)_i v_i

`v: [h, l]` is the bank of vectors at the root of the tree. A column of `A: [in, r]` has `in / l`
parts and a row of `B: [r, out]` `out / l`, each with `h` logits of its own. Bank and logits are
trained. A fresh adapter changes the outputs a little: bank and logits begin random, as with a bank
of zeros no logit would have a gradient. `D` is dropout.

Li et al. 2024, "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks", sections 3.2
and 3.3 (arXiv:2405.15179).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxpeft.core.method import Call, Kernel, Leaves
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec, LowRank, SiteSpec
from jaxpeft.core.targets import Site
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods.biases import Biased, bias_option
from jaxpeft.methods.dropping import drop_input
from jaxpeft.methods.low_rank import low_rank, product
from jaxpeft.methods.targeted import TARGET_OPTIONS, TargetedFormat, require_divisor


@dataclass(frozen=True)
class VBLoRAFormat(TargetedFormat["VBLoRA"]):
    """The file format of `VBLoRA` adapters."""

    def read_options(
        self, kind: type[VBLoRA], config: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Read the options; a file with only the largest weights instead of logits is an error."""
        values, problems = super().read_options(kind, config)
        if config.get("save_only_topk_weights"):
            problems.append(
                "save_only_topk_weights: the file has no logits, which are needed to resume"
                " training; save the adapter in PEFT with save_only_topk_weights=False"
            )
        return values, problems


@dataclass(frozen=True, kw_only=True)
class VBLoRA(Biased):
    """Low-rank updates of linear sites out of a shared bank of vectors.

    Leaves of a site: `vblora_logits_a [r, in / l, h]`, `vblora_logits_b [out / l, r, h]`, trained;
    `vblora_topk [k]`, whose length says how many are mixed; `vblora_dropout []` where the rate is
    not zero. At the root: `vblora_vector_bank [h, l]`, trained. All float32.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "vblora"
    paper: ClassVar[str] = "arXiv:2405.15179"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=("vblora_logits_a", "vblora_logits_b", "vblora_topk", "vblora_dropout"),
        root=("vblora_vector_bank",),
        trained=frozenset({"vblora_logits_a", "vblora_logits_b", "vblora_vector_bank"}),
        zero_is_base=False,
    )
    sites: ClassVar[SiteSpec] = SiteSpec(
        update=lambda shape, leaves: LowRank(*_matrices(leaves), 1.0)
    )
    peft: ClassVar[PeftFormat[Any]] = VBLoRAFormat(
        tensors={"vblora_logits_a": "vblora_logits_A", "vblora_logits_b": "vblora_logits_B"},
        root_tensors={"vblora_vector_bank": "base_model.vblora_vector_bank"},
        untransposed=frozenset({"vblora_vector_bank"}),
        type="VBLORA",
        options={
            **TARGET_OPTIONS,
            "r": "rank",
            "num_vectors": "vectors",
            "vector_length": "vector_length",
            "topk": "topk",
            "vblora_dropout": "dropout",
            "bias": "bias",
        },
        required=("r", "num_vectors", "vector_length", "topk"),
        ignored=frozenset(
            {
                "init_vector_bank_bound",
                "init_logits_std",
                "save_only_topk_weights",
            }
        ),
    )

    rank: int = option(4, "rank r of the updates", at_least=1)
    vectors: int = option(256, "number h of vectors in the bank", at_least=1)
    vector_length: int = option(
        256,
        "length l of the vectors, which must divide the inputs and outputs of each site",
        at_least=1,
    )
    topk: int = option(2, "number k of vectors mixed for each part", at_least=1)
    dropout: float = option(0.0, "rate of dropout on the input of A", at_least=0, below=1)
    bank_bound: float = option(0.02, "bound of the bank's uniform initialization", above=0)
    logits_std: float = option(0.1, "initial standard deviation of the logits", above=0)
    bias: Literal["none", "all", "vblora_only"] = bias_option()

    @property
    def fresh_is_base(self) -> bool:
        """Whether a fresh adapter leaves every output bit-identical."""
        return False

    def problems(self) -> list[str]:
        """List incompatible options: topk must not exceed the number of vectors."""
        many = (
            [f"topk: {self.topk} is more than vectors, {self.vectors}"]
            if self.topk > self.vectors
            else []
        )
        return super().problems() + many

    def init(self, site: Site, kernel: Kernel, rng: jax.Array) -> dict[str, jax.Array]:
        """Initialize the logits from a normal distribution.

        Raises:
            ConfigError: The length of the vectors does not divide the inputs and outputs of the
                site.
        """
        del kernel
        (n_in, n_out), length = site.shape, self.vector_length
        require_divisor("vblora.vector_length", length, site)
        shapes = (
            (self.rank, n_in // length, self.vectors),
            (n_out // length, self.rank, self.vectors),
        )
        a, b = (
            self.logits_std * jax.random.normal(k, s)
            for k, s in zip(jax.random.split(rng), shapes, strict=True)
        )
        leaves = {
            "vblora_logits_a": a,
            "vblora_logits_b": b,
            "vblora_topk": jnp.ones((self.topk,), jnp.float32),
        }
        return leaves | (
            {"vblora_dropout": jnp.asarray(self.dropout, jnp.float32)} if self.dropout else {}
        )

    def init_root(
        self, params: Leaves, sites: tuple[Site, ...], rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Initialize the bank to uniform values."""
        del params, sites
        shape = (self.vectors, self.vector_length)
        return {
            "vblora_vector_bank": jax.random.uniform(
                rng, shape, jnp.float32, -self.bank_bound, self.bank_bound
            )
        }

    @staticmethod
    def compute(call: Call) -> Any:
        """Compute `x W + (D(x) A) B`, `[..., in] -> [..., out]`, in the dtype of `x W`."""
        y = call.base(*call.args)
        x = drop_input(call, call.x.astype(y.dtype), "vblora_dropout")
        return y + call.each(lambda leaves, x: low_rank(x, *_matrices(leaves)), x)

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Return `W + A B`."""
        return {"kernel": base["kernel"] + product(*_matrices(leaves))}


def _matrices(leaves: Leaves) -> tuple[Any, Any]:
    """Return A `[in, r]` and B `[r, out]`."""
    a, b = (_mix(leaves, leaves[name]) for name in ("vblora_logits_a", "vblora_logits_b"))
    return a.reshape(a.shape[0], -1).T, b.transpose(1, 0, 2).reshape(b.shape[1], -1)


def _mix(leaves: Leaves, logits: Any) -> Any:
    """Mix vectors of the bank, `[..., h] -> [..., l]`."""
    largest, which = jax.lax.top_k(logits, leaves["vblora_topk"].shape[0])
    return jnp.einsum(
        "...k,...kl->...l",
        jax.nn.softmax(largest),
        leaves["vblora_vector_bank"][which],
        precision="highest",
    )
