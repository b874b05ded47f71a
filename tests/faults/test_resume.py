"""Resume identity: a run that goes on is the run that was never stopped, and another run is
refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxpeft.checkpoint import identity
from jaxpeft.processes.signals import Stopped
from jaxpeft.train import begin, loop
from jaxpeft.train.records import read_lines
from tests.faults.conftest import Job, Marks, cut_short, files
from tests.train.runs import write_config, write_rows

STEPS = 20
EVERY = 1 if "JAXPEFT_KILLS" in os.environ else 9
"""After every how many steps a run is stopped: the table of docs/reliability.md is made with each.
"""
TIMING = {"tokens_per_second", "model_flops_per_second", "memory_gb"}


def figures(folder: Path) -> list[dict[str, Any]]:
    """Read the figures of a run, without how long they took."""
    lines = [
        {k: v for k, v in line.items() if k not in TIMING}
        for line in read_lines(folder / "metrics.jsonl")
    ]
    return [line for line in lines if len(line) > 1]


def arrays(folder: Path, step: int) -> dict[str, bytes]:
    """Read the arrays of a checkpoint."""
    import orbax.checkpoint as ocp

    state = ocp.StandardCheckpointer().restore(folder / "checkpoints" / str(step) / "state")
    return {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
        for path, leaf in jax.tree.leaves_with_path(state)
    }


def compile_once(patch: pytest.MonkeyPatch) -> None:
    """Let runs of one config share their compiled step: it is the same program."""
    made: list[Any] = []
    real = loop.compile_steps

    def shared(run: Any, state: Any) -> Any:
        made.extend([] if made else [real(run, state)])
        return made[0]

    patch.setattr(loop, "compile_steps", shared)


def stop_after(patch: pytest.MonkeyPatch, step: int) -> None:
    """Make the next run stop, as SIGTERM would, after so many steps."""
    real = loop.train_step

    def train_step(run: Any, compiled: Any, state: Any, *rest: Any, **named: Any) -> Any:
        if state.step >= step:
            raise Stopped(15)
        return real(run, compiled, state, *rest, **named)

    patch.setattr(loop, "train_step", train_step)


def text_config(folder: Path, models: Mapping[str, Path], **options: Any) -> Path:
    """Write the config of a short run of a language model."""
    rows = write_rows(folder / "rows.jsonl", "text", 60)
    options = {
        "log__tensorboard": False,
        "log__plot": False,
        "optimizer__learning_rate": 1e-2,
        **options,
    }
    return write_config(
        folder / "mine.py", models["llama"], rows, model__task="causal_lm", **options
    )


@pytest.mark.slow
def test_case_18_stopped_after_every_step_it_ends_bit_equal_with_packing_dropout_and_accumulation(
    tiny_models: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marks: Marks
) -> None:
    config = text_config(
        tmp_path,
        tiny_models,
        data__packing=True,
        data__max_length=24,
        train__steps=STEPS,
        train__accumulation=2,
        train__batch_size=4,
        evaluation__every_steps=10,
        checkpoint__every_steps=1,
        checkpoint__keep=STEPS,
        method__dropout=0.1,
    )
    compile_once(monkeypatch)
    whole = Job(config, tmp_path / "whole")
    assert whole.here().returncode == 0
    wanted, told = arrays(whole.workdir, STEPS), figures(whole.workdir)
    for step in range(1, STEPS, EVERY):
        stopped = Job(config, tmp_path / f"stopped{step}")
        shutil.copytree(whole.checkpoints / str(step), stopped.checkpoints / str(step))
        done = stopped.here(f"--config.checkpoint.every_steps={STEPS}")
        marks.exit(done, 0)
        marks.message(done, f"restoring step {step} from {stopped.checkpoints}")
        marks.in_time(done)
        marks.kept(wanted, arrays(stopped.workdir, STEPS))
        assert figures(stopped.workdir) == [
            line for line in told if line["step"] > step or "best_validation/loss" in line
        ]
        marks.same_end(stopped, whole)


@pytest.mark.slow
@pytest.mark.parametrize("legs", [((4, 6),), ((2, 3), (4, 6))], ids=["4", "2 and 4"])
def test_case_19_on_other_numbers_of_devices_the_batches_are_the_same_and_the_losses_close(
    tiny_models: Mapping[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    marks: Marks,
    legs: tuple[tuple[int, int], ...],
) -> None:
    seen: list[str] = []
    put_batch = loop.put_batch

    def placed(mesh: Any, batch: Mapping[str, Any], axis: int) -> Any:
        seen.append(hashlib.sha256(batch["input_ids"].tobytes()).hexdigest())
        return put_batch(mesh, batch, axis)

    monkeypatch.setattr(loop, "put_batch", placed)
    config = text_config(
        tmp_path, tiny_models, train__steps=9, checkpoint__every_steps=3, log__every_steps=1
    )
    whole, job = Job(config, tmp_path / "whole"), Job(config, tmp_path / "run")
    assert whole.here().returncode == 0
    ids, seen[:] = list(seen), []
    for devices, stop in legs:
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            done = job.here(f"--config.mesh.data={devices}")
        marks.exit(done, 143)
        marks.message(done, f"step {stop} is saved", f"on {devices} of 8 device(s)")
    before = files(job.checkpoints / "6")
    done = job.here()
    marks.exit(done, 0)
    marks.in_time(done)
    marks.kept(before, files(job.checkpoints / "6"))
    assert seen == ids
    losses = [
        [line["loss"] for line in figures(of.workdir) if "loss" in line] for of in (whole, job)
    ]
    assert len(losses[0]) == len(losses[1]) == 9
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


CHANGES = [
    pytest.param("--config.train.seed=7", "config.train.seed: was 0, is 7", id="seed"),
    pytest.param(
        "--config.data.max_length=14 --config.data.lengths=(14,)",
        "config.data.max_length: was 16, is 14",
        id="length",
    ),
    pytest.param("--config.train.batch_size=4", "config.train.batch_size: was 8, is 4", id="batch"),
]


@pytest.mark.parametrize(("change", "row"), CHANGES)
def test_case_20_another_seed_length_or_batch_is_refused(
    job: Job, whole: Job, marks: Marks, change: str, row: str
) -> None:
    _refused(job, whole, marks, row, *change.split())


@pytest.mark.parametrize(
    ("change", "row"),
    [
        ("--config.method.rank=4", "config.method.rank: was 8, is 4"),
        ("--config.method.alpha=4", "config.method.alpha: was 16.0, is 4.0"),
        (
            "--config.method.targets=('query',)",
            "config.method.targets: was 'all-linear', is ['query']",
        ),
    ],
)
def test_case_21_another_rank_alpha_or_targets_is_refused(
    job: Job, whole: Job, marks: Marks, change: str, row: str
) -> None:
    _refused(job, whole, marks, row, change)


def _refused(job: Job, whole: Job, marks: Marks, row: str, *change: str) -> None:
    shutil.copytree(whole.workdir, job.workdir)
    before = files(job.workdir)
    done = job.here(*change)
    marks.exit(done, 2)
    marks.message(
        done,
        f"{job.checkpoints} contains step 8 of another run; undo",
        f"\n  {row}",
        "--allow-change=FIELD",
    )
    marks.early(done)
    marks.kept(before, files(job.workdir))


@pytest.mark.slow
def test_case_20_a_change_that_is_allowed_is_told_and_gone_on_with(
    job: Job, whole: Job, marks: Marks
) -> None:
    step = cut_short(job, whole)
    done = job.here(
        "--config.optimizer.learning_rate=1e-3", "--allow-change=optimizer.learning_rate"
    )
    marks.exit(done, 0)
    marks.message(
        done,
        f"resuming from step {step} with a changed config.optimizer.learning_rate: was 0.0002, is"
        " 0.001",
    )
    wrong = job.here("--config.optimizer.learning_rate=1e-3", "--allow-change=learning_rat")
    marks.exit(wrong, 2)
    marks.message(wrong, "--allow-change=learning_rat: no such field")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["rows", "tokenizer", "template"])
@pytest.mark.representatives("rows")
def test_case_20_other_rows_tokenizer_or_template_are_refused(
    tiny_models: Mapping[str, Path], tmp_path: Path, marks: Marks, what: str
) -> None:
    model, rows, template = tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "mine.jinja"
    shutil.copytree(tiny_models["llama"], model)
    turns = [
        {
            "messages": [
                {"role": "user", "content": f"word{i} word{i + 1}"},
                {"role": "assistant", "content": f"word{i + 2}"},
            ]
        }
        for i in range(40)
    ]
    rows.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    template.write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    config = write_config(
        tmp_path / "mine.py",
        model,
        rows,
        model__task="causal_lm",
        data__chat_template=str(template),
        train__steps=2,
        log__tensorboard=False,
        log__plot=False,
    )
    job = Job(config, tmp_path / "run")
    assert job.here().returncode == 0
    if what == "rows":
        rows.write_text(rows.read_text().replace("word30", "word31"))
    elif what == "tokenizer":
        file = model / "tokenizer.json"
        file.write_text(
            file.read_text()
            .replace('"word50": 55', '"word50": 56')
            .replace('"word51": 56', '"word51": 55')
        )
    else:
        template.write_text("{% for m in messages %}{{ m.content }} word1 {% endfor %}")
    before = files(job.workdir)
    done = job.here()
    marks.exit(done, 2)
    field = {
        "rows": "data.sources.train",
        "tokenizer": "data.tokenizer",
        "template": "data.template",
    }[what]
    marks.message(
        done,
        f"{job.checkpoints} contains step 2 of another run; undo these changes",
        f"{field}: was '",
    )
    marks.early(done)
    marks.kept(before, files(job.workdir))
    # another field that may change is no excuse
    allowed = job.here("--config.data.most_dropped=0.06", "--allow-change=data.most_dropped")
    marks.exit(allowed, 2)
    marks.message(allowed, f"{field}: was '")


def test_case_22_a_checkpoint_of_another_dtype_is_refused_not_cast(
    job: Job, whole: Job, marks: Marks, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole.workdir, job.workdir)
    before = files(job.workdir)
    spec = identity.tree_spec
    # adapters are always float32: only a later version of the program could want another dtype
    monkeypatch.setattr(
        begin,
        "tree_spec",
        lambda tree: {k: v.replace("float32", "bfloat16") for k, v in spec(tree).items()},
    )
    done = job.here()
    marks.exit(done, 2)
    marks.message(done, "lora_a: was 'float32[", "is 'bfloat16[")
    marks.early(done)
    marks.kept(before, files(job.workdir))


def test_case_22_the_dtype_of_the_base_is_part_of_the_run(
    job: Job, whole: Job, marks: Marks
) -> None:
    _refused(
        job,
        whole,
        marks,
        "config.model.dtype: was 'auto', is 'bfloat16'",
        "--config.model.dtype=bfloat16",
    )


def test_case_23_other_base_weights_are_refused(
    job: Job, whole: Job, marks: Marks, tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_models["bert"], base)
    _same_base_elsewhere(job, whole, base)
    tensors = load_file(base / "model.safetensors")
    first = sorted(tensors)[0]
    tensors[first] = tensors[first] + np.float32(1e-3)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    before = files(job.workdir)
    done = job.here(f"--config.model.path={base}")
    marks.exit(done, 2)
    marks.message(done, f"base: tensor {first} has changed since the run started")
    marks.early(done)
    marks.kept(before, files(job.workdir))


def _same_base_elsewhere(job: Job, whole: Job, base: Path) -> None:
    shutil.copytree(whole.workdir, job.workdir)
    assert job.here(f"--config.model.path={base}").returncode == 0
