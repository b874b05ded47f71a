"""The table of remat policies, and what is derived from it."""

from __future__ import annotations

from typing import get_args

import pytest

from jaxpeft.config.model_config import ModelConfig
from jaxpeft.core.options import hints_of
from jaxpeft.remat import ATTENTION, PRODUCT, REMAT_POLICIES, Remat, fastest, stronger

MARKED = {ATTENTION: 10, PRODUCT: 100}


def test_every_policy_of_the_table_is_an_option() -> None:
    assert get_args(Remat) == tuple(REMAT_POLICIES)
    assert get_args(hints_of(ModelConfig)["remat"]) == ("auto", *REMAT_POLICIES)


@pytest.mark.parametrize(
    ("remat", "nbytes"),
    [("none", 444), ("products", 444), ("attention", 44), ("full", 4), ("offload", 2)],
)
def test_what_waits_for_the_backward_pass(remat: str, nbytes: int) -> None:
    assert REMAT_POLICIES[remat].nbytes(4, 1, MARKED) == nbytes


def test_the_policy_that_fits_and_computes_least_again() -> None:
    needs = {name: policy.nbytes(4, 1, MARKED) for name, policy in REMAT_POLICIES.items()}
    assert [fastest(needs.__getitem__, budget) for budget in (444, 443, 43, 3)] == [
        "products",
        "attention",
        "full",
        "full",
    ]


def test_what_keeps_less_on_the_device() -> None:
    assert stronger("none") == ("products", "attention", "full")
    assert stronger("full") == stronger("offload") == ()
