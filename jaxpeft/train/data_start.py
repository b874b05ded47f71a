"""What a method may look at to give its adapter a start: the model, the tokenizer, and the first
training batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft.choices import Task
from jaxpeft.core import paths
from jaxpeft.core.interception import TOGETHER
from jaxpeft.core.method import Method
from jaxpeft.core.paths import Tree
from jaxpeft.core.targets import Site
from jaxpeft.core.tree import unstack_layers
from jaxpeft.errors import ConfigError
from jaxpeft.forward import apply
from jaxpeft.hub.loading import outline
from jaxpeft.hub.model_request import ModelRequest
from jaxpeft.models.base import Pretrained
from jaxpeft.sharding.logical_axes import mesh_under, on_mesh
from jaxpeft.train.outputs import Outputs
from jaxpeft.transforms.rewrite import rewrite


@dataclass(frozen=True)
class Start:
    """What a method's `start` is given.

    Attributes:
        model: the Linen module.
        base: its parameters, not rewritten.
        key: that the tree was rewritten with.
        tokenizer: of the model, None where there is none.
        batches: the first training batches, each a dict of arrays with `input_ids` and
            `attention_mask` `[rows, length]`; iterated anew each time.
    """

    model: Pretrained
    base: Mapping[str, Any]
    key: jax.Array
    tokenizer: Any = None
    batches: Callable[[], Iterable[Mapping[str, Any]]] = lambda: ()

    def apply(self, params: Mapping[str, Any], *inputs: Any, **kw: Any) -> Any:
        """Run the model on a tree: see `jaxpeft.apply`."""
        return apply(self.model, params, *inputs, **kw)

    def rewrite(self, method: Method) -> Tree:
        """Rewrite the base with another method, from the same key."""
        return rewrite(method, self.base, self.key)

    def original_kernels(self) -> Callable[[Site, int], jax.Array]:
        """Return what reads the kernel of a layer of a site as the model's files have it, float32
        `[in, out]`.

        Raises:
            ConfigError: the model was not loaded from files, or they hold it quantized.
        """
        source = self.model.source
        if source is None:
            raise ConfigError(
                "the model was made, not loaded: there are no files to read its kernels from"
            )
        options = self.model.options
        asked = ModelRequest(
            cast(Task, options.task),
            options.num_labels,
            jnp.float32,
            scan_layers=options.scan_layers,
            pooling=options.pooling,
        )
        found = outline(source.folder, asked)
        if found.plan.held:
            raise ConfigError(
                f"{source.folder}: holds the model quantized, and not the kernels that it was made"
                " from"
            )

        def read(site: Site, i: int) -> jax.Array:
            leaf = found.plan.sources[*site.path, "kernel"]
            index = (slice(i, i + 1), slice(None), slice(None)) if leaf.stacked else None
            return jnp.asarray(leaf.read(index)).reshape(site.shape)

        return read

    def over_inputs(
        self,
        params: Mapping[str, Any],
        marker: str,
        update: Callable[[Any, Mapping[str, jax.Array]], Any],
        most: int,
    ) -> Any:
        """Fold a function over what the sites are called with, batch by batch, compiled.

        Args:
            params: the rewritten tree.
            marker: name of the leaf that tells a site.
            update: `(state or None, inputs) -> state`; the inputs are `[tokens, in]` float32 by the
                site's Hugging Face name, rows of zeros for padding.
            most: how many batches are looked at.

        Returns:
            The last state; None where there was no batch.
        """
        # nothing is computed again: there is no backward pass, and what is found must come out
        model = self.model.clone(
            options=dataclasses.replace(self.model.options, scan_layers=False, remat="none")
        )

        def seen(params: Mapping[str, Any], batch: Mapping[str, Any]) -> dict[str, jax.Array]:
            found: dict[str, jax.Array] = {}
            real = batch["attention_mask"].astype(bool).reshape(-1, 1)

            def look(fn: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
                # what is called together is not called by itself
                others = args[1:] if context.method_name == TOGETHER else ()
                for module in (
                    (context.module, *others)
                    if context.method_name in ("__call__", TOGETHER)
                    else ()
                ):
                    if marker in module.variables.get("params", {}):
                        x = args[0].astype(jnp.float32).reshape(-1, args[0].shape[-1])
                        (name,) = paths.hf_names(module.path, None)
                        found[name] = jnp.where(real, x, 0.0) if len(x) == len(real) else x
                return fn(*args, **kwargs)

            with nn.intercept_methods(look):
                _ = Outputs(model, unstack_layers(params), batch, None).logits
            return found

        mesh = mesh_under(params)
        first = jax.jit(on_mesh(mesh, lambda params, batch: update(None, seen(params, batch))))
        later = jax.jit(
            on_mesh(mesh, lambda state, params, batch: update(state, seen(params, batch)))
        )
        state: Any = None
        for i, batch in enumerate(self.batches()):
            if i == most:
                break
            given = {name: jnp.asarray(value) for name, value in batch.items()}
            state = first(params, given) if state is None else later(state, params, given)
        return state
