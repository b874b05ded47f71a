"""P-tuning: its networks against those of peft, and what files leave out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft.errors import ConfigError
from tests.core.helpers import load
from tests.methods.interop import case_of, exported, imported, quiet
from tests.models.conftest import reference  # noqa: F401 - a fixture

KEY = jax.random.key(0)


def torch_names(encoder: str) -> dict[str, Any]:
    """Return torch's tensors, by name, as functions of our leaves."""
    heads = (0, 2, 4) if encoder == "mlp" else (0, 2)
    names: dict[str, Any] = {"embedding.weight": lambda x: x["ptuning_embeddings"]}
    for i, at in enumerate(heads, 1):
        names[f"mlp_head.{at}.weight"] = lambda x, i=i: x[f"ptuning_w{i}"].T
        names[f"mlp_head.{at}.bias"] = lambda x, i=i: x[f"ptuning_b{i}"]
    for layer in range(2) if encoder == "lstm" else ():
        for way, end in enumerate(("", "_reverse")):
            at = f"lstm_head.{{}}_l{layer}{end}"
            names[at.format("weight_ih")] = lambda x, n=layer, w=way: x[f"ptuning_x{n + 1}"][w].T
            names[at.format("weight_hh")] = lambda x, n=layer, w=way: x["ptuning_h"][n, w].T
            names[at.format("bias_ih")] = lambda x, n=layer, w=way: x["ptuning_b"][n, w]
            names[at.format("bias_hh")] = lambda x, n=layer, w=way: jnp.zeros_like(
                x["ptuning_b"][n, w]
            )
    return names


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
@pytest.mark.representatives("mlp")
def test_the_networks_are_those_of_peft(encoder: Any) -> None:
    import torch
    from peft import PromptEncoder, PromptEncoderConfig

    _, base = load("llama")
    method = jaxpeft.PTuning(num_virtual_tokens=5, encoder=encoder, encoder_hidden_size=12)
    leaves = jaxpeft.rewrite(method, base, KEY)
    sizes = {
        "num_virtual_tokens": 5,
        "num_transformer_submodules": 1,
        "token_dim": 32,
        "encoder_hidden_size": 12,
    }
    theirs = PromptEncoder(
        PromptEncoderConfig(**sizes, encoder_reparameterization_type=encoder.upper())
    )
    given = {
        name: torch.tensor(np.array(leaf(leaves))) for name, leaf in torch_names(encoder).items()
    }
    theirs.load_state_dict(given)
    wanted = theirs(torch.arange(5)[None])[0].detach().numpy()
    np.testing.assert_allclose(method.table(leaves), wanted, atol=1e-6)
    assert np.ptp(wanted) > 0.1


def test_without_a_network_the_embeddings_are_the_prompt() -> None:
    _, base = load("llama")
    leaves = jaxpeft.rewrite(jaxpeft.PTuning(encoder="none"), base, KEY)
    assert [name for name in leaves if name.startswith("ptuning")] == ["ptuning_embeddings"]
    with pytest.raises(
        ConfigError, match=r"ptuning\.encoder_hidden_size: has no effect with encoder 'none'"
    ):
        jaxpeft.PTuning(encoder="none", encoder_hidden_size=4)


@pytest.mark.slow
@quiet
@pytest.mark.parametrize("kind", ["llama", "roberta"])
def test_a_network_is_left_out_of_files(reference: Any, tmp_path: Any, kind: str) -> None:
    options = {
        "encoder_reparameterization_type": "LSTM",
        "encoder_hidden_size": 6,
        "encoder_dropout": 0.3,
    }
    case = case_of(
        jaxpeft.PTuning(num_virtual_tokens=3, encoder="lstm"),
        kind,
        "PromptEncoderConfig",
        num_virtual_tokens=3,
        **options,
    )
    assert exported(reference, tmp_path / "ours", case) < 1e-4
    gap, method = imported(reference, tmp_path / "theirs", case)
    assert gap < 1e-4
    assert method == jaxpeft.PTuning(num_virtual_tokens=3, encoder="none")
