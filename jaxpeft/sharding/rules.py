"""Sharding rules: map the path of a leaf to mesh axes of its dimensions; the first match applies.

A rule gives the axes of a leaf's last dimensions; leading layer dimensions are not sharded. For a
kernel `[in, out]`, `tensor` shards the outputs if each device can continue with its part (queries,
keys, values, feed-forward width), or the inputs if the results are summed: Shoeybi et al. 2019,
"Megatron-LM", section 3 (arXiv:1909.08053). `fsdp` shards the outputs, which are the rows of the
tensor in a file, so that a process reads a contiguous range: Zhao et al. 2023, "PyTorch FSDP"
(arXiv:2304.11277).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from jaxpeft.core.expressions import full_match, require_fast
from jaxpeft.core.tree import CORRECTION, LAYER_SCALAR
from jaxpeft.errors import ConfigError, TargetError
from jaxpeft.sharding.mesh_config import MeshConfig
from jaxpeft.sharding.sizes import FSDP, STRATEGIES, TENSOR

Axes = tuple[tuple[str, ...], ...]
"""Mesh axes of each of a leaf's last dimensions, outermost axis first."""


@dataclass(frozen=True)
class Rule:
    """Sharding of leaves.

    Attributes:
        pattern: regular expression that matches full paths, such as
            `model/layers/self_attn/q_proj/kernel`.
        axes: axes of the last dimensions.
        own: whether it is user-defined; an axis that does not divide a dimension is then an error.
    """

    pattern: str
    axes: Axes = ()
    own: bool = False


@dataclass(frozen=True)
class Rules:
    """The rules of a run.

    Attributes:
        rules: rules in order of priority.
        offload: whether frozen kernels of layers are stored in host memory.
    """

    rules: tuple[Rule, ...]
    offload: bool = False

    def find(self, path: str) -> Rule:
        """Return the first rule that matches a path.

        Raises:
            ConfigError: no rule matches.
        """
        for rule in self.rules:
            if full_match(rule.pattern, path):
                return rule
        raise ConfigError(
            f"{path}: no sharding rule matches; add one to mesh.rules, such as"
            f" ({re.escape(path)!r},) to replicate it"
        )

    def own(self, path: str) -> Rule | None:
        """Return the first user-defined rule that matches a path, or None."""
        return next(
            (rule for rule in self.rules if rule.own and full_match(rule.pattern, path)), None
        )

    def require_fast(self, paths: Iterable[str]) -> None:
        """Reject a user-defined rule whose regular expression is too slow on one of the paths.

        Raises:
            ConfigError: names the expression.
        """
        try:
            require_fast(
                "mesh.rules",
                {rule.pattern: rule.pattern for rule in self.rules if rule.own},
                list(paths),
            )
        except TargetError as error:
            raise ConfigError(error.problems) from error


_BOTH = (TENSOR, FSDP)
_COLUMNS = (
    # decoders, DistilBERT, ModernBERT
    r"(.*/)?(q_proj|k_proj|v_proj|qkv_proj|gate_proj|up_proj|gate_up_proj|q_lin|k_lin|v_lin|lin1)",
    r"(.*/)?(q_b_proj|kv_b_proj)",  # of latents, which are not sharded along tensor
    r"(.*/)?(Wqkv|Wi)",
    r"(.*/)?in_proj_(qkv|z)",
    r"(.*/)?experts/(w1|w3)",  # Mixtral
    r"(.*/)?(attention/self/(query|key|value)|intermediate/dense)",  # BERT and its kind
    r"(.*/)?attention/self/(pos_)?(query|key|value)_proj",  # DeBERTa
)
_ROWS = (
    r"(.*/)?(o_proj|out_proj|down_proj|out_lin|lin2|Wo|experts/w2)",
    r"(.*/)?output/dense",
)
TABLE: tuple[Rule, ...] = (
    *(Rule(f"{module}/kernel", ((), _BOTH)) for module in _COLUMNS),
    *(Rule(f"{module}/bias", ((TENSOR,),)) for module in _COLUMNS),
    *(Rule(f"{module}/kernel", ((TENSOR,), (FSDP,))) for module in _ROWS),
    # shard the width: if the vocabulary is sharded, XLA makes every device look up all rows and
    # all-reduces them (512 MiB on v5e:4x4, here none)
    Rule(
        r"(.*/)?(embed_tokens(_per_layer)?|(word|tok)_embeddings)/embedding", ((TENSOR,), (FSDP,))
    ),
    Rule(r"(.*/)?lm_head/kernel", ((), _BOTH)),
    Rule(r"(.*/)?((pooler|head)/dense|conv/conv)/kernel", ((), (FSDP,))),
    Rule(r"(.*/)?(embeddings_project|embed_proj)/kernel", ((), (FSDP,))),
    Rule(r"(.*/)?per_layer_(model_projection|input_gate|projection)/kernel", ((), (FSDP,))),
    Rule(r"(.*/)?(q_a_proj|kv_a_proj_with_mqa)/kernel", ((), (FSDP,))),
    Rule(r"(.*/)?(mlp|block_sparse_moe)/(gate|router)/kernel"),
    # a device computes all heads' gates, which are as narrow as the number of heads
    Rule(r"(.*/)?linear_attn/((in_proj_[ab]|conv1d)/kernel|A_log|dt_bias)"),
    Rule(r"(.*/)?self_attn/sinks"),
    Rule(r"(.*/)?rel_embeddings/embedding", ((), (FSDP,))),
    Rule(r"(.*/)?(position|token_type)_embeddings/embedding"),
    Rule(r"(classifier|score|pre_classifier)/.*"),
    Rule(rf"(.*/)?(scale|bias|{LAYER_SCALAR}|{CORRECTION})"),
)
"""Rules for the leaves of all model families; a strategy keeps only the axes that it uses."""


def sharding_rules(mesh: MeshConfig) -> Rules:
    """Return the rules of a run: user-defined ones, then those of the strategy.

    Args:
        mesh: mesh options.
    """
    own = tuple(
        Rule(rule[0], tuple(_axes(axes) for axes in rule[1:]), own=True) for rule in mesh.rules
    )
    return Rules((*own, *strategy_rules(mesh.strategy)), mesh.offload)


def strategy_rules(strategy: str | None) -> tuple[Rule, ...]:
    """Return the rules of a strategy; None replicates the tree."""
    uses = STRATEGIES[strategy].axes if strategy else ()
    if not {TENSOR, FSDP} & set(uses):
        return (Rule(".*"),)
    used = (
        tuple(tuple(axis for axis in axes if axis in uses) for axes in rule.axes) for rule in TABLE
    )
    return tuple(Rule(rule.pattern, axes) for rule, axes in zip(TABLE, used, strict=True))


def _axes(text: str) -> tuple[str, ...]:
    return tuple(axis for axis in text.split("+") if axis)
