"""The incumbent as the ground truth: 50 steps of torch `peft` and of jaxpeft from the same weights,
adapter and batches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import jaxpeft
from jaxpeft.config.train_config import OptimizerConfig
from jaxpeft.train import losses, optimizers
from jaxpeft.train.step import init_state, make_train_step
from tests.models.conftest import tiny_config

STEPS, ROWS, LENGTH, LABELS = 50, 8, 12, 4
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CASES = {
    "causal_lm": ("llama", "AutoModelForCausalLM", {}, losses.causal_lm),
    "sequence_classification": (
        "bert",
        "AutoModelForSequenceClassification",
        NO_DROPOUT,
        losses.single_label,
    ),
}


def batches(task: str) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Make five padded batches of random rows, again and again, so that there is something to
    learn: by heart.
    """
    rng = np.random.default_rng(0)
    out: list[dict[str, np.ndarray[Any, Any]]] = []
    for _ in range(5):
        ids = rng.integers(4, 60, (ROWS, LENGTH)).astype(np.int32)
        mask = (np.arange(LENGTH) < rng.integers(4, LENGTH + 1, (ROWS, 1))).astype(np.int32)
        ids = np.where(mask == 1, ids, 1).astype(np.int32)
        labels = np.where(mask == 1, ids, -100) if task == "causal_lm" else ids[:, 1] % LABELS
        weights = np.ones(ROWS, np.float32)
        out.append(
            {
                "input_ids": ids,
                "attention_mask": mask,
                "labels": labels.astype(np.int32),
                "weights": weights,
            }
        )
    return out * (STEPS // 5)


def torch_losses(task: str, base: Path, adapter: Path, rate: float, clip: float) -> list[float]:
    import torch
    import transformers
    from peft import PeftModel

    loader = getattr(transformers, CASES[task][1])
    model = PeftModel.from_pretrained(
        loader.from_pretrained(base), adapter, is_trainable=True
    ).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    found: list[float] = []
    for batch in batches(task):
        given = {
            key: torch.tensor(batch[key], dtype=torch.long)
            for key in ("input_ids", "attention_mask", "labels")
        }
        loss = model(**given).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("task", list(CASES))
@pytest.mark.representatives("causal_lm-unrolled")
def test_losses_of_50_steps_are_those_of_torch_peft(task: str, scan: bool, tmp_path: Path) -> None:
    import torch
    import transformers

    kind, loader, switches, loss = CASES[task]
    torch.manual_seed(0)
    values = tiny_config(
        kind, hidden_act="silu" if kind == "llama" else "gelu", num_labels=LABELS, **switches
    )
    config = transformers.AutoConfig.for_model(**values)
    getattr(transformers, loader).from_config(config).float().save_pretrained(tmp_path / "base")

    labels = None if task == "causal_lm" else LABELS
    model, params = jaxpeft.load(tmp_path / "base", task=task, num_labels=labels, scan_layers=scan)
    method = jaxpeft.LoRA(rank=4, alpha=8)
    params = jaxpeft.rewrite(method, params, jax.random.key(1))
    jaxpeft.save_adapter(tmp_path / "adapter", method, params, model)
    trainable, frozen = jaxpeft.partition(params, jaxpeft.trainable_mask(method, params))
    options = OptimizerConfig(learning_rate=4e-3, schedule="constant", clip_norm=1.0)
    optimizer: optax.GradientTransformation = optimizers.build(options, STEPS)
    step = jax.jit(make_train_step(model, loss, optimizer, 1))
    state, ours = init_state(trainable, optimizer, 0), []
    for batch in batches(task):
        state, metrics = step(state, frozen, batch)
        ours.append(float(metrics["loss"]))

    theirs = torch_losses(task, tmp_path / "base", tmp_path / "adapter", 4e-3, 1.0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)
    # it learned, so that equal losses say something
    assert np.mean(ours[-10:]) < np.mean(ours[:10]) - 0.01
