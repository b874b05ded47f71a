"""One train step of a model of real shape: tokens/s, memory, compilation, utilization, loss; with
torch peers on request.

    python -m benchmarks.step [--shape llama3_8b] [--batch 4] [--length 2048] [--method lora] [--quant none] [--remat none]
                              [--scan] [--steps 12] [--cache] [--peer peft ...] [--xla NAME=VALUE ...] [--trace FOLDER]

Prints one JSON line, after one for each peer, which runs in a separate process. The weights are
random numbers of the model's shape, the tokens random ids; the step is that of the training job
(`jaxpeft.train.step`), with AdamW and clipping. Method `none` trains the embedding of one token:
the gradient passes through all layers, and no linear site is adapted.

Peers, Hugging Face PEFT on torch: `peft` (eager), `peft-compile`, `peft-checkpoint`, `peft-nf4`,
`peft-nf4-checkpoint`, `peft-liger`, `peft-liger-checkpoint`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama3_8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "llama3_1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "qwen3_30b_a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "tie_word_embeddings": True,
    },
}
"""The shapes of Llama-3.1-8B, Llama-3.2-1B and Qwen3-30B-A3B, and one to try the program with."""
COMMON = {
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
}
GIB = 2**30


def flops(shape: Mapping[str, Any], batch: int, length: int, adapter: int) -> float:
    """Return the minimum FLOPs of a step: 4 per frozen and 6 per trained weight and token, and
    those of causal attention.

    Args:
        shape: shape of the model.
        batch: number of rows.
        length: tokens per row.
        adapter: number of trained weights that are multiplied with each token.
    """
    d, heads = shape["hidden_size"], shape["num_attention_heads"]
    size = shape.get("head_dim", d // heads)
    wide = shape["intermediate_size"]
    if "num_experts" in shape:
        wide = shape["num_experts_per_tok"] * shape["moe_intermediate_size"]
    layer = 2 * d * size * (heads + shape["num_key_value_heads"]) + 3 * d * wide
    frozen = shape["num_hidden_layers"] * layer + d * shape["vocab_size"]
    # of the scores and of the values, forward 2 and backward 4 a pair of positions that see each
    # other
    attention = shape["num_hidden_layers"] * 2 * (2 + 4) * heads * size * length / 2
    return batch * length * (4.0 * frozen + 6.0 * adapter + attention)


def main(argv: list[str]) -> None:
    """Run the requested programs."""
    parser = argparse.ArgumentParser(prog="benchmarks.step")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama3_8b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", nargs="*", help="target modules; by default all-linear")
    parser.add_argument("--quant", default="none")
    parser.add_argument("--remat", default="none")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--scan", action="store_true")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--peer", nargs="*", default=[])
    parser.add_argument("--only-peers", action="store_true")
    parser.add_argument(
        "--xla", nargs="*", default=[], help="XLA options of the compilation, NAME=VALUE"
    )
    parser.add_argument(
        "--cache", action="store_true", help="keep compiled programs, and use those that are kept"
    )
    parser.add_argument("--trace", type=Path, help="a folder for a profile of three steps")
    options = parser.parse_args(argv)
    from benchmarks.step_peer import PEERS

    unknown = sorted(set(options.peer) - set(PEERS))
    if unknown:
        parser.error(f"--peer {' '.join(unknown)}: known are {', '.join(PEERS)}")
    for peer in options.peer:
        # a process of its own: the device's memory is free again behind it, and a failure is that
        # peer's alone
        command = [sys.executable, "-m", "benchmarks.step_peer", peer, *argv]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        emit(
            json.loads(done.stdout.splitlines()[-1])
            if done.returncode == 0
            else {"program": peer, "failed": True}
        )
    if not options.only_peers:
        emit(ours(options))  # last, as its process keeps the device's memory to its end


def emit(line: Mapping[str, Any]) -> None:
    """Print one JSON line."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def figures(
    options: Any, adapter: int, seconds: list[float], peak: float, kind: str
) -> dict[str, Any]:
    """Return the measurements that every program reports.

    Args:
        options: options of the command.
        adapter: number of trained weights.
        seconds: seconds of the measured steps.
        peak: bytes of the device's memory.
        kind: kind of the device.
    """
    median = statistics.median(seconds)
    work = flops(SHAPES[options.shape], options.batch, options.length, adapter) / median
    return {
        "shape": options.shape,
        "batch": options.batch,
        "length": options.length,
        "method": options.method,
        "rank": options.rank,
        **({"targets": options.targets} if options.targets else {}),
        "quant": options.quant,
        "tokens_per_second": round(options.batch * options.length / median),
        "step_ms": round(1e3 * median, 2),
        "step_ms_range": [round(1e3 * min(seconds), 2), round(1e3 * max(seconds), 2)],
        "steps": len(seconds),
        "peak_gib": round(peak / GIB, 2),
        "tflops_per_second": round(work / 1e12, 1),
        "device": kind,
        "mfu": round(work / bf16_peak(kind), 4) if bf16_peak(kind) else None,
    }


def bf16_peak(kind: str) -> float:
    """Return the bf16 FLOP/s of a device from its data sheet, or 0 if unknown."""
    from jaxpeft.chips import chip_of

    chip = chip_of(kind)
    return (chip and chip.flops) or 0.0


def token_ids(options: Any) -> Any:
    """Return the random ids of the batch, `[batch, length]` int32, the same in every program."""
    import numpy as np

    vocab = SHAPES[options.shape]["vocab_size"]
    return (
        np.random.default_rng(0)
        .integers(0, vocab, (options.batch, options.length))
        .astype(np.int32)
    )


@dataclasses.dataclass(frozen=True)
class Program:
    """A step of the training job, ready to be compiled.

    Attributes:
        model: model of the shape.
        step: jitted step, which donates its state.
        state: trainable part, and optimizer state.
        frozen: frozen part of the tree.
        batch: batch of random tokens.
    """

    model: Any
    step: Any
    state: Any
    frozen: Any
    batch: Any

    def compiled(self, xla: Mapping[str, Any] | None = None) -> Any:
        """Compile the step as the training job does, with additional XLA options if set."""
        import jax

        from jaxpeft.train import compiling

        how = compiling.options(jax.devices()[0]) | dict(xla or {})
        return self.step.lower(self.state, self.frozen, self.batch).compile(compiler_options=how)


def program(options: Any) -> Program:
    """Build the step of the training job and its arguments from the options of the command."""
    import jax
    import optax

    from jaxpeft.core import tree
    from jaxpeft.core.rewriting import trainable_mask
    from jaxpeft.train.losses import loss_for
    from jaxpeft.train.step import init_state, make_train_step
    from jaxpeft.transforms.rewrite import rewrite

    model, base = random_model(options)
    method = method_of(options)
    params = jax.jit(lambda base: rewrite(method, base, jax.random.key(0)), donate_argnums=0)(base)
    trainable, frozen = tree.partition(params, trainable_mask(method, params))
    del base, params
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
    state = jax.jit(lambda trainable: init_state(trainable, optimizer, 0), donate_argnums=0)(
        trainable
    )
    step = jax.jit(
        make_train_step(model, loss_for("causal_lm", None), optimizer, 1), donate_argnums=0
    )
    return Program(model, step, state, frozen, batch_of(token_ids(options)))


def batch_of(ids: Any) -> dict[str, Any]:
    """Return the batch of rows of ids `[batch, length]`, with every token in the loss."""
    import jax.numpy as jnp

    ids = jnp.asarray(ids)
    ones = jnp.ones_like(ids), jnp.ones(ids.shape[0], jnp.float32)
    return {"input_ids": ids, "attention_mask": ones[0], "labels": ids, "weights": ones[1]}


def ours(options: Any) -> dict[str, Any]:
    """Measure jaxpeft."""
    began = time.perf_counter()
    import jax

    from jaxpeft.core import tree
    from jaxpeft.train import compiling

    if options.cache:
        compiling.keep_programs("auto")
    made = program(options)
    ready = time.perf_counter()
    asked = {name: json.loads(value) for name, value in (item.split("=") for item in options.xla)}
    lowered = made.step.lower(made.state, made.frozen, made.batch)
    traced = time.perf_counter()
    compiled = lowered.compile(compiler_options=compiling.options(jax.devices()[0]) | asked)
    compiled_at = time.perf_counter()
    state = made.state
    losses: list[Any] = []
    seconds: list[float] = []
    for _ in range(options.steps + 2):
        start = time.perf_counter()
        state, metrics = compiled(state, made.frozen, made.batch)
        losses.append(jax.block_until_ready(metrics["loss"]))
        seconds.append(time.perf_counter() - start)
    if options.trace:
        with jax.profiler.trace(str(options.trace)):
            for _ in range(3):
                state, metrics = compiled(state, made.frozen, made.batch)
            jax.block_until_ready(metrics)
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    adapted = tree.count(state.trainable) if options.method != "none" else 0
    return {
        "program": "jaxpeft",
        **({"xla": asked} if asked else {}),
        "remat": options.remat,
        "layers": "scanned" if options.scan else "unrolled",
        "attention": made.model.options.attention,
        **figures(
            options, adapted, seconds[2:], stats.get("peak_bytes_in_use", 0), device.device_kind
        ),
        "planned_gib": round(planned(compiled) / GIB, 2),
        "trace_s": round(traced - ready, 1),
        "compile_s": round(compiled_at - traced, 1),
        "first_step_s": round(compiled_at + seconds[0] - began, 1),
        "loss": [round(float(losses[0]), 4), round(float(losses[-1]), 4)],
        "jax": jax.__version__,
    }


def planned(compiled: Any) -> float:
    """Return the bytes of the compiled step: arguments, results that are not donated, and
    temporaries.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        return math.nan
    sizes = (
        analysis.argument_size_in_bytes,
        analysis.output_size_in_bytes,
        analysis.temp_size_in_bytes,
    )
    return sum(sizes) - analysis.alias_size_in_bytes


def method_of(options: Any) -> Any:
    """Return the method of the command."""
    import jaxpeft

    if options.method == "none":
        return jaxpeft.METHODS["trainable_tokens"](tokens=(0,))
    ranked = (
        {"rank": options.rank} if options.method in ("lora", "dora", "lora_fa", "adalora") else {}
    )
    targets = tuple(options.targets) if options.targets else "all-linear"
    return jaxpeft.METHODS[options.method](targets=targets, **ranked)


def random_model(options: Any, dtype: str = "bfloat16") -> tuple[Any, Any]:
    """Return a model of the shape, and its base: normal numbers, leaf by leaf, each quantized when
    created.

    Args:
        options: the options of the command line.
        dtype: dtype of the weights and the activations.
    """
    import jax
    import jax.numpy as jnp

    from jaxpeft import models
    from jaxpeft.core import paths
    from jaxpeft.models.attention import fastest, platform
    from jaxpeft.models.base import ModelOptions, abstract_params
    from jaxpeft.quant.quantize import Quant

    quant = None if options.quant == "none" else Quant(options.quant)
    attention = (
        fastest(platform(jax.devices()[0])) if options.attention == "auto" else options.attention
    )
    how = ModelOptions(
        "causal_lm",
        None,
        jnp.dtype(dtype),
        scan_layers=options.scan,
        remat=options.remat,
        attention=attention,
        right_padded=True,
        quant=quant,
    )
    model = models.build(COMMON | dict(SHAPES[options.shape]), how)
    abstract = abstract_params(model)
    sites = quant.sites(abstract) if quant else {}

    @partial(jax.jit, static_argnums=0)
    def normal(shape: tuple[int, ...], seed: Any) -> Any:
        if len(shape) > 3:  # one layer after another: the float32 draws are large
            seeds = seed + 1000 * jnp.arange(shape[0])
            return jax.lax.map(lambda own: normal(shape[1:], own), seeds)
        # drawn in float32: bfloat16 draws are of few values, whose mean is not zero
        return (0.02 * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)

    items: list[Any] = []
    for i, (path, leaf) in enumerate(paths.walk(abstract)):
        site = sites.get(path)
        if path[-1] == "scale":
            items.append((path, jnp.ones(leaf.shape, dtype)))
        elif site is None or quant is None:
            items.append((path, normal(leaf.shape, i)))
        else:

            def one(index: tuple[int, ...], leaf: Any = leaf, i: int = i) -> Any:
                number = 0
                for n, size in zip(index, leaf.shape, strict=False):
                    number = number * size + n
                return normal(leaf.shape[-2:], 1000 * number + i)

            stored = quant.store_layers(one, site.layers)
            items += [((*path[:-1], name), made) for name, made in stored.items()]
    return model, paths.build(items)


if __name__ == "__main__":
    main(sys.argv[1:])
