"""One run of a comparison, in a process of its own: `python -m jaxpeft.compare.worker`, which the
comparison starts.

It is told what to run by a line of JSON on standard input. When that is closed, the comparison has
ended, be it killed, and so the run saves and stops.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxpeft import atomic, data
from jaxpeft.command.running import set_up_logging
from jaxpeft.compare.runs import RESULT, other_rows
from jaxpeft.config.files import parse_config
from jaxpeft.config.schema import Config, as_dict
from jaxpeft.data.tokens.row_encoder import RowEncoder, evaluated_lengths, one_length
from jaxpeft.errors import ConfigError
from jaxpeft.evaluation.forgetting import Forgetting, centroid_accuracy, embeddings
from jaxpeft.logs import log_time
from jaxpeft.processes.exit_codes import run_guarded
from jaxpeft.processes.lock import lock_folder
from jaxpeft.processes.signals import Stopped, StopRequest
from jaxpeft.sharding.mesh import evaluation_rows
from jaxpeft.train import cpu, job, next_steps, optimizers, records
from jaxpeft.train.begin import check_resumable
from jaxpeft.train.evaluator import Evaluator, metric_of
from jaxpeft.train.progress import memory_gb
from jaxpeft.train.run import RunResult
from jaxpeft.train.setup import Setup, prepare


def run(
    config: Config,
    folder: Path,
    stop: StopRequest,
    allowed: Sequence[str] = (),
    *,
    before: bool = False,
) -> dict[str, Any]:
    """Train the method of a config, and measure it.

    Leaves in `folder`: `config.json`, `metrics.jsonl`, `adapter/` and `result.json`; checkpoints
    until that is written.

    Args:
        config: a checked config.
        folder: of the run; what is there already is gone on from.
        stop: a request to stop.
        allowed: fields that may differ from those of the run that is gone on from.
        before: whether the figures before training are measured, too.

    Returns:
        What `result.json` holds.

    Raises:
        JaxpeftError: whatever cannot be used, named.
        Stopped: on request, after saving.
    """
    records.check(config.log)
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):
        setup = prepare(config)
        stop.raise_if_requested()
        check_resumable(setup, config.method, folder, allowed)
        job.log_setup(setup)
        evaluator = Evaluator(setup, stop.raise_if_requested)
        look = job.Before(setup, evaluator, folder / "before.json") if before else None
        options = optimizers.options_for(config)
        result = job.fit(setup, config.method, options, folder, stop, evaluator, allowed, look)
        peak = memory_gb()
        lost = _measure_forgetting(setup, result, evaluator, stop)
        measured = {
            "metric": metric_of(setup),
            "split": result.split,
            "before": look.figures if look is not None else None,
            "test": result.test,
            "steps": result.steps,
            "best_step": result.best_step,
            "seconds": round(result.seconds, 2),
            "trainable_parameters": result.trainable_parameters,
            "total_parameters": result.total_parameters,
            "peak_memory_gb": round(peak, 3),
            "adapter_bytes": sum(
                file.stat().st_size for file in (folder / "adapter").rglob("*.safetensors")
            ),
            "forgetting": (
                lost
                and {
                    "measure": lost.measure,
                    "before": lost.before,
                    "after": lost.after,
                    "lost": lost.lost,
                }
            ),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "prediction": next_steps.prediction(setup, folder / "adapter"),
            "config": as_dict(config),
        }
        atomic.write_text(folder / RESULT, json.dumps(measured, indent=2) + "\n")
        # of a whole model they are many times the adapter, and nothing goes on from them any more
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return measured


def _measure_forgetting(
    setup: Setup, result: RunResult, evaluator: Evaluator, stop: StopRequest
) -> Forgetting | None:
    """Measure what the base could do of the config's other rows, and what the adapted one can."""
    config = setup.config
    examples = other_rows(config)
    if examples is None:
        return None
    with log_time(f"what is forgotten of {examples.rows.name}") as note:
        encoding = RowEncoder(config.data, setup.data.tokenizer, setup.model.config.vocab_size)
        split = encoding(examples, check_dropped=False)
        if config.model.task == "causal_lm":
            before, after = (
                evaluator(*parts, split)["loss"]
                for parts in (({}, setup.params), (result.trainable, result.frozen))
            )
            found = Forgetting("loss", before, after)
        else:

            def accuracy(params: Mapping[str, Any]) -> float:
                lengths = evaluated_lengths(config, setup.data.train, split)
                batches = data.eval_batches(
                    split,
                    evaluation_rows(config, setup.mesh),
                    lengths,
                    setup.data.pad_id,
                    pad_to=one_length(config),
                )
                return centroid_accuracy(
                    *embeddings(setup.model, params, _stop_when_requested(batches, stop))
                )

            found = Forgetting("centroid_accuracy", accuracy(setup.params), accuracy(result.params))
        note(f"{found.measure} {found.before:.4f} before, {found.after:.4f} after")
    return found


def _stop_when_requested(batches: Any, stop: StopRequest) -> Any:
    for batch in batches:
        stop.raise_if_requested()
        yield batch


def main() -> int:
    """Run what standard input says; return the exit code."""
    line = sys.stdin.readline()
    if not line:
        return 0  # the comparison has ended before this run was its turn
    told = json.loads(line)
    # a library imported above has set its own, and ours would be left out
    logging.getLogger().handlers.clear()
    set_up_logging(hushed=not told["traceback"])
    return run_guarded(lambda: _run(told), show_traceback=told["traceback"])


def _run(told: Mapping[str, Any]) -> int:
    config, problems = parse_config(told["config"])
    if config is None:
        raise ConfigError(problems)
    with StopRequest() as stop:
        threading.Thread(target=_stop_with_the_comparison, daemon=True).start()
        cpu.keep_memory()
        try:
            run(config, Path(told["folder"]), stop, told["allowed"], before=told["before"])
        except Stopped as stopped:
            return stopped.exit_code
    return 0


def _stop_with_the_comparison() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
