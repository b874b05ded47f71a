"""The training job: train a method, print the final table and write the output files."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxpeft import atomic
from jaxpeft.config.schema import Config, as_dict
from jaxpeft.config.train_config import OptimizerConfig
from jaxpeft.core import paths
from jaxpeft.core.method import Method
from jaxpeft.core.paths import Tree
from jaxpeft.core.tree import combine
from jaxpeft.hub.adapters.save import save_adapter
from jaxpeft.inference.generation import generate
from jaxpeft.logs import log_time
from jaxpeft.models import attention
from jaxpeft.processes.arrays import fetch_to_host
from jaxpeft.processes.lock import lock_folder
from jaxpeft.processes.peers import ALONE, Peers
from jaxpeft.processes.signals import StopRequest
from jaxpeft.train import compiling, loop, next_steps, optimizers, plot, records, sample_answers
from jaxpeft.train.artifacts import answer_ends
from jaxpeft.train.begin import begin, check_resumable, fixed_leaves
from jaxpeft.train.card_facts import training_of
from jaxpeft.train.evaluator import Evaluator, metric_of
from jaxpeft.train.run import RunResult
from jaxpeft.train.setup import Setup, prepare
from jaxpeft.train.step_metrics import devices_of

_log = logging.getLogger(__name__)


def run(
    config: Config,
    workdir: Path,
    stop: StopRequest | None = None,
    allowed: Sequence[str] = (),
    peers: Peers = ALONE,
) -> RunResult:
    """Run a config from end to end.

    Writes to `workdir`: `config.json`, `run.json`, `metrics.jsonl`, `samples.jsonl`,
    `summary.json`, `curves.png`, `tensorboard/`, `checkpoints/` and `adapter/`.

    Args:
        config: a checked config.
        workdir: folder of the run; resumes from checkpoints of the same run in it.
        stop: a stop request that is already entered; None to listen for signals during this call.
        allowed: config fields that may differ from the checkpoint's.
        peers: processes of the run; process 0 writes the files.

    Raises:
        JaxpeftError: an input is invalid.
        Stopped: on SIGTERM or SIGINT, after saving.
    """
    if stop is None:
        with StopRequest() as stop:
            return run(config, workdir, stop, allowed, peers)
    records.check(config.log)
    peers.same("config", {"config": options_in_common(config), "jax": jax.__version__})
    config = config if peers.first else quiet(config)
    workdir.mkdir(parents=True, exist_ok=True)
    with lock_folder(workdir) if peers.first else nullcontext():
        peers.require_shared(workdir)
        setup = prepare(config, peers)
        stop.raise_if_requested()
        check_resumable(setup, config.method, workdir, allowed)
        log_setup(setup)
        evaluator = Evaluator(setup, stop.raise_if_requested)
        before = Before(setup, evaluator, workdir / records.BEFORE)
        answers = _answers(setup, setup.params)
        options = optimizers.options_for(config)
        result = fit(setup, config.method, options, workdir, stop, evaluator, allowed, before)
        samples = sample_answers.collect(setup, answers, _answers(setup, result.params))
        for number, sample in enumerate(samples, 1):
            _log.info("%s", sample_answers.describe(number, sample))
        if peers.first:
            if samples:
                sample_answers.write(workdir, samples)
            _finish(setup, before.figures, result, workdir)
    return result


_OF_A_HOST = ("model.path", "data.train", "data.validation", "data.test")
"""Paths may differ between hosts: their contents are compared by hash."""


def options_in_common(config: Config) -> dict[str, Any]:
    """Return the options that must be equal in all processes."""
    values = as_dict(config)
    del values["log"]
    for section, option in (name.split(".") for name in _OF_A_HOST):
        del values[section][option]
    return values


def quiet(config: Config) -> Config:
    """Return the config of a process that leaves logs and plots to process 0."""
    return replace(
        config, log=replace(config.log, progress="off", tensorboard=False, wandb=None, plot=False)
    )


def log_setup(setup: Setup) -> None:
    """Log the data, devices and computation of a run."""
    batches, devices, used = setup.data.batches, jax.devices(), devices_of(setup.params)
    rows = (
        f"{setup.data.problem}, {len(setup.data.labels)} classes"
        if setup.data.labels
        else setup.data.problem
    )
    _log.info(
        "%s: %d steps of %d rows padded to %s (%.0f%% padding), on %d of %d device(s): %s, jax %s",
        rows,
        setup.steps,
        setup.config.train.batch_size,
        " or ".join(map(str, batches.lengths)),
        100 * batches.padding_share,
        len(used),
        len(devices),
        devices[0].device_kind,
        jax.__version__,
    )
    _log.info("%s", _describe_computation(setup))


def _describe_computation(setup: Setup) -> str:
    """Describe how the model is computed: layers, remat, attention and compilation cache."""
    options = setup.model.options
    lacks = attention.lacks(options, setup.model.config)
    kernel = options.attention if not lacks else f"xla ({options.attention}: {lacks})"
    layers = "scanned" if options.scan_layers else "unrolled"
    folder = compiling.cache_folder()
    return (
        f"layers {layers}, remat {options.remat}, attention {kernel}, compiled programs"
        f" {f'in {folder}' if folder else 'not cached'}"
    )


class Before:
    """Metrics of the new adapter before training, evaluated once per run, even if it is resumed.

    Args:
        setup: prepared run.
        evaluator: evaluator of the setup.
        record: file that stores the metrics with the hash of the run.
    """

    def __init__(self, setup: Setup, evaluator: Evaluator, record: Path) -> None:
        self._setup, self._evaluator, self._record = setup, evaluator, record
        self.figures: dict[str, float] = {}

    def __call__(self, trainable: Tree, frozen: Tree) -> None:
        """Evaluate both parts of the tree, unless the record contains the metrics."""
        setup, record = self._setup, self._record
        run = hashlib.sha256(
            json.dumps(setup.provenance.identity, sort_keys=True).encode()
        ).hexdigest()
        known = setup.peers.agree("figures before training", lambda: _recorded_figures(record, run))
        if known is not None:
            self.figures = known
            return
        with log_time("evaluating before training") as note:
            self.figures = self._evaluator(trainable, frozen, setup.data.test)
            note(_format_metrics(self.figures))
        if setup.peers.first:
            atomic.write_text(record, json.dumps({"run": run, "figures": self.figures}) + "\n")


def _recorded_figures(record: Path, run: str) -> dict[str, float] | None:
    """Return the recorded metrics of this run, or None if there is no readable record."""
    try:
        found = json.loads(record.read_text())
        return (
            {str(name): float(value) for name, value in found["figures"].items()}
            if found["run"] == run
            else None
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def fit(
    setup: Setup,
    method: Method,
    options: OptimizerConfig,
    folder: Path,
    stop: StopRequest,
    evaluator: Evaluator,
    allowed: Sequence[str],
    look: Before | None = None,
) -> RunResult:
    """Train a method on a prepared setup and save its adapter; takes the arguments of `begin`."""
    result = loop.fit(*begin(setup, method, options, folder, stop, evaluator, allowed, look))
    saved = _gather_saved(setup, result)
    if saved is not None:
        decided = setup.provenance.decided
        save_adapter(
            folder / "adapter",
            result.method,
            saved,
            setup.model,
            settings=decided.settings,
            tokenizer=decided.tokenizer,
            training=training_of(setup, result, look.figures if look is not None else {}),
        )
    _log.info("%s on the %s rows: %s", method.name, result.split, _format_metrics(result.test))
    return result


def _gather_saved(setup: Setup, result: RunResult) -> Tree | None:
    """Return the tree with its saved leaves fetched to the host in process 0; None in other
    processes.
    """
    fixed = fetch_to_host(fixed_leaves(result.method, result.frozen), keep=setup.peers.first)
    trainable = fetch_to_host(result.trainable, keep=setup.peers.first)
    if not setup.peers.first:
        return None
    frozen = paths.map_with_path(
        lambda path, leaf: fixed.get(paths.text(path), leaf), result.frozen
    )
    return combine(trainable, frozen)


def _answers(setup: Setup, params: Tree) -> list[str]:
    """Answer the sample rows by greedy decoding."""
    if not setup.data.samples:
        return []
    prompts, most = (
        [prompt for prompt, _ in setup.data.samples],
        setup.config.evaluation.sample_tokens,
    )
    ends = answer_ends(setup.data.tokenizer)
    answers = generate(setup.model, params, prompts, max_new_tokens=most, eos=ends)
    return [setup.data.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]


def _format_metrics(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in figures.items())


def _finish(setup: Setup, before: Mapping[str, float], result: RunResult, workdir: Path) -> None:
    metric, config = metric_of(setup), setup.config
    name = config.method.name
    (workdir / records.SUMMARY).write_text(
        json.dumps(_summary(setup, before, result, workdir), indent=2) + "\n"
    )
    written = ["adapter/", records.METRICS, records.SUMMARY]
    if config.log.plot:
        plot.draw(workdir / "curves.png", name, workdir, metric)
        written.append("curves.png")
    share = result.trainable_parameters / result.total_parameters
    rows = [
        next_steps.row("before training", f"{before[metric]:.4f}"),
        next_steps.row(name, f"{result.test[metric]:.4f}", share, result.seconds),
    ]
    _log.info(
        "\n%s %s\n%s\n\nin %s: %s",
        setup.data.judged_by,
        metric,
        "\n".join(rows),
        workdir,
        ", ".join(written),
    )
    _log.info("next, use the adapter:\n%s", next_steps.prediction(setup, workdir / "adapter"))
    _log.info("or on the command line:\n%s", next_steps.commands(setup, workdir))


def _summary(
    setup: Setup, before: Mapping[str, float], result: RunResult, workdir: Path
) -> dict[str, Any]:
    """Return the contents of `summary.json`.

    Args:
        setup: prepared run.
        before: metrics before training.
        result: result of the run.
        workdir: folder of the run, with `metrics.jsonl`.
    """
    figures = {
        "validation": records.validation_of(workdir / records.METRICS, result.best_step),
        result.split: result.test,
        "steps": result.steps,
        "best_step": result.best_step,
        "seconds": round(result.seconds, 2),
        "trainable_parameters": result.trainable_parameters,
        "total_parameters": result.total_parameters,
        "method": result.method.as_dict(),
    }
    return {
        "metric": metric_of(setup),
        "before": dict(before),
        "methods": {setup.config.method.name: figures},
        "labels": list(setup.data.labels),
        "problem": setup.data.problem,
        "config": as_dict(setup.config),
        "base_sha256": setup.provenance.identity["base"]["sha256"],
        "jax": jax.__version__,
        "prediction": next_steps.prediction(setup, workdir / "adapter"),
    }
