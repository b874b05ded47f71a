"""What the tests of models share: tiny random torch models, and the comparison with them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from tests.representatives import FULL

TOLERANCE = 1e-4
VOCAB, PAD, LENGTH, LABELS = 99, 1, 16, 3
LENGTHS = (LENGTH, 7, 11)

_DECODER: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_GEMMA: Mapping[str, Any] = {
    **_DECODER,
    "head_dim": 16,
    "num_hidden_layers": 3,
    "query_pre_attn_scalar": 24,
    "sliding_window": 4,
}
_GEMMA4: Mapping[str, Any] = {
    **_DECODER,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_hidden_layers": 5,
    "layer_types": [*["sliding_attention", "full_attention"] * 2, "full_attention"],
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "sliding_window": 4,
    "final_logit_softcapping": 5.0,
}
_YARN: Mapping[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "llama_4_scaling_beta": 0.3,
}
_ROUTED: Mapping[str, Any] = {
    **_DECODER,
    "num_hidden_layers": 3,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
}
_LATENT: Mapping[str, Any] = {
    **_ROUTED,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_BERT: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": PAD,
}
_DISTILBERT: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "dim": 32,
    "hidden_dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": PAD,
}
_MODERNBERT: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,  # the first alone, the others scanned in pairs
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "global_attn_every_n_layers": 2,
    "local_attention": 6,
    "classifier_pooling": "mean",  # torch gives zeros where a window has no token
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "cls_token_id": 2,
    "sep_token_id": 3,
}
_TINY: Mapping[str, Mapping[str, Any]] = {
    "llama": _DECODER,
    "mistral": _DECODER,
    "qwen2": _DECODER,
    "qwen3": {**_DECODER, "head_dim": 16},
    "gemma": {**_DECODER, "head_dim": 16},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gemma4_text": {**_GEMMA4, "vocab_size_per_layer_input": 110, "hidden_size_per_layer_input": 8},
    "gemma4_unified_text": {**_GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "phi3": _DECODER,
    "mixtral": {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **_DECODER,
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 5,  # dense and sparse in turn: scanned in pairs, and the last alone
        "decoder_sparse_step": 2,
    },
    "glm4_moe": {**_ROUTED, "head_dim": 16},
    "glm4_moe_lite": _LATENT,
    "deepseek_v3": {**_LATENT, "n_group": 4, "topk_group": 2},
    "qwen3_5_text": {
        **_DECODER,
        "head_dim": 16,
        "num_hidden_layers": 3,
        "full_attention_interval": 2,
        # with 1e-6 rounding decides: the norm after the delta rule divides outputs near zero by
        # their size, and embeddings that change by 1e-7 change torch's logits by 2e-4, here by 6e-5
        "rms_norm_eps": 0.1,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
    },
    "gpt_oss": {
        **_DECODER,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 4,
    },
    "ministral3": {**_DECODER, "head_dim": 16, "rope_parameters": _YARN},
    "glm4": {**_DECODER, "head_dim": 16},
    "granite": _DECODER,
    "olmo2": _DECODER,
    "olmo3": {**_DECODER, "num_hidden_layers": 4, "sliding_window": 4},
    "smollm3": {**_DECODER, "num_hidden_layers": 4},
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": {**_BERT, "embedding_size": 16},
    "distilbert": _DISTILBERT,
    "modernbert": _MODERNBERT,
    "deberta-v2": {
        **_BERT,
        "relative_attention": True,
        "position_buckets": 8,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
    },
}


def tiny_config(model_type: str, **switches: Any) -> dict[str, Any]:
    """Return the `config.json` of a tiny model."""
    return {"model_type": model_type, **_TINY[model_type], **switches}


@dataclass(frozen=True)
class Batch:
    """Rows of different lengths, padded on one side."""

    ids: np.ndarray[Any, Any]
    mask: np.ndarray[Any, Any]


def make_batch(side: str) -> Batch:
    """Make three rows of ids; `side` is `none`, `right` or `left`."""
    rng = np.random.default_rng(0)
    ids = rng.integers(4, VOCAB, (len(LENGTHS), LENGTH)).astype(np.int32)
    mask = np.ones_like(ids)
    for row, length in enumerate(LENGTHS):
        padding = slice(length, None) if side == "right" else slice(0, LENGTH - length)
        if side != "none":
            ids[row, padding], mask[row, padding] = PAD, 0
    return Batch(ids, mask)


@partial(jax.jit, static_argnums=0)
def forward(
    model: Any, params: Any, ids: Any, mask: Any, inputs: Mapping[str, Any] | None = None
) -> Any:
    """Return the outputs of a model, compiled once for all params of one structure: as constants
    they would be folded.
    """
    return jaxpeft.apply(model, params, ids, mask, **(inputs or {}))


@dataclass(frozen=True)
class Reference:
    """A torch model and the folder that it was saved to."""

    folder: Path
    task: str
    model: Any

    def __call__(self, batch: Batch, **inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the logits, or the hidden states of an encoder without a head."""
        import torch

        given = {"input_ids": batch.ids, "attention_mask": batch.mask, **inputs}
        with torch.no_grad():
            out = self.model(
                **{key: torch.tensor(value, dtype=torch.long) for key, value in given.items()}
            )
        return (out.last_hidden_state if self.task == "encoder" else out.logits).numpy()

    def load(self, **options: Any) -> Any:
        """Return `(model, params)` in float32."""
        labels = LABELS if "classification" in self.task else None
        defaults: dict[str, Any] = {"task": self.task, "num_labels": labels, "dtype": jnp.float32}
        return jaxpeft.load(self.folder, **(defaults | options))

    def difference(
        self, batches: list[Batch], model: Any, params: Any, **inputs: np.ndarray[Any, Any]
    ) -> float:
        """Return the largest difference over real tokens between torch and jaxpeft."""
        largest = 0.0
        for batch in batches:
            ours, theirs = (
                np.asarray(forward(model, params, batch.ids, batch.mask, inputs)),
                self(batch, **inputs),
            )
            assert ours.shape == theirs.shape
            assert ours.dtype == np.float32
            gap = np.abs(ours - theirs)
            real = batch.mask.astype(bool) if gap.ndim == 3 else np.ones(len(gap), bool)
            assert np.abs(theirs[real]).max() > 0.1, "the reference is too flat to tell anything"
            largest = max(largest, float(gap[real].max()))
        return largest


def _make(
    folder: Path,
    model_type: str,
    task: str,
    rewrite: Callable[[dict[str, Any]], None] | None,
    switches: Any,
) -> Any:
    import torch
    from transformers import AutoConfig, AutoModel, models  # noqa: F401
    from transformers import AutoModelForCausalLM as CausalLM
    from transformers import AutoModelForSequenceClassification as Sequences
    from transformers import AutoModelForTokenClassification as Tokens

    kinds = {
        "causal_lm": CausalLM,
        "sequence_classification": Sequences,
        "token_classification": Tokens,
    }
    config = tiny_config(model_type, **switches)
    labels = {"num_labels": LABELS} if "classification" in task else {}
    made = AutoConfig.for_model(config.pop("model_type"), **config, **labels)
    torch.manual_seed(0)
    model = kinds.get(task, AutoModel).from_config(made).eval()
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            # transformers starts norms at one and biases at zero, which would hide a leaf that is
            # left out.
            middle = (
                1.0
                if leaf.ndim == 1
                and (name.endswith("norm.weight") or "LayerNorm.weight" in name)
                and model_type not in ("gemma", "gemma2", "gemma3_text")  # difference to one
                else 0.0
            )
            leaf.copy_(middle + (0.2 if leaf.ndim > 1 else 0.1) * torch.randn_like(leaf))
        for name, leaf in model.named_buffers():
            if name.endswith("layer_scalar"):
                leaf.copy_(1.0 + 0.2 * torch.randn_like(leaf))
            if name.endswith("e_score_correction_bias"):  # of which transformers makes zeros
                leaf.copy_(0.2 * torch.randn_like(leaf))
    model.save_pretrained(folder, safe_serialization=True)
    if rewrite is not None:
        path = folder / "config.json"
        content = json.loads(path.read_text())
        rewrite(content)
        path.write_text(json.dumps(content))
    return model


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Reference]:
    """Make torch references, each once a session."""
    made: dict[str, Reference] = {}

    def get(
        model_type: str,
        task: str,
        rewrite: Callable[[dict[str, Any]], None] | None = None,
        **switches: Any,
    ) -> Reference:
        """Make a torch model with these switches; `rewrite` edits the saved config.json."""
        key = (
            f"{model_type} {task} {json.dumps(switches, sort_keys=True)}"
            f" {rewrite and rewrite.__name__}"
        )
        if key not in made:
            folder = tmp_path_factory.mktemp("reference")
            made[key] = Reference(folder, task, _make(folder, model_type, task, rewrite, switches))
        return made[key]

    return get


@pytest.fixture
def padded() -> list[Batch]:
    """Batches without padding, padded on the right, and on the left."""
    return [make_batch("none"), make_batch("right"), make_batch("left")]


@pytest.fixture
def parity(
    reference: Any, padded: list[Batch], request: pytest.FixtureRequest
) -> Callable[..., None]:
    """Check that a model gives torch's numbers: what `make test` tries with scanned and with
    unrolled layers, the rest with one of them in turn, unless all is asked for.
    """
    id_of = request.node.nodeid
    every = FULL or request.node.get_closest_marker("slow") is None
    stacks = (False, True) if every else (bool(zlib.crc32(id_of.encode()) % 2),)

    def check(
        model_type: str,
        task: str,
        *,
        rewrite: Any = None,
        inputs: Any = None,
        load: Any = None,
        **switches: Any,
    ) -> None:
        torch_model = reference(model_type, task, rewrite, **switches)
        for scan_layers in stacks:
            model, params = torch_model.load(scan_layers=scan_layers, **(load or {}))
            gap = torch_model.difference(padded, model, params, **(inputs or {}))
            request.node.user_properties.append((f"gap_scan_{scan_layers}", gap))
            assert gap <= TOLERANCE, f"scan_layers={scan_layers}: {gap}"

    return check


@pytest.fixture(scope="session", name="tiny_config")
def tiny_config_fixture() -> Callable[..., dict[str, Any]]:
    """Return the `config.json` of a tiny model, by architecture and switches."""
    return tiny_config
