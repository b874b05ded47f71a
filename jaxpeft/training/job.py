"""The main job: baselines, the method, the final table, and the files that are left behind."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxpeft.config.schema import Config, OptimizerConfig
from jaxpeft.core.method import Method
from jaxpeft.hub.adapters import save_adapter
from jaxpeft.methods import METHODS
from jaxpeft.training import optimizers, plot, records
from jaxpeft.training.evaluation import metric_of
from jaxpeft.training.loop import Result, Run, split_for
from jaxpeft.training.setup import Setup, prepare
from jaxpeft.training.signals import StopRequest

_log = logging.getLogger(__name__)


def run(config: Config, workdir: Path) -> dict[str, Result]:
    """Runs a config from end to end.

    Leaves in `workdir`: `config.json`, `metrics.jsonl`, `summary.json`, `curves.png`, `tensorboard/`, `checkpoints/` and
    `adapter/`, and the same for each baseline in a folder of its name.

    Args:
        config: a checked config.
        workdir: the run's folder; what an earlier run of the same command left there is gone on from.

    Returns:
        The results by method name, baselines first.

    Raises:
        JaxpeftError: whatever cannot be used, named.
        Stopped: on SIGTERM or SIGINT, after saving.
    """
    records.check(config.log)
    with StopRequest() as stop:
        setup = prepare(config)
        stop.raise_if_requested()
        _log_setup(setup)
        before = _before(setup, config.method, stop)
        results: dict[str, Result] = {}
        for name in config.baselines:
            rate = config.baseline_learning_rates.get(name, config.optimizer.learning_rate)
            options = replace(config.optimizer, learning_rate=rate)
            results[name] = _fit(setup, METHODS[name](), options, workdir / name, stop)
        results[config.method.name] = _fit(setup, config.method, config.optimizer, workdir, stop)
    _finish(setup, before, results, workdir)
    return results


def _log_setup(setup: Setup) -> None:
    batches, devices = setup.batches, jax.devices()
    _log.info(
        "%d steps of %d rows padded to %s (%.0f%% padding), %d device(s): %s, jax %s",
        setup.steps, setup.config.train.batch_size, " or ".join(map(str, batches.lengths)),
        100 * batches.padding_share, len(devices), devices[0].device_kind, jax.__version__,
    )  # fmt: skip


def _before(setup: Setup, method: Method, stop: StopRequest) -> dict[str, float]:
    """Evaluates the test rows before any training, with the fresh adapter."""
    from jaxpeft.training.evaluation import Evaluator

    trainable, frozen = split_for(setup, method)
    figures = Evaluator(setup, stop.raise_if_requested)(trainable, frozen, setup.test)
    _log.info("before training: %s", _shown(figures))
    return figures


def _fit(setup: Setup, method: Method, options: OptimizerConfig, folder: Path, stop: StopRequest) -> Result:
    if method.name == "head":
        options = optimizers.for_head_alone(options)
    result = Run(setup, method, options, folder, stop).fit()
    save_adapter(folder / "adapter", method, result.params, setup.model, labels=setup.labels)
    _log.info("%s on the test rows: %s", method.name, _shown(result.test))
    return result


def _shown(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in figures.items())


def _finish(setup: Setup, before: Mapping[str, float], results: Mapping[str, Result], workdir: Path) -> None:
    metric, config = metric_of(setup), setup.config
    (workdir / "summary.json").write_text(json.dumps(summary(setup, before, results), indent=2) + "\n")
    left = ["adapter/", "metrics.jsonl", "summary.json"]
    if config.log.plot:
        main = config.method.name
        folders = {name: workdir if name == main else workdir / name for name in results}
        plot.draw(workdir / "curves.png", folders, metric)
        left.append("curves.png")
    rows = [f"  {'before training':<18}{before[metric]:>9.4f}"]
    for name, result in results.items():
        share = result.trainable_parameters / result.total_parameters
        rows.append(f"  {name:<18}{result.test[metric]:>9.4f}   {share:>8.3%} trained   {result.seconds:>6.1f} s")
    _log.info("\ntest %s\n%s\n\nin %s: %s", metric, "\n".join(rows), workdir, ", ".join(left))
    _log.info("next, use the adapter:\n%s", _usage(setup, workdir))


def _usage(setup: Setup, workdir: Path) -> str:
    options = setup.model.options
    labels = f", num_labels={options.num_labels}" if options.num_labels else ""
    pooling = f", pooling={options.pooling!r}" if options.pooling else ""
    return (
        f"  model, params = jaxpeft.load({setup.config.model.path!r}, task={options.task!r}{labels}{pooling})\n"
        f"  method, params = jaxpeft.load_adapter({str(workdir / 'adapter')!r}, model, params)"
    )


def summary(setup: Setup, before: Mapping[str, float], results: Mapping[str, Result]) -> dict[str, Any]:
    """Gives the figures of a run as plain values: what `summary.json` holds."""
    methods = {
        name: {
            "test": result.test,
            "steps": result.steps,
            "best_step": result.best_step,
            "seconds": round(result.seconds, 2),
            "trainable_parameters": result.trainable_parameters,
            "total_parameters": result.total_parameters,
        }
        for name, result in results.items()
    }
    return {"metric": metric_of(setup), "before": dict(before), "methods": methods, "jax": jax.__version__}
