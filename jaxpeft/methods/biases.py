"""Which biases of the base a targeted method trains beside its own leaves: PEFT's option `bias`."""

from __future__ import annotations

from jaxpeft.core import paths
from jaxpeft.core.method import Leaves
from jaxpeft.core.paths import Path
from jaxpeft.core.targets import matches, whole_leaf
from jaxpeft.methods.targeted import Targeted


def trains_bias(method: Targeted, which: str, path: Path, params: Leaves) -> bool:
    """Says whether a leaf is a bias that is trained.

    Args:
        method: the method.
        which: `none`, `all`, or, ending with `_only`, those of the sites that it adapts.
        path: of the leaf.
        params: the whole tree, rewritten; abstract leaves will do.

    Raises:
        ConfigError: the leaf is stacked, and some of its layers only are adapted.
    """
    if path[-1] != "bias" or which == "none":
        return False
    if which == "all":
        return True
    adapted = method.leaf_names[0] in paths.get(params, path[:-1])
    wanted = method.where(())
    return adapted and whole_leaf(method.name, path, paths.get(params, path), lambda name: matches(name, wanted))
