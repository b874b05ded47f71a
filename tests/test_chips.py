"""The table of chips: what a program may take of them, and which one JAX means."""

from __future__ import annotations

import pytest

from jaxpeft.chips import CHIPS, GIB, chip_of, usable


def test_what_a_chip_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert usable(CHIPS["v5e"], None) == 15.75 * GIB
    assert usable(CHIPS["h100"], None) == 60e9
    assert usable(CHIPS["cpu"], None) is None
    assert usable(CHIPS["cpu"], 2) == 2 * GIB
    assert usable(CHIPS["v5e"], 8) == 8 * GIB
    # its compiler takes no more, whatever is allowed
    assert usable(CHIPS["v5e"], 64) == 15.75 * GIB
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert usable(CHIPS["h100"], None) == 72e9


def test_every_chip_says_where_its_figures_come_from() -> None:
    assert all(chip.sources for chip in CHIPS.values())


@pytest.mark.parametrize("name", CHIPS)
def test_jax_names_every_chip(name: str) -> None:
    assert (
        chip_of(f"NVIDIA {CHIPS[name].kind} 80GB" if CHIPS[name].host else CHIPS[name].kind)
        is CHIPS[name]
    )


def test_two_names_of_a_chip_and_a_name_of_none() -> None:
    assert chip_of("TPU v5e") is chip_of("TPU v5 lite") is CHIPS["v5e"]
    assert chip_of("TPU v5p") is chip_of("TPU v5") is CHIPS["v5p"]
    assert chip_of("GeForce RTX 4090") is None
