"""Rules: which axes of the mesh the dimensions of a leaf lie along, by its path. The first that
matches holds.

A rule says the axes of a leaf's last dimensions; those before them, which count layers, lie along
none. Of a kernel `[in, out]` `tensor` takes the outputs where every device can go on with its own
(queries, keys, values, the width of the feed-forward), and the inputs where their results are added
up: Shoeybi et al. 2019, "Megatron-LM", section 3 (arXiv:1909.08053). `fsdp` takes the outputs: they
are the rows of a tensor in a file, so that a process reads one range of it. Zhao et al. 2023,
"PyTorch FSDP" (arXiv:2304.11277).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from jaxpeft.core.expressions import full_match, require_fast
from jaxpeft.errors import ConfigError, TargetError
from jaxpeft.sharding.mesh_config import MeshConfig
from jaxpeft.sharding.sizes import FSDP, STRATEGIES, TENSOR

Axes = tuple[tuple[str, ...], ...]
"""Of each of a leaf's last dimensions the axes that it lies along, the first of them outermost."""


@dataclass(frozen=True)
class Rule:
    """Where leaves lie.

    Attributes:
        pattern: an expression that their whole paths match, such as
            `model/layers/self_attn/q_proj/kernel`.
        axes: of their last dimensions.
        own: whether it is the user's: what does not divide is then an error, not left out.
    """

    pattern: str
    axes: Axes = ()
    own: bool = False


@dataclass(frozen=True)
class Rules:
    """The rules of a run.

    Attributes:
        rules: in their order.
        offload: whether the frozen kernels of layers lie in the host's memory.
    """

    rules: tuple[Rule, ...]
    offload: bool = False

    def find(self, path: str) -> Rule:
        """Return the first rule that a path matches.

        Raises:
            ConfigError: none does.
        """
        for rule in self.rules:
            if full_match(rule.pattern, path):
                return rule
        raise ConfigError(
            f"{path}: no rule says how to shard it; add one to mesh.rules, such as"
            f" ({re.escape(path)!r},) to replicate it"
        )

    def own(self, path: str) -> Rule | None:
        """Return the first of the user's rules that a path matches, None where none does."""
        return next(
            (rule for rule in self.rules if rule.own and full_match(rule.pattern, path)), None
        )

    def require_fast(self, paths: Iterable[str]) -> None:
        """Refuse a rule of the user's that takes too long on one of the paths.

        Raises:
            ConfigError: naming the expression.
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
    # decoders, DistilBERT
    r"(.*/)?(q_proj|k_proj|v_proj|gate_proj|up_proj|q_lin|k_lin|v_lin|lin1)",
    r"(.*/)?(attention/self/(query|key|value)|intermediate/dense)",  # BERT, RoBERTa
)
_ROWS = (r"(.*/)?(o_proj|down_proj|out_lin|lin2)", r"(.*/)?output/dense")
TABLE: tuple[Rule, ...] = (
    *(Rule(f"{module}/kernel", ((), _BOTH)) for module in _COLUMNS),
    *(Rule(f"{module}/bias", ((TENSOR,),)) for module in _COLUMNS),
    *(Rule(f"{module}/kernel", ((TENSOR,), (FSDP,))) for module in _ROWS),
    # along the width: over the vocabulary XLA makes every device look up the rows of all, and adds
    # them up (v5e:4x4: 512 MiB, here none)
    Rule(r"(.*/)?(embed_tokens|word_embeddings)/embedding", ((TENSOR,), (FSDP,))),
    Rule(r"(.*/)?lm_head/kernel", ((), _BOTH)),
    Rule(r"(.*/)?pooler/dense/kernel", ((), (FSDP,))),
    Rule(r"(.*/)?(position|token_type)_embeddings/embedding"),
    Rule(r"(classifier|score|pre_classifier)/.*"),
    Rule(r"(.*/)?(scale|bias)"),
)
"""Every leaf of every family; each strategy keeps of it the axes that it uses."""


def sharding_rules(mesh: MeshConfig) -> Rules:
    """Return the rules of a run: the user's own, then those of its strategy.

    Args:
        mesh: its options.
    """
    own = tuple(
        Rule(rule[0], tuple(_axes(axes) for axes in rule[1:]), own=True) for rule in mesh.rules
    )
    return Rules((*own, *strategy_rules(mesh.strategy)), mesh.offload)


def strategy_rules(strategy: str | None) -> tuple[Rule, ...]:
    """Return the rules of a named strategy; None for the whole tree on each device."""
    uses = STRATEGIES[strategy].axes if strategy else ()
    if not {TENSOR, FSDP} & set(uses):
        return (Rule(".*"),)
    kept = (
        tuple(tuple(axis for axis in axes if axis in uses) for axes in rule.axes) for rule in TABLE
    )
    return tuple(Rule(rule.pattern, axes) for rule, axes in zip(TABLE, kept, strict=True))


def _axes(text: str) -> tuple[str, ...]:
    return tuple(axis for axis in text.split("+") if axis)
