"""Loading speed of a model in GB/s, compared with a plain read of the same file, and peak host
memory.

    python -m benchmarks.loading [--layers 22] [--dtype bfloat16] [--scan] [--folder FOLDER]

Creates a Llama of TinyLlama's shape (1.1 B parameters with 22 layers) with random numbers in a
temporary folder, or uses the model in FOLDER. The plain read reads the file repeatedly into one
buffer of 8 MiB; both read from the page cache. Memory is that of a separate process: its peak,
minus its memory before `load` was called. Prints one JSON line; `peak_allowed_gb` is the target:
the model's size plus 1.5 times its largest tensor.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

BLOCK = 8 << 20
REPEATS = 3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--scan", action="store_true")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        sys.stdout.write(json.dumps(load_once(args.folder, args.scan)) + "\n")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if args.folder is None:
            make_model(folder, args.layers, args.dtype)
        sys.stdout.write(json.dumps(measure(folder, args.scan)) + "\n")


def measure(folder: Path, scan: bool) -> dict[str, Any]:
    """Read and load, alternating, and return the best of three."""
    from jaxpeft.hub.weights.safetensors_files import open_folder

    tensors = open_folder(folder).values()
    size, largest = sum(t.nbytes for t in tensors), max(t.nbytes for t in tensors)
    files = sorted({t.file for t in tensors})
    child = [sys.executable, "-m", "benchmarks.loading", "--child", "--folder", str(folder)] + [
        "--scan"
    ] * scan
    read_gbs: list[float] = []
    loads: list[dict[str, float]] = []
    for _ in range(REPEATS):
        read_gbs.append(size / plain_read(files) / 1e9)
        loads.append(
            json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
        )
    load_gbs = size / min(run["seconds"] for run in loads) / 1e9
    peak = max(run["peak_bytes"] for run in loads)
    return {
        "model_gb": round(size / 1e9, 3),
        "largest_tensor_gb": round(largest / 1e9, 3),
        "scan_layers": scan,
        "read_gb_per_s": round(max(read_gbs), 2),
        "load_gb_per_s": round(load_gbs, 2),
        "share_of_read": round(load_gbs / max(read_gbs), 2),
        "peak_gb": round(peak / 1e9, 3),
        "peak_allowed_gb": round((size + 1.5 * largest) / 1e9, 3),
    }


def plain_read(files: list[Path]) -> float:
    """Return the seconds of reading the files."""
    buffer = bytearray(BLOCK)
    started = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - started


def load_once(folder: Path, scan: bool) -> dict[str, float]:
    """Load the model in this process; return the seconds, and the peak memory above that before."""
    import jax

    import jaxpeft

    small = jax.jit(lambda x: x + 1)(np.zeros(4, np.float32))
    jax.block_until_ready(small)
    before = resident_bytes()
    started = time.perf_counter()
    _, params = jaxpeft.load(folder, task="causal_lm", scan_layers=scan)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
    }


def resident_bytes() -> int:
    """Return the memory that this process uses now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def make_model(folder: Path, layers: int, dtype: str) -> None:
    """Write a Llama of TinyLlama's shape with random numbers."""
    from safetensors.numpy import save_file

    d, wide, vocab, kv = 2048, 5632, 32000, 256
    rng = np.random.default_rng(0)
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)

    def random(*shape: int) -> np.ndarray[Any, Any]:
        return (0.02 * rng.standard_normal(shape, np.float32)).astype(kind)

    tensors = {"model.embed_tokens.weight": random(vocab, d), "lm_head.weight": random(vocab, d)}
    tensors["model.norm.weight"] = np.ones(d, kind)
    shapes = {"q": (d, d), "k": (kv, d), "v": (kv, d), "o": (d, d)}
    for i in range(layers):
        at = f"model.layers.{i}."
        tensors |= {
            f"{at}self_attn.{name}_proj.weight": random(*shape) for name, shape in shapes.items()
        }
        tensors |= {f"{at}mlp.{name}_proj.weight": random(wide, d) for name in ("gate", "up")}
        tensors[f"{at}mlp.down_proj.weight"] = random(d, wide)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{name}.weight"] = np.ones(d, kind)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": d,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
    }
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
