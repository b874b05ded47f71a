"""The train step: one `jit`, differentiated with respect to the trainable part only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxpeft.core.paths import Tree
from jaxpeft.core.tree import combine
from jaxpeft.sharding.logical_axes import on_mesh
from jaxpeft.sharding.mesh import replicated_sharding
from jaxpeft.train.losses import Loss
from jaxpeft.train.outputs import Batch, Outputs


class TrainState(NamedTuple):
    """State that a step updates; excludes the frozen part.

    Attributes:
        step: number of optimizer steps done, int32 scalar.
        trainable: trainable part of the tree, float32.
        optimizer: optimizer state.
        rng: key data of the run's key, uint32; step k folds k into this key.
    """

    step: jax.Array
    trainable: Tree
    optimizer: Any
    rng: jax.Array


def init_state(trainable: Tree, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Make the state before the first step."""
    key = jax.random.key_data(jax.random.key(seed))
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), key)


def make_loss_sum(model: nn.Module, loss: Loss) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Make `(trainable, frozen, batch, dropout key or None) -> (loss sum, weight)`.

    It is differentiated with respect to its first argument only, so no gradient of a frozen weight
    is ever computed.
    """

    def loss_sum(
        trainable: Tree, frozen: Tree, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        outputs = Outputs(model, combine(trainable, frozen), batch, key)
        total, weight = loss(outputs, batch)
        added = outputs.added_loss
        return (total if added is None else total + weight * added), weight

    return loss_sum


def make_train_step(
    model: nn.Module,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    accumulation: int,
    penalty: Callable[[Tree], Any] | None = None,
) -> Callable[[TrainState, Tree, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Make the step `(state, frozen, batch) -> (state, metrics)`, to be jitted with the state
    donated.

    With accumulation, the batch's arrays have a leading micro-batch axis. The summed losses are
    divided once by the summed weights, so k micro-batches give the gradient of the full batch,
    however many tokens each contains.

    Args:
        model: Linen module.
        loss: `(outputs, batch) -> (sum, weight)`.
        optimizer: optimizer of the trainable part.
        accumulation: number of micro-batches.
        penalty: function of the trainable part whose result, a scalar or None, is added to the mean
            loss.

    Returns:
        The step. If the loss or gradient is not finite, only the step number changes, so parameters
        and optimizer state stay finite. The metrics are `loss`, `weight` and `grad_norm` (before
        clipping), float32 scalars; `tokens`, int32; and `broken`, bool [leaves], which marks
        non-finite gradients in the order of `jax.tree.leaves` (all if the loss is not finite).
    """
    grad = jax.value_and_grad(make_loss_sum(model, loss), has_aux=True)

    def gradients(
        state: TrainState, frozen: Tree, batch: Batch
    ) -> tuple[jax.Array, jax.Array, Tree]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        if accumulation == 1:
            (total, weight), grads = grad(state.trainable, frozen, batch, key)
            return total, weight, grads

        def part(carry: Any, item: Any) -> tuple[Any, None]:
            rows, i = item
            (total, weight), grads = grad(state.trainable, frozen, rows, jax.random.fold_in(key, i))
            return jax.tree.map(jnp.add, carry, (total, weight, grads)), None

        zero = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.trainable))
        return jax.lax.scan(part, zero, (dict(batch), jnp.arange(accumulation)))[0]

    def step(
        state: TrainState, frozen: Tree, batch: Batch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        total, weight, sums = gradients(state, frozen, batch)
        weight_or_one = jnp.maximum(weight, 1e-9)
        grads = jax.tree.map(lambda g: g / weight_or_one, sums)
        added, grads = _with_penalty(penalty, state.trainable, grads)
        # optax raises decay rates to the power of an integer step
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, state.optimizer, state.trainable)
        trainable: Any = optax.apply_updates(state.trainable, updates)
        squares = [jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)]
        loss, norm = total / weight_or_one + added, jnp.sqrt(sum(squares, jnp.zeros(())))
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        # select, do not multiply: 0 * NaN is NaN
        updated = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (trainable, opt_state),
            (state.trainable, state.optimizer),
        )
        broken = ~jnp.isfinite(jnp.stack(squares))
        broken = jnp.where(jnp.isfinite(loss), broken, True)
        # count here, since each process only knows the tokens of its own rows
        tokens = jnp.sum(jnp.where(batch["weights"][..., None] > 0, batch["attention_mask"], 0))
        metrics = {
            "loss": loss,
            "weight": weight,
            "grad_norm": norm,
            "broken": broken,
            "tokens": tokens,
        }
        return TrainState(state.step + 1, updated[0], updated[1], state.rng), metrics

    return step


def jit_train_step(
    step: Any, mesh: Mesh, state: Any, options: Mapping[str, Any] | None = None
) -> Any:
    """Jit a step on a mesh, with its state donated.

    Args:
        step: step made by `make_train_step`.
        mesh: device mesh.
        state: sharding of each leaf of the state.
        options: XLA compiler options for the devices.
    """
    shardings = (state, replicated_sharding(mesh))
    return jax.jit(
        on_mesh(mesh, step),
        donate_argnums=0,
        out_shardings=shardings,
        compiler_options=dict(options or {}),
    )


def _with_penalty(
    penalty: Callable[[Tree], Any] | None, trainable: Tree, grads: Tree
) -> tuple[jax.Array, Tree]:
    """Return the method's penalty on the loss, and the gradients including the penalty's."""
    if penalty is None or jax.eval_shape(penalty, trainable) is None:
        return jnp.zeros(()), grads
    added, own = jax.value_and_grad(penalty)(trainable)
    return added, jax.tree.map(jnp.add, grads, own)
