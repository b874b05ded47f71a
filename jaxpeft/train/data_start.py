"""Inputs for data-dependent adapter initialization: model, tokenizer and first training batches."""

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
    """Argument of a method's `start`.

    Attributes:
        model: Linen module.
        base: parameters of the model, without adapters.
        key: random key used to inject the adapters.
        tokenizer: tokenizer of the model, or None.
        batches: returns the training batches from the first, each a dict of arrays with
            `input_ids` and `attention_mask` `[rows, length]`; each call starts over.
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
        """Rewrite the base with another method, using the same key."""
        return rewrite(method, self.base, self.key)

    def original_kernels(self) -> Callable[[Site, int], jax.Array]:
        """Return a function `(site, layer) -> kernel` that reads the unquantized kernel from the
        model's files, float32 `[in, out]`.

        Raises:
            ConfigError: the model was not loaded from files, or the files are quantized.
        """
        source = self.model.source
        if source is None:
            raise ConfigError(
                "the model was not loaded from files, so its original kernels cannot be read"
            )
        options = self.model.options
        request = ModelRequest(
            cast(Task, options.task),
            options.num_labels,
            jnp.float32,
            scan_layers=options.scan_layers,
            pooling=options.pooling,
        )
        found = outline(source.folder, request)
        if found.plan.held:
            raise ConfigError(
                f"{source.folder}: contains a quantized model, not its original kernels"
            )

        def read(site: Site, i: int) -> jax.Array:
            leaf = found.plan.sources[*site.path, "kernel"]
            return jnp.asarray(leaf.read_layer(i, None)).reshape(site.shape)

        return read

    def over_inputs(
        self,
        params: Mapping[str, Any],
        marker: str,
        update: Callable[[Any, Mapping[str, jax.Array]], Any],
        most: int,
    ) -> Any:
        """Fold a function over the inputs of the sites, batch by batch, compiled.

        Args:
            params: rewritten tree.
            marker: name of the leaf that marks a site.
            update: `(state or None, inputs) -> state`; inputs are `[tokens, in]` float32 by the
                site's Hugging Face name, with rows of zeros for padding.
            most: maximum number of batches.

        Returns:
            The last state; None if there were no batches.
        """
        # without remat: there is no backward pass, and the captured inputs must be returned
        model = self.model.clone(
            options=dataclasses.replace(self.model.options, scan_layers=False, remat="none")
        )

        def site_inputs(
            params: Mapping[str, Any], batch: Mapping[str, Any]
        ) -> dict[str, jax.Array]:
            found: dict[str, jax.Array] = {}
            real = batch["attention_mask"].astype(bool).reshape(-1, 1)

            def capture(
                fn: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
            ) -> Any:
                # modules that are called together are not called one by one
                others = args[1:] if context.method_name == TOGETHER else ()
                for module in (
                    (context.module, *others)
                    if context.method_name in ("__call__", TOGETHER)
                    else ()
                ):
                    if marker in module.variables.get("params", {}):
                        x = args[0].astype(jnp.float32).reshape(-1, args[0].shape[-1])
                        (name,) = paths.hf_names(module.path)
                        found[name] = jnp.where(real, x, 0.0) if len(x) == len(real) else x
                return fn(*args, **kwargs)

            with nn.intercept_methods(capture):
                _ = Outputs(model, unstack_layers(params), batch, None).logits
            return found

        mesh = mesh_under(params)
        first = jax.jit(
            on_mesh(mesh, lambda params, batch: update(None, site_inputs(params, batch)))
        )
        later = jax.jit(
            on_mesh(mesh, lambda state, params, batch: update(state, site_inputs(params, batch)))
        )
        state: Any = None
        for i, batch in enumerate(self.batches()):
            if i == most:
                break
            arrays = {name: jnp.asarray(value) for name, value in batch.items()}
            state = first(params, arrays) if state is None else later(state, params, arrays)
        return state
