"""The work of a step, counted by hand."""

from __future__ import annotations

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from jaxpeft.train import flops


def test_a_frozen_parameter_costs_4_a_token_a_trained_one_6_and_a_look_up_nothing() -> None:
    frozen = {
        "embed": {"embedding": jnp.zeros((100, 8))},
        "up": {"kernel": jnp.zeros((8, 32)), "bias": jnp.zeros(32)},
    }
    trainable = {"up": {"lora_a": jnp.zeros((8, 2)), "lora_b": jnp.zeros((2, 32))}}
    assert flops.per_token(trainable, frozen) == 4 * 8 * 32 + 6 * (8 * 2 + 2 * 32)


def test_stacked_layers_count_each() -> None:
    assert flops.per_token({}, {"up": {"kernel": jnp.zeros((3, 8, 32))}}) == 4 * 3 * 8 * 32


def test_a_token_computes_with_the_chosen_experts():
    experts = {"experts": {"up": {"kernel": jnp.zeros((4, 8, 32))}}}
    assert flops.per_token({}, experts, active=0.5) == 4 * 2 * 8 * 32


@pytest.mark.parametrize(
    ("kind", "devices", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 8, 8 * 989e12),
        ("NVIDIA H200", 1, 989e12),
        ("TPU v5 lite", 4, 4 * 197e12),
        ("TPU v5p", 1, 459e12),
        ("TPU v6 lite", 1, 918e12),
        ("NVIDIA L40S", 1, 362e12),
        ("NVIDIA L4", 1, 121e12),
        ("cpu", 1, None),
    ],
)
def test_the_peak_of_a_device_is_its_data_sheets(
    kind: str, devices: int, peak: float | None
) -> None:
    assert flops.peak([SimpleNamespace(device_kind=kind)] * devices) == peak
