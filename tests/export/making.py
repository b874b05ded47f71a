"""What the tests of exports share: an adapter of a tiny model on disk, and the logits of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxpeft
from jaxpeft.errors import ConfigError
from jaxpeft.export.export import ExportRequest, export
from tests.hub.helpers import torch_base
from tests.models.conftest import Reference, forward, make_batch

CAUSAL, SEQUENCE, TOKENS, ENCODER = (
    "causal_lm",
    "sequence_classification",
    "token_classification",
    "encoder",
)
LINEAR = r".*\.(q_proj|down_proj|query|q_lin|output\.dense)"
LORA = jaxpeft.LoRA(rank=4, alpha=6.0, targets=LINEAR)
BATCH = make_batch("right")


@dataclasses.dataclass(frozen=True)
class Made:
    """An adapter on disk, the base, and the logits of the two together."""

    base: Path
    folder: Path
    task: str
    model: Any
    params: Any

    def logits(self) -> Any:
        return ours(self.model, self.params)

    def export(self, out: Path, to: str = "merged", **options: Any) -> Any:
        return export(ExportRequest(self.folder, to, out, **options))

    def refused(
        self, out: Path, error: Any = ConfigError, to: str = "merged", **options: Any
    ) -> str:
        """Return why an export is refused; nothing is left of it."""
        before = sorted(out.parent.iterdir())
        with pytest.raises(error) as caught:
            self.export(out, to, **options)
        assert sorted(out.parent.iterdir()) == before
        return str(caught.value)


def ours(model: Any, params: Any) -> Any:
    """Return logits of the real tokens."""
    return real(np.asarray(forward(model, params, BATCH.ids, BATCH.mask)))


def theirs(task: str, torch_model: Any) -> Any:
    return real(Reference(Path(), task, torch_model)(BATCH))


def real(out: Any) -> Any:
    return out[BATCH.mask.astype(bool)] if out.ndim == 3 else out


def assert_close(found: Any, wanted: Any, tolerance: float = 1e-4) -> None:
    assert np.abs(found - wanted).max() <= tolerance * max(1.0, np.abs(wanted).max())


def torch_with(folder: Path, deltas: Mapping[str, np.ndarray[Any, Any]]) -> Any:
    """Return the logits of the torch base with matrices `[out, in]` (of an embedding `[vocab, d]`)
    added to the weights of modules: what a server computes from the numbers in its file.
    """
    import torch

    model = torch_base(folder, CAUSAL)
    with torch.no_grad():
        for module, delta in deltas.items():
            weight = model.get_submodule(module).weight
            assert weight.shape == delta.shape, module
            weight += torch.from_numpy(np.ascontiguousarray(delta, np.float32))
    return theirs(CAUSAL, model)


FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LAYERS = r".*\.(q_proj|k_proj|o_proj|down_proj)"
HELD: Mapping[str, Any] = {
    "lora": jaxpeft.LoRA(rank=4, alpha=6.0, targets=LAYERS),
    "rslora": jaxpeft.LoRA(rank=4, alpha=6.0, rslora=True, targets=LAYERS),
    "pissa": jaxpeft.LoRA(rank=4, alpha=6.0, init_weights="pissa", targets=LAYERS),
    "ranks and alphas": jaxpeft.LoRA(
        rank=4, targets=LAYERS, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 5.0}
    ),
    "one layer": jaxpeft.LoRA(rank=4, targets=("q_proj", "k_proj"), layers_to_transform=(1,)),
    "lora_fa": jaxpeft.LoRAFA(rank=4, alpha=6.0, targets=LAYERS),
    "adalora": jaxpeft.AdaLoRA(rank=4, target_rank=3, alpha=6.0, final_steps=1, targets=LAYERS),
    "vera": jaxpeft.VeRA(rank=16, targets=LAYERS),
    "two loras": jaxpeft.Mixed(
        methods=(
            jaxpeft.LoRA(rank=4, targets=("q_proj", "k_proj")),
            jaxpeft.LoRA(rank=2, targets=("up_proj",)),
        )
    ),
}
"""Methods that every server can hold, as low-rank updates."""
REFUSED: Mapping[str, tuple[Any, str, str]] = {
    "ia3": (jaxpeft.IA3(targets=LINEAR), "ia3 is no low-rank update of linear modules", "merged"),
    "prefix": (
        jaxpeft.PrefixTuning(num_virtual_tokens=3),
        "prefix is no low-rank update of linear modules",
        "peft",
    ),
    "mixed": (
        jaxpeft.Mixed(methods=(LORA, jaxpeft.LNTuning())),
        "ln_tuning is no low-rank update of linear modules",
        "merged",
    ),
    "saved modules": (
        jaxpeft.LoRA(targets=("q_proj",), modules_to_save=("lm_head",)),
        "modules_to_save is ['lm_head'], which are trained in full",
        "merged",
    ),
    "biases": (
        jaxpeft.LoRA(targets=("q_proj",), lora_bias=True),
        "self_attn.q_proj by more than one product A B",
        "peft",
    ),
}
"""What no server holds: a method, the reason, and the target that the message names."""
