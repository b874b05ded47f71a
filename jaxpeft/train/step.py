"""The training step: one `jit`, differentiated with respect to the trainable part only."""

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
    """Everything that a step changes; the frozen part is not in it.

    Attributes:
        step: optimizer steps done, int32 scalar.
        trainable: the trainable part of the tree, float32.
        optimizer: the optimizer's state for it.
        rng: key data of the run's key, uint32; step k uses this key folded with k.
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
    """Make `(trainable, frozen, batch, dropout_key or None) -> (loss sum, weight)`, to be
    differentiated in its first argument: the frozen part is a constant to it, so no gradient of a
    base weight is ever computed.
    """

    def loss_sum(
        trainable: Tree, frozen: Tree, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        return loss(Outputs(model, combine(trainable, frozen), batch, key), batch)

    return loss_sum


def make_train_step(
    model: nn.Module,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    accumulation: int,
    penalty: Callable[[Tree], Any] | None = None,
) -> Callable[[TrainState, Tree, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Make the step `(state, frozen, batch) -> (state, metrics)`, to be jitted with its first
    argument donated.

    With accumulation the batch's arrays have a leading axis of parts. The sums of the parts are
    divided once by the sum of their weights, so k parts give the gradient of the one big batch,
    whatever the tokens in each.

    Args:
        model: the Linen module.
        loss: gives `(sum, weight)` from what the model makes of a batch.
        optimizer: over the trainable part.
        accumulation: number of parts.
        penalty: of the trainable part alone, added to the mean loss; gives a scalar, or None for
            none.

    Returns:
        The step. A batch whose loss or gradient is not finite changes nothing but the step's
        number, so the parameters and the optimizer's state stay finite. Its metrics are float32
        scalars, `loss`, `weight`, `grad_norm` (before clipping), `tokens`, int32, and `broken`,
        bool [leaves]: whose gradients are not finite, in the order of `jax.tree.leaves`; all of
        them where the loss alone is not.
    """
    grad = jax.value_and_grad(make_loss_sum(model, loss), has_aux=True)

    def whole(state: TrainState, frozen: Tree, batch: Batch) -> tuple[jax.Array, jax.Array, Tree]:
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
        total, weight, sums = whole(state, frozen, batch)
        weight_or_one = jnp.maximum(weight, 1e-9)
        grads = jax.tree.map(lambda g: g / weight_or_one, sums)
        added, grads = _with_penalty(penalty, state.trainable, grads)
        with jax.numpy_dtype_promotion(
            "standard"
        ):  # optax raises decay rates to the power of an integer step
            updates, opt_state = optimizer.update(grads, state.optimizer, state.trainable)
        trainable: Any = optax.apply_updates(state.trainable, updates)
        squares = [jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)]
        loss, norm = total / weight_or_one + added, jnp.sqrt(sum(squares, jnp.zeros(())))
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        # chosen, not multiplied: 0 * NaN is NaN
        kept = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (trainable, opt_state),
            (state.trainable, state.optimizer),
        )
        broken = ~jnp.isfinite(jnp.stack(squares))
        broken = jnp.where(jnp.isfinite(loss), broken, True)
        # counted here: of several processes each knows the tokens of its own rows only
        tokens = jnp.sum(jnp.where(batch["weights"][..., None] > 0, batch["attention_mask"], 0))
        metrics = {
            "loss": loss,
            "weight": weight,
            "grad_norm": norm,
            "broken": broken,
            "tokens": tokens,
        }
        return TrainState(state.step + 1, kept[0], kept[1], state.rng), metrics

    return step


def jit_train_step(
    step: Any, mesh: Mesh, state: Any, options: Mapping[str, Any] | None = None
) -> Any:
    """Return the jitted step of a mesh, which is given its state for good.

    Args:
        step: that `make_train_step` gave.
        mesh: the devices.
        state: the sharding of each leaf of the state.
        options: XLA's, for the devices.
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
    """Return what a method adds to the loss, and the gradients with its own added."""
    if penalty is None or jax.eval_shape(penalty, trainable) is None:
        return jnp.zeros(()), grads
    added, own = jax.value_and_grad(penalty)(trainable)
    return added, jax.tree.map(jnp.add, grads, own)
