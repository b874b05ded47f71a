"""RoAd's own: its three variants against the real `peft`, and sites that do not make whole
groups.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest

import jaxpeft
from jaxpeft.errors import ConfigError
from tests.core.helpers import load
from tests.methods.interop import case_of, exported, imported, quiet
from tests.models.conftest import reference  # noqa: F401 - a fixture

pytestmark = quiet
SITES = ["q_proj", "down_proj"]


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "group"), [("road_1", 4), ("road_4", 8)])
@pytest.mark.representatives("road_4-8")
def test_files_of_the_other_variants_go_both_ways(
    reference: Any, tmp_path: Path, variant: str, group: int
) -> None:
    method = jaxpeft.RoAd(
        variant=variant, group_size=group, targets=("q_proj", "down_proj"), layers_to_transform=(1,)
    )
    options = {"variant": variant, "group_size": group, "target_modules": SITES}
    case = case_of(method, "llama", "RoadConfig", **options)
    assert exported(reference, tmp_path / "ours", case) < 1e-4
    far, found = imported(reference, tmp_path / "theirs", case)
    assert far < 1e-4
    assert (found.variant, found.group_size) == (variant, group)


def test_a_site_that_does_not_make_whole_groups_is_named() -> None:
    _, base = load("llama")
    with pytest.raises(
        ConfigError,
        match=r"64 does not divide the 32 outputs of model\.layers\.0\..*; use a divisor",
    ):
        jaxpeft.rewrite(jaxpeft.RoAd(targets=("q_proj",)), base, jax.random.key(0))
    with pytest.raises(ConfigError, match="group_size: is 3; must be even"):
        jaxpeft.RoAd(group_size=3)
