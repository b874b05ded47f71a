"""Text generation on a model of real shape: time of prefill and of a decode step, tokens/s, memory,
and the share of the memory bandwidth; with `transformers.generate` on request.

    python -m benchmarks.generate [--shape llama3_8b] [--batch 32] [--prompt 512] [--new 128]
                                  [--quant none ...] [--dtype bfloat16] [--peer] [--scan]
                                  [--model FOLDER] [--trace FOLDER]

Prints one JSON line for each of --quant, and one for the peer, which runs in a separate process.
The weights are random numbers of the model's shape, the prompts random ids, and the text is greedy.
`bandwidth_share` is the time to read the weights and the cache's filled slots once, divided by the
time of a decode step. --model takes the weights of a folder instead of a shape.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

from benchmarks.step import COMMON, GIB, SHAPES, emit

REPEATS = 3


def main(argv: list[str]) -> None:
    """Run the requested programs."""
    options = parse(argv)
    if options.only_peer:
        emit(peer(options))
        return
    if options.peer:
        command = [sys.executable, "-m", "benchmarks.generate", *argv, "--only-peer"]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        failed = {"program": "transformers", "failed": True}
        emit(json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else failed)
    for quant in options.quant:
        emit(ours(options, quant))


def parse(argv: list[str]) -> Any:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.generate")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama3_8b")
    parser.add_argument("--model", default=None)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--quant", nargs="*", default=["none"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--scan", action="store_true")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--trace", help="a folder for a profile of one call")
    parser.add_argument("--only-peer", action="store_true")
    return parser.parse_args(argv)


def prompts_of(options: Any, vocab: int) -> Any:
    """Return random prompts, the same in every program."""
    import numpy as np

    return np.random.default_rng(0).integers(3, vocab, (options.batch, options.prompt))


def ours(options: Any, quant: str) -> dict[str, Any]:
    """Measure jaxpeft."""
    import jax
    import numpy as np

    from jaxpeft.chips import chip_of
    from jaxpeft.inference.generation import complete

    model, params = _model(options, quant)
    prompts = prompts_of(options, model.config.vocab_size).tolist()

    def seconds_of_one(new: int) -> float:
        start = time.perf_counter()
        complete(model, params, prompts, max_new_tokens=new, eos=(), batch_size=options.batch)
        return time.perf_counter() - start

    def seconds(new: int) -> tuple[float, float]:
        """Return the seconds of the first call, with compilation, and the fastest of the others."""
        times = [seconds_of_one(new) for _ in range(REPEATS + 1)]
        return times[0], min(times[1:])

    prefill_first, prefill = seconds(1)
    first, whole = seconds(options.new)
    step = (whole - prefill) / (options.new - 1)
    if options.trace:
        with jax.profiler.trace(options.trace):
            seconds_of_one(options.new)
    device = jax.devices()[0]
    tables = 0 if model.config.tie_word_embeddings else 1
    embedding = params["model"]["embed_tokens"]["embedding"].nbytes * tables
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - embedding
    width = 2 * model.config.num_key_value_heads * model.config.head_dim
    filled = options.batch * (options.prompt + options.new / 2)
    size = np.dtype(model.options.dtype).itemsize
    cache = model.config.num_hidden_layers * width * filled * size
    chip = chip_of(device.device_kind)
    bandwidth = chip.bandwidth if chip else None
    stats = device.memory_stats() or {}
    return {
        "program": "jaxpeft",
        "layers": "scanned" if model.options.scan_layers else "unrolled",
        "quant": quant,
        **_figures(options, prefill, whole, step),
        "first_s": [round(prefill_first, 1), round(first, 1)],
        "read_gib": [round(weights / GIB, 2), round(cache / GIB, 2)],
        "bandwidth_share": bandwidth and round((weights + cache) / bandwidth / step, 3),
        "weights_only_share": bandwidth and round(weights / bandwidth / step, 3),
        "peak_gib": round(stats.get("peak_bytes_in_use", 0) / GIB, 2),
        "device": device.device_kind,
        "jax": jax.__version__,
    }


def _figures(options: Any, prefill: float, whole: float, step: float) -> dict[str, Any]:
    return {
        "model": (options.model and options.model.rstrip("/").split("/")[-2:]) or options.shape,
        "dtype": options.dtype,
        "batch": options.batch,
        "prompt": options.prompt,
        "new": options.new,
        "prefill_ms": round(1e3 * prefill, 2),
        "decode_step_ms": round(1e3 * step, 3),
        "seconds": round(whole, 3),
        "new_tokens_per_second": round(options.batch * options.new / whole, 1),
    }


def _model(options: Any, quant: str) -> tuple[Any, Any]:
    if options.model is not None:
        import jaxpeft

        return jaxpeft.load(
            options.model,
            task="causal_lm",
            dtype=options.dtype,
            quant=None if quant == "none" else quant,
            scan_layers=options.scan,
        )
    from benchmarks.step import random_model

    how = SimpleNamespace(**{**vars(options), "quant": quant, "attention": "auto", "remat": "none"})
    return random_model(how, options.dtype)


def peer(options: Any) -> dict[str, Any]:
    """Measure `transformers.generate`."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind: Any = getattr(torch, options.dtype)
    if options.model is not None:
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=kind)
    else:
        fields = COMMON | dict(SHAPES[options.shape])
        fields.pop("model_type")
        with torch.device(device):
            torch.set_default_dtype(kind)
            model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
            torch.set_default_dtype(torch.float32)
    model = model.to(device).eval()
    ids = torch.tensor(prompts_of(options, model.config.vocab_size), device=device)

    def seconds(new: int) -> float:
        times: list[float] = []
        for _ in range(REPEATS + 1):
            start = time.perf_counter()
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times[1:])

    prefill, whole = seconds(1), seconds(options.new)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {
        "program": "transformers",
        **_figures(options, prefill, whole, (whole - prefill) / (options.new - 1)),
        "peak_gib": round(peak / GIB, 2),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
