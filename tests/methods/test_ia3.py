"""IA3's own: which sites rescale their input, and how files say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pytest

import jaxpeft
from jaxpeft.core import paths
from jaxpeft.errors import ConfigError, TargetError
from tests.core.helpers import load
from tests.methods.interop import case_of, exported, imported, quiet
from tests.models.conftest import reference  # noqa: F401 - a fixture

pytestmark = quiet


def shapes(method: Any, kind: str, **options: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the scales by the last names of their sites."""
    params = jaxpeft.rewrite(method, load(kind, **options)[1], jax.random.key(0))
    return {".".join(p[-3:-1]): leaf.shape for p, leaf in paths.walk(params) if p[-1] == "ia3_l"}


def test_the_usual_sites_are_keys_values_and_the_modules_that_end_a_feed_forward_layer() -> None:
    llama = {"self_attn.k_proj": (1, 16), "self_attn.v_proj": (1, 16), "mlp.down_proj": (48, 1)}
    assert shapes(jaxpeft.IA3(), "llama") == llama
    bert = {"self.key": (1, 32), "self.value": (1, 32), "output.dense": (48, 1)}
    assert shapes(jaxpeft.IA3(), "bert", task="encoder") == bert


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            {},
            {
                "target_modules": ["k_proj", "v_proj", "down_proj"],
                "feedforward_modules": ["down_proj"],
            },
        ),
        (
            {"targets": ("q_proj", "down_proj"), "feedforward": ("q_proj",)},
            {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["q_proj"]},
        ),
        (
            {"targets": ("o_proj",), "feedforward": ()},
            {"target_modules": ["o_proj"], "feedforward_modules": []},
        ),
        (
            {"targets": "all-linear", "feedforward": ("proj",), "layers_to_transform": 1},
            {"target_modules": "all-linear", "feedforward_modules": ".*proj"},
        ),
    ],
)
@pytest.mark.representatives("ours2-*")
def test_variants_go_both_ways_with_the_real_peft(
    reference: Any,
    tmp_path: Path,
    ours: Any,
    theirs: Any,
) -> None:
    case = case_of(jaxpeft.IA3(**ours), "llama", "IA3Config", **theirs)
    assert exported(reference, tmp_path / "ours", case) < 1e-4
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert "layers_to_transform" not in written, (
        "is unknown to peft's IA3, which would adapt all layers"
    )
    assert imported(reference, tmp_path / "theirs", case)[0] < 1e-4


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"feedforward": ("up_proj",)},
            TargetError,
            r"feedforward: \('up_proj',\) matches no adapted site, such as model",
        ),
        (
            {"feedforward": r".*\.1\..*down_proj"},
            TargetError,
            r"feedforward: matches only some layers of model\.layers\.\*\.mlp\.down_proj",
        ),
        ({"feedforward": "("}, ConfigError, r"ia3\.feedforward: '\(' is not a regular expression"),
    ],
)
def test_what_names_no_site_is_refused(options: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        shapes(jaxpeft.IA3(**options), "llama")
