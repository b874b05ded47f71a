"""The text model of a checkpoint that also has a vision tower, and its adapters."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxpeft
from jaxpeft.export.export import ExportRequest, export
from jaxpeft.models.composite import composite_name, plain_names
from tests.export.making import assert_close, ours, theirs
from tests.hub.helpers import torch_base, trained
from tests.models.conftest import tiny_config
from tests.representatives import both_stacks

CAUSAL = "causal_lm"
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)
VISION: dict[str, dict[str, Any]] = {
    "gemma3": {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "mistral3": {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "image_size": 28,
        "patch_size": 14,
    },
}
QWEN_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "out_hidden_size": 32,
    "num_heads": 2,
    "patch_size": 14,
}
GEMMA4_AUDIO: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [4, 4],
    "output_proj_dims": 16,
}
AUDIO = {
    "gemma4": {"model_type": "gemma4_audio", **GEMMA4_AUDIO},
    "gemma4_unified": {"model_type": "gemma4_unified_audio", "audio_embed_dim": 16},
}
VISION |= {
    "gemma4": {
        "model_type": "gemma4_vision",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "position_embedding_size": 16,
    },
    "gemma4_unified": {
        "model_type": "gemma4_unified_vision",
        "patch_size": 4,
        "mm_embed_dim": 16,
        "mm_posemb_size": 16,
        "output_proj_dims": 32,
    },
    "qwen2_vl": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1},
    "qwen2_5_vl": {**QWEN_VISION, "fullatt_block_indexes": [0]},
    "qwen3_vl": {**QWEN_VISION, "deepstack_visual_indexes": [0]},
    "qwen3_5": QWEN_VISION,
}
TEXT = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
    "mistral3": "ministral3",
    "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_5": "qwen3_5_text",
}
SWITCHES: dict[str, dict[str, Any]] = {"gemma4_unified": {"num_global_key_value_heads": 2}}
"""Heads that a prefix fits."""
SECTIONS = {
    "qwen2_vl": [1, 1, 2],
    "qwen2_5_vl": [1, 1, 2],
    "qwen3_vl": [2, 3, 3],
    "qwen3_5": [1, 1, 0],
}
"""How many pairs of a head are rotated by the position of time, height and width."""
NO_KEYS = ("qwen3_5", "prefix")
Make = Callable[[str], tuple[Path, Any]]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Save a tiny checkpoint of a vision tower and a decoder; return its folder and torch model."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    def made(kind: str) -> tuple[Path, Any]:
        text = tiny_config(TEXT[kind], **SWITCHES.get(kind, {}))
        if kind in SECTIONS:
            text["model_type"] = f"{kind}_text"
            text["rope_parameters"] = {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": SECTIONS[kind],
            }
        config = AutoConfig.for_model(
            kind,
            text_config=text,
            vision_config=VISION[kind],
            tie_word_embeddings=kind.startswith("gemma"),
            image_token_index=4,
            # Gemma 4 takes other tokens for those of an image, a video and a sound
            image_token_id=2 if kind in AUDIO else 4,
            **({"video_token_id": 3, "audio_token_id": 0} if kind in AUDIO else {}),
            **({"audio_config": AUDIO[kind]} if kind in AUDIO else {}),
        )
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config).eval()
        with torch.no_grad():
            for leaf in model.parameters():
                leaf.add_(0.1 * torch.randn_like(leaf))
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        return folder, model

    return made


def load(folder: Path, **options: Any) -> Any:
    return jaxpeft.load(folder, task=CAUSAL, dtype="float32", **options)


@both_stacks
@pytest.mark.parametrize("kind", TEXT)
@pytest.mark.representatives("gemma3-scanned")
def test_its_text_model_gives_the_logits_of_transformers(make: Make, kind: str, scan: bool) -> None:
    folder, torch_model = make(kind)
    model, params = load(folder, scan_layers=scan)
    assert set(params) <= {"model", "lm_head"}
    assert_close(ours(model, params), theirs(CAUSAL, torch_model))


@pytest.mark.slow
@pytest.mark.parametrize("kind", TEXT)
def test_both_names_of_tensors_are_read(make: Make, tmp_path: Path, kind: str) -> None:
    from safetensors.numpy import load_file, save_file

    folder, torch_model = make(kind)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    tensors["mtp.fc.weight"] = np.ones((2, 2), np.float32)  # which predicts further tokens
    wanted = theirs(CAUSAL, torch_model)
    for rename in (lambda name: f"language_model.{name}", composite_name):
        renamed = {
            name
            if re.search("visi?on|visual|projector|audio|^mtp", name)
            else rename(plain_names(name)): tensor
            for name, tensor in tensors.items()
        }
        save_file(renamed, tmp_path / "model.safetensors")
        assert_close(ours(*load(tmp_path)), wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "method"),
    [(kind, method) for kind in TEXT for method in ("lora", "prefix") if (kind, method) != NO_KEYS],
)
def test_peft_adapts_the_whole_checkpoint_as_jaxpeft_its_text_model(
    make: Make, tmp_path: Path, kind: str, method: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    folder, _ = make(kind)
    model, base = load(folder)
    own: Any = (
        jaxpeft.LoRA(rank=4, targets=("q_proj", "down_proj"))
        if method == "lora"
        else jaxpeft.PrefixTuning(num_virtual_tokens=3)
    )
    params = trained(own, jaxpeft.rewrite(own, base, jax.random.key(0)))
    jaxpeft.save_adapter(tmp_path / "a", own, params, model)
    assert np.abs(ours(model, params) - ours(model, base)).max() > 0.01
    if method == "lora":
        config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        assert all(
            name.startswith("model.language_model.layers.") for name in config["target_modules"]
        )
        whole = AutoModelForImageTextToText.from_pretrained(folder).eval()
        adapted = PeftModel.from_pretrained(whole, tmp_path / "a").eval()
        assert_close(theirs(CAUSAL, adapted), ours(model, params))
    again, loaded = jaxpeft.load_adapter(tmp_path / "a", model, base)
    assert_close(ours(model, loaded), ours(model, params), 1e-6)
    assert again.name == own.name


@pytest.mark.slow
@pytest.mark.parametrize("kind", TEXT)
def test_a_merged_model_is_the_text_model_alone(make: Make, tmp_path: Path, kind: str) -> None:
    folder, _ = make(kind)
    model, base = load(folder)
    method = jaxpeft.LoRA(rank=4, targets="all-linear")
    params = trained(method, jaxpeft.rewrite(method, base, jax.random.key(0)))
    jaxpeft.save_adapter(tmp_path / "a", method, params, model)
    export(ExportRequest(tmp_path / "a", "merged", tmp_path / "merged"))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["model_type"] == TEXT[kind]
    assert_close(theirs(CAUSAL, torch_base(tmp_path / "merged", CAUSAL)), ours(model, params))
