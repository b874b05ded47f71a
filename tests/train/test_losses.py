"""Losses against torch's, and where nothing is labeled."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.errors import ConfigError
from jaxpeft.train import losses

RNG = np.random.default_rng(0)


class Given:
    """Logits that are there already: the head of the language model gives its input."""

    def __init__(self, logits: Any) -> None:
        self.logits = self.hidden = jnp.asarray(logits)

    def head(self, x: Any, chunk: Any) -> Any:
        return x


def torch_cross_entropy(logits: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> float:
    import torch

    given = (
        torch.tensor(logits).reshape(-1, logits.shape[-1]),
        torch.tensor(labels, dtype=torch.long).reshape(-1),
    )
    return float(torch.nn.functional.cross_entropy(*given, ignore_index=-100, reduction="sum"))


def test_a_position_without_a_label_counts_for_nothing() -> None:
    logits = RNG.normal(size=(4, 6, 9)).astype(np.float32)
    labels = RNG.integers(0, 9, (4, 6)).astype(np.int32)
    labels[0, 2:] = labels[3, :] = -100
    total, weight = losses.tokens(
        Given(logits), {"labels": jnp.asarray(labels), "weights": jnp.ones(4)}
    )
    assert float(weight) == (labels != -100).sum()
    np.testing.assert_allclose(total, torch_cross_entropy(logits, labels), rtol=1e-5)


def test_a_language_model_predicts_the_next_token() -> None:
    logits = RNG.normal(size=(2, 5, 7)).astype(np.float32)
    labels = RNG.integers(0, 7, (2, 5)).astype(np.int32)
    total, weight = losses.causal_lm(
        Given(logits), {"labels": jnp.asarray(labels), "weights": jnp.ones(2)}
    )
    assert float(weight) == 8
    np.testing.assert_allclose(total, torch_cross_entropy(logits[:, :-1], labels[:, 1:]), rtol=1e-5)


@pytest.mark.parametrize("name", ["tokens", "causal_lm"])
@pytest.mark.representatives("tokens")
def test_a_batch_without_any_label_gives_zero_and_zero_gradient(name: str) -> None:
    batch = {"labels": jnp.full((2, 4), -100, jnp.int32), "weights": jnp.ones(2)}
    logits = jnp.asarray(RNG.normal(size=(2, 4, 5)), jnp.float32)
    (total, weight), grads = jax.value_and_grad(
        lambda logits: getattr(losses, name)(Given(logits), batch), has_aux=True
    )(logits)
    assert float(total) == float(weight) == 0
    np.testing.assert_array_equal(grads, 0)


def test_a_filler_row_of_weight_zero_counts_for_nothing_even_if_its_logits_are_infinite() -> None:
    logits = jnp.asarray([[1.0, 2.0], [jnp.inf, -jnp.inf]], jnp.float32)
    batch = {"labels": jnp.asarray([1, 0], jnp.int32), "weights": jnp.asarray([1.0, 0.0])}
    total, weight = losses.single_label(Given(logits), batch)
    np.testing.assert_allclose(total, np.log1p(np.exp(-1.0)), rtol=1e-5)
    assert float(weight) == 1


def test_multi_label_is_torchs_binary_cross_entropy() -> None:
    import torch

    logits, labels = (
        RNG.normal(size=(5, 3)).astype(np.float32),
        RNG.integers(0, 2, (5, 3)).astype(np.float32),
    )
    total, weight = losses.multi_label(
        Given(logits), {"labels": jnp.asarray(labels), "weights": jnp.ones(5)}
    )
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(logits), torch.tensor(labels)
    )
    np.testing.assert_allclose(total / weight, float(theirs), rtol=1e-5)


def test_regression_is_the_mean_squared_error_of_the_rows_that_count() -> None:
    batch = {"labels": jnp.asarray([1.0, 2.0, 9.0]), "weights": jnp.asarray([1.0, 1.0, 0.0])}
    total, weight = losses.regression(Given([[2.0], [4.0], [0.0]]), batch)
    assert (float(total), float(weight)) == (5.0, 2.0)


def test_a_task_without_a_loss_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="no loss is defined for task 'encoder' with problem None"
    ):
        losses.loss_for("encoder", None)
