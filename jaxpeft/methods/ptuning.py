"""P-tuning: prompt tuning whose embeddings are produced by a small trained network.

    mlp:   P = relu(relu(E W1 + b1) W2 + b2) W3 + b3,
        W1: [hidden, e], W2: [e, e], W3: [e, hidden]
    lstm:  P = relu(L W1 + b1) W2 + b2,
        L = LSTM(LSTM(E)): [n, 2e], W1: [2e, 2e], W2: [2e, hidden]
    none:  P = E

`E [n, hidden]` are the embeddings of `n` virtual tokens, which stand in front of a row's tokens.
Each LSTM runs in both directions, and gives both side by side; a direction computes, with the gates
`i, f, g, o` of `x_t X + h_{t-1} H + b`,

    c_t = s(f) c_{t-1} + s(i) tanh(g),    h_t = s(o) tanh(c_t)

In files there is the table `P` alone: what is read from one has the encoder `none`.

Liu et al. 2021, "GPT Understands, Too", sections 2.2 and 2.3 (arXiv:2103.10385); the networks are
those of Hugging Face PEFT.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxpeft.core.method import Call, Leaves
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec
from jaxpeft.core.targets import Site
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods.virtual_tokens import (
    VirtualTokens,
    VirtualTokensFormat,
    call_with_virtual,
    each_row,
    linear,
    prompt_width,
)

_ROOT_LEAVES = (
    "ptuning_embeddings",
    "ptuning_w1",
    "ptuning_b1",
    "ptuning_w2",
    "ptuning_b2",
    "ptuning_w3",
    "ptuning_b3",
    "ptuning_x1",
    "ptuning_x2",
    "ptuning_h",
    "ptuning_b",
)


@dataclass(frozen=True)
class PTuningFormat(VirtualTokensFormat["PTuning"]):
    """The file format of `PTuning` adapters."""

    def read_options(
        self, kind: type[PTuning], config: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Read the options; files do not contain the encoder."""
        values, problems = super().read_options(kind, config)
        return values | {"encoder": "none"}, problems


@dataclass(frozen=True, kw_only=True)
class PTuning(VirtualTokens):
    """Embeddings before those of a row's tokens, produced by a network.

    Leaves at the root, trained: `ptuning_embeddings [n, hidden]`, and those of the network:
    `ptuning_w1`, `ptuning_b1` and so on, and of the LSTMs, by direction,
    `ptuning_x1 [2, hidden, 4e]`, `ptuning_x2 [2, 2e, 4e]`, and by layer and direction
    `ptuning_h [2, 2, e, 4e]`, `ptuning_b [2, 2, 4e]`.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "ptuning"
    paper: ClassVar[str] = "arXiv:2103.10385"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        root=_ROOT_LEAVES,
        trained=frozenset(_ROOT_LEAVES),
    )
    peft: ClassVar[PeftFormat[Any]] = VirtualTokens.peft.replace(
        PTuningFormat,
        type="P_TUNING",
        ignored=VirtualTokens.peft.ignored
        | {
            "encoder_reparameterization_type",
            "encoder_num_layers",
            "encoder_dropout",
        },
    )

    encoder: Literal["mlp", "lstm", "none"] = option("mlp", "network that produces the embeddings")
    encoder_hidden_size: int | None = option(
        None, "width e of that network; None for the model's", at_least=1
    )

    def problems(self) -> list[str]:
        """List incompatible options."""
        lost = self.encoder == "none" and self.encoder_hidden_size is not None
        return ["encoder_hidden_size: has no effect with encoder 'none'; remove it"] if lost else []

    def init_root(
        self, params: Leaves, sites: tuple[Site, ...], rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Initialize the embeddings, and the network as in torch."""
        del sites
        hidden = prompt_width(params)
        e, keys = self.encoder_hidden_size or hidden, jax.random.split(rng, 8)
        leaves = {
            "ptuning_embeddings": jax.random.normal(
                keys[0], (self.num_virtual_tokens, hidden), jnp.float32
            )
        }
        widths = {"mlp": (hidden, e, e, hidden), "lstm": (2 * e, 2 * e, hidden), "none": ()}[
            self.encoder
        ]
        for i, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
            leaves[f"ptuning_w{i + 1}"], leaves[f"ptuning_b{i + 1}"] = linear(
                keys[1 + i], n_in, n_out
            )
        if self.encoder == "lstm":
            shapes = {
                "x1": (2, hidden, 4 * e),
                "x2": (2, 2 * e, 4 * e),
                "h": (2, 2, e, 4 * e),
                "b": (2, 2, 4 * e),
            }
            for key, (name, shape) in zip(keys[4:], shapes.items(), strict=True):
                leaves[f"ptuning_{name}"] = jax.random.uniform(
                    key, shape, jnp.float32, -(e**-0.5), e**-0.5
                )
        return leaves

    @staticmethod
    def table(leaves: Leaves) -> Any:
        """Return the embeddings, float32 `[n, hidden]`."""
        x = leaves["ptuning_embeddings"]
        if "ptuning_h" in leaves:
            for layer in range(2):
                x = bidirectional_lstm(
                    x,
                    leaves[f"ptuning_x{layer + 1}"],
                    leaves["ptuning_h"][layer],
                    leaves["ptuning_b"][layer],
                )
        for i in range(1, 4):
            if f"ptuning_w{i}" in leaves:
                x = jax.nn.relu(x) if i > 1 else x
                x = (
                    jnp.matmul(x, leaves[f"ptuning_w{i}"], precision="highest")
                    + leaves[f"ptuning_b{i}"]
                )
        return x

    @staticmethod
    def compute(call: Call) -> Any:
        """Call the model with the table as its prompt."""
        return call_with_virtual(call, prompt=each_row(call, PTuning.table))


def bidirectional_lstm(
    x: jax.Array, x_kernel: jax.Array, h_kernel: jax.Array, bias: jax.Array
) -> jax.Array:
    """Compute an LSTM in both directions (Hochreiter and Schmidhuber 1997, with forget gates).

    Args:
        x: `[n, in]`.
        x_kernel: `[2, in, 4e]`, by direction; the gates are i, f, g, o.
        h_kernel: `[2, e, 4e]`.
        bias: `[2, 4e]`.

    Returns:
        `[n, 2e]`: forward and backward side by side.
    """

    def one_way(
        x: jax.Array, x_kernel: jax.Array, h_kernel: jax.Array, bias: jax.Array
    ) -> jax.Array:
        def step(
            carry: tuple[jax.Array, jax.Array], given: jax.Array
        ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            h, c = carry
            i, f, g, o = jnp.split(given + jnp.matmul(h, h_kernel, precision="highest"), 4)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zero = jnp.zeros(h_kernel.shape[0], x.dtype)
        return jax.lax.scan(
            step, (zero, zero), jnp.matmul(x, x_kernel, precision="highest") + bias
        )[1]

    forward, backward = jax.vmap(one_way)(jnp.stack([x, x[::-1]]), x_kernel, h_kernel, bias)
    return jnp.concatenate([forward, backward[::-1]], axis=1)
