"""The training job on a Llama of 8 B parameters: seconds per step, tokens/s, FLOP/s utilization and
peak memory of a device.

    python -m benchmarks.llama_8b [--steps 20] [--folder FOLDER] [--config.OPTION=VALUE ...]

Runs configs/llama3_8b_lora.py, unchanged, on a model of Llama-3.1-8B's shape with random weights
and on synthetic texts with lengths like alpaca's: the cost of a step does not depend on the values,
and nothing is downloaded. The inputs of the run are written to FOLDER (16 GB; a temporary one by
default). Prints one JSON line with the median of all steps but the first five, and their extremes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

LAYERS, D, WIDE, VOCAB, KV = 32, 4096, 14336, 128256, 1024
ROWS, SHORTEST, LONGEST = 2000, 20, 600
WARM_UP = 5
CONFIG = "configs/llama3_8b_lora.py"


def main() -> None:
    """Create the inputs, run the training job, and print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", type=Path)
    args, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "config.json").is_file():
            make_model(folder)
            make_tokenizer(folder)
            make_texts(folder / "rows.jsonl")
        with tempfile.TemporaryDirectory() as workdir:
            run(folder, Path(workdir), args.steps, overrides)
            sys.stdout.write(json.dumps(figures(Path(workdir))) + "\n")


def run(folder: Path, workdir: Path, steps: int, overrides: list[str]) -> None:
    """Run the config in a separate process."""
    command = [sys.executable, "-m", "jaxpeft.train", "--config", CONFIG, "--workdir", str(workdir)]
    options = {
        "model.path": folder,
        "data.train": folder / "rows.jsonl",
        "data.format": "text",
        "train.epochs": None,
        "train.steps": steps,
        "evaluation.every_steps": steps,
        "log.every_steps": 1,
        "log.tensorboard": False,
        "log.plot": False,
    }
    given = [f"--config.{name}={value}" for name, value in options.items()]
    subprocess.run([*command, *given, *overrides], check=True)


def figures(workdir: Path) -> dict[str, Any]:
    """Return the medians of the steps of a run; padding does not count as tokens."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    tokens = [line["tokens"] for line in lines if "tokens" in line][WARM_UP:]
    steps = [line for line in lines if "tokens_per_second" in line][WARM_UP:]
    rates = [line["tokens_per_second"] for line in steps]
    return {
        "steps": len(steps),
        "tokens_a_step": round(statistics.median(tokens)),
        "seconds_a_step": round(
            statistics.median(n / rate for n, rate in zip(tokens, rates, strict=True)), 3
        ),
        "tokens_per_second": round(statistics.median(rates)),
        "tokens_per_second_range": [round(min(rates)), round(max(rates))],
        "model_tflops_per_second": round(
            statistics.median(line["model_flops_per_second"] for line in steps) / 1e12, 1
        ),
        "peak_memory_gb": round(max(line["memory_gb"] for line in steps), 2),
    }


def make_model(folder: Path) -> None:
    """Write the model: one file per layer, with the same random numbers in each."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    kind = np.dtype(ml_dtypes.bfloat16)

    def random(*shape: int) -> np.ndarray[Any, Any]:
        return (0.02 * rng.standard_normal(shape, np.float32)).astype(kind)

    shapes = {"q": (D, D), "k": (KV, D), "v": (KV, D), "o": (D, D)}
    layer = {f"self_attn.{name}_proj.weight": random(*shape) for name, shape in shapes.items()}
    layer |= {f"mlp.{name}_proj.weight": random(WIDE, D) for name in ("gate", "up")}
    layer |= {"mlp.down_proj.weight": random(D, WIDE)}
    layer |= {f"{name}_layernorm.weight": np.ones(D, kind) for name in ("input", "post_attention")}
    ends = {"model.embed_tokens.weight": random(VOCAB, D), "lm_head.weight": random(VOCAB, D)}
    files = {
        f"layer-{i}": {f"model.layers.{i}.{name}": t for name, t in layer.items()}
        for i in range(LAYERS)
    }
    files["ends"] = {**ends, "model.norm.weight": np.ones(D, kind)}
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
    where = {tensor: f"{name}.safetensors" for name, tensors in files.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
    config = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": D,
        "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))


def make_tokenizer(folder: Path) -> None:
    """Write a tokenizer with as many words as the model has rows, one token per word."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = ["<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(VOCAB - 3))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<eos>",
    ).save_pretrained(folder)


def make_texts(path: Path) -> None:
    """Write texts of random words; their lengths are log-normal around 100 tokens, as in alpaca."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(np.log(100), 0.6, ROWS)), SHORTEST, LONGEST).astype(int)
    with path.open("w") as file:
        for length in lengths:
            text = " ".join(f"w{i}" for i in rng.integers(0, VOCAB - 3, length))
            file.write(json.dumps({"text": text}) + "\n")


if __name__ == "__main__":
    main()
