"""WaveFT's own: its filters, other wavelets and sizes against the real `peft`, and what is
refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxpeft
from jaxpeft.errors import ConfigError
from jaxpeft.methods.waveft import daubechies
from tests.core.helpers import load
from tests.methods.interop import case_of, exported, imported, quiet
from tests.models.conftest import reference  # noqa: F401 - a fixture

pytestmark = quiet


@pytest.mark.slow  # it imports peft
@pytest.mark.parametrize("moments", range(1, 11))
def test_the_filters_are_those_of_peft(moments: int) -> None:
    from peft.tuners.waveft.wavelet import Wavelet

    np.testing.assert_allclose(daubechies(moments), Wavelet(f"db{moments}").rec_lo, atol=1e-11)


@pytest.mark.parametrize("moments", [1, 4, 10])
def test_a_filter_is_orthonormal_to_its_even_shifts_and_has_vanishing_moments(moments: int) -> None:
    low = daubechies(moments)
    for shift in range(moments):
        overlap = low[2 * shift :] @ low[: len(low) - 2 * shift]
        np.testing.assert_allclose(overlap, float(shift == 0), atol=1e-10)
    high = low * (-1.0) ** np.arange(2 * moments)
    for power in range(moments):
        places = np.linspace(-1, 1, 2 * moments) ** power
        np.testing.assert_allclose(high @ places, 0, atol=1e-9)


SITES = r".*\.(k_proj|down_proj)"
OPTIONS: dict[str, dict[str, Any]] = {
    "haar": {"wavelet_family": "db1"},
    "db5": {"wavelet_family": "db5"},
    "none": {"use_idwt": False},
    "pattern": {"n_frequency_pattern": {"k_proj": 20}, "wavelet_family": "db3"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_other_wavelets_go_both_ways(reference: Any, tmp_path: Path, name: str) -> None:
    method = jaxpeft.WaveFT(
        coefficients=30,
        scaling=2.0,
        location_seed=5,
        wavelet={"haar": "db1", "pattern": "db3"}.get(name, name),
        coefficients_pattern=OPTIONS[name].get("n_frequency_pattern", {}),
        targets=SITES,
    )
    options = {"n_frequency": 30, "scaling": 2.0, "random_loc_seed": 5, **OPTIONS[name]}
    case = case_of(method, "llama", "WaveFTConfig", target_modules=SITES, **options)
    assert exported(reference, tmp_path / "ours", case) < 1e-5
    far, found = imported(reference, tmp_path / "theirs", case)
    assert far < 1e-5
    assert found == method


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (9, 9)], ids=str)
@pytest.mark.parametrize("wavelet", ["db1", "db2", "db6"])
def test_kernels_of_odd_sizes_get_the_update_of_peft(shape: tuple[int, int], wavelet: str) -> None:
    import peft
    import torch

    n_in, n_out = shape
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(n_in, n_out)),
        peft.WaveFTConfig(
            n_frequency=n_in * n_out,
            wavelet_family=wavelet,
            init_weights=False,
            target_modules=["0"],
        ),
    ).base_model.model[0]
    spectrum = theirs.waveft_spectrum["default"].detach().numpy()
    method = jaxpeft.WaveFT(coefficients=n_in * n_out, wavelet=wavelet)
    kernel = np.zeros(shape, np.float32)
    params = jaxpeft.rewrite(
        method, {"0": {"kernel": jax.numpy.asarray(kernel)}}, jax.random.key(0)
    )
    params["0"]["waveft_spectrum"] = jax.numpy.asarray(spectrum)
    merged = jaxpeft.merge(method, params)["0"]["kernel"]
    wanted = theirs.get_delta_weight("default").detach().numpy().T
    np.testing.assert_allclose(merged, wanted, atol=1e-5)


def test_what_is_not_supported_is_refused() -> None:
    _, problems = jaxpeft.WaveFT.peft.read_options(
        jaxpeft.WaveFT,
        {
            "target_modules": ["q"],
            "n_frequency": 5,
            "scaling": 1.0,
            "wavelet_family": "db1",
            "random_loc_seed": 5,
            "proportional_parameters": True,
        },
    )
    assert problems == [
        "proportional_parameters: True is not supported by the waveft method; nothing was loaded"
    ]
    with pytest.raises(ConfigError, match=r"waveft\.wavelet: must be one of .*, is 'sym4'"):
        jaxpeft.WaveFT(wavelet="sym4")
    with pytest.raises(
        ConfigError, match=r"waveft\.coefficients: 2592 is more than the 1536 of the kernel of"
    ):
        jaxpeft.rewrite(jaxpeft.WaveFT(), load("llama")[1], jax.random.key(0))
