"""Comparisons: runs that are apart, what is not repeated, what fails, and the table."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jaxpeft.compare import plot as comparison_plot
from jaxpeft.compare import runs, worker
from jaxpeft.compare import table as comparison_table
from jaxpeft.config.files import parse_config
from jaxpeft.config.schema import Config, as_dict
from jaxpeft.errors import ConfigError, DataError
from jaxpeft.processes.signals import Stopped, StopRequest
from tests.train.runs import write_rows

MakeConfig = Callable[..., Config]
CANDIDATES = (
    {"method": {"name": "lora", "rank": 2}, "learning_rate": 1e-2},
    {"method": {"name": "bitfit"}},
)

# What stands for a run: it notes that it was started, and does what the file `WORKDIR/NAME` says.
PRETENDED = """
import json, os, pathlib, signal, sys, time
told = json.loads(sys.stdin.readline())
folder, config = pathlib.Path(told["folder"]), told["config"]
(folder.parents[1] / "started").open("a").write(f"{folder.parent.name} {config['train']['seed']}\\n")
act = (folder.parents[1] / f"{folder.parent.name}.act")
exec(act.read_text() if act.exists() else "")
seed = config["train"]["seed"]
figures = {"metric": "accuracy", "test": {"accuracy": 0.9 + seed / 100}, "steps": 3, "best_step": 3, "seconds": 2.0,
           "trainable_parameters": 10, "total_parameters": 1000, "peak_memory_gb": 0.5 + seed, "adapter_bytes": 400,
           "forgetting": None, "device": "pretended", "jax": "0", "config": config}
(folder / "result.json").write_text(json.dumps(figures))
"""
FAILS = "sys.exit('some line\\njaxpeft: it is broken\\nin two places')"


@pytest.fixture
def config(make_config: MakeConfig) -> Config:
    return make_config(compare__candidates=CANDIDATES, compare__seeds=(0, 3))


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "PROGRAM", ("-c", PRETENDED))
    monkeypatch.setattr(runs, "_POLL", 0.02)
    monkeypatch.setattr(comparison_plot, "draw", lambda path, made: path.write_bytes(b""))


def run(config: Config, folder: Path, stop: StopRequest | None = None) -> dict[str, str]:
    return {str(one): why for one, why in runs.run(config, folder, stop or StopRequest()).items()}


def started(folder: Path) -> list[str]:
    return (folder / "started").read_text().splitlines()


@pytest.mark.usefixtures("pretended")
def test_every_candidate_runs_with_every_seed_and_its_own_rates_and_none_twice(
    config: Config, tmp_path: Path
) -> None:
    folder = tmp_path / "all"
    assert run(config, folder) == {}
    assert started(folder) == ["lora 0", "bitfit 0", "lora 3", "bitfit 3"]
    for name, rate in (("lora", 1e-2), ("bitfit", config.optimizer.learning_rate)):
        result = json.loads((folder / name / "seed-3" / "result.json").read_text())
        assert (
            result["config"]["method"]["name"],
            result["config"]["optimizer"]["learning_rate"],
        ) == (name, rate)
    written = {name: (folder / name).read_bytes() for name in ("comparison.md", "comparison.json")}
    assert run(config, folder) == {}
    assert len(started(folder)) == 4
    assert written == {name: (folder / name).read_bytes() for name in written}


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize(
    ("act", "why"),
    [
        (FAILS, "it is broken\nin two places"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
        ("sys.exit(7)", "exited with code 7"),
    ],
)
def test_a_run_that_fails_is_told_and_the_others_go_on(
    config: Config, tmp_path: Path, act: str, why: str
) -> None:
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / "lora.act").write_text(act)
    assert run(config, folder) == {"lora, seed 0": why, "lora, seed 3": why}
    assert len(started(folder)) == 4
    table = (folder / "comparison.md").read_text()
    assert "| lora (0 of 2 runs) | - |" in table
    assert "| bitfit | 0.9150 ± 0.0212 |" in table
    assert f"* lora, seed 3: {' '.join(why.split())}" in table
    assert "lora, seed 0" in json.loads((folder / "comparison.json").read_text())["failed"]
    # mended, they are tried again, and they alone
    (folder / "lora.act").unlink()
    assert run(config, folder) == {}
    assert started(folder)[4:] == ["lora 0", "lora 3"]
    assert "Failed" not in (folder / "comparison.md").read_text()


@pytest.mark.usefixtures("pretended")
def test_what_a_run_says_is_shown_and_kept(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "said"
    folder.mkdir()
    (folder / "lora.act").write_text("print('step 5/9', file=sys.stderr)")
    run(config, folder)
    assert capsys.readouterr().err.count("step 5/9\n") == 2
    assert (folder / "lora" / "seed-0" / "log.txt").read_text() == "step 5/9\n"


@pytest.mark.usefixtures("pretended")
def test_a_request_to_stop_is_passed_on_once_and_the_table_is_written(
    config: Config, tmp_path: Path
) -> None:
    folder = tmp_path / "stopped"
    folder.mkdir()
    (folder / "bitfit.act").write_text(
        "def end(*_):\n  open(folder / 'asked', 'a').write('x'); time.sleep(0.3); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, end); os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    )
    with StopRequest() as stop, pytest.raises(Stopped):
        run(config, folder, stop)
    assert started(folder) == ["lora 0", "bitfit 0"]
    assert (folder / "bitfit" / "seed-0" / "asked").read_text() == "x"
    assert "| lora (1 of 2 runs) | 0.9000 |" in (folder / "comparison.md").read_text()


@pytest.mark.usefixtures("pretended")
def test_the_next_process_is_there_before_its_turn_and_ends_if_that_never_comes(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[runs.subprocess.Popen[str]] = []
    start = runs._start
    monkeypatch.setattr(
        runs, "_start", lambda one: begun.append((found := start(one)).process) or found
    )
    finished = runs._complete
    there: list[tuple[int, int]] = []

    def counted(*args: Any) -> str:
        there.append((len(begun), sum(process.poll() is None for process in begun)))
        return finished(*args)

    monkeypatch.setattr(runs, "_complete", counted)
    folder = tmp_path / "run"
    assert run(config, folder) == {}
    assert there == [(2, 2), (3, 2), (4, 2), (4, 1)]
    begun.clear()
    folder = tmp_path / "stopped"
    folder.mkdir()
    (folder / "lora.act").write_text(
        "os.kill(os.getppid(), signal.SIGTERM); time.sleep(0.3); sys.exit(143)"
    )
    with StopRequest() as stop, pytest.raises(Stopped):
        run(config, folder, stop)
    assert started(folder) == ["lora 0"]
    assert len(begun) == 2 and all(process.poll() is not None for process in begun)


@pytest.mark.usefixtures("pretended")
def test_the_end_says_what_was_before_what_came_of_each_and_what_to_do_next(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    more = {
        "lora": "'prediction': '  print(1)', 'before': None",
        "bitfit": "'before': {'accuracy': 0.5}",
    }
    for name in more:
        told = f"told['before'] == {name == 'lora'} or sys.exit(9)"
        (folder / f"{name}.act").write_text(
            f"{told}\ndump = json.dumps\njson.dumps = lambda made: dump({{**made, {more[name]}}})"
        )
    with caplog.at_level("INFO", logger="jaxpeft"):
        assert run(config, folder) == {}
    assert (
        "\ntest accuracy\n  before training   0.5000 ± 0.0000\n  lora              0.9150 ± 0.0212"
        "     1.000% trained      2.0 s\n  bitfit            0.9150 ± 0.0212     1.000% trained   "
        f"   2.0 s\n\nin {folder}: comparison.html, comparison.md, comparison.json, comparison.png, and"
        " adapter/, metrics.jsonl of each run in NAME/seed-N/\nnext, use the adapter of lora:\n  print(1)"
        in caplog.text
    )
    assert "Before training: accuracy 0.5000 ± 0.0000.\n" in (folder / "comparison.md").read_text()


@pytest.mark.usefixtures("pretended")
def test_results_of_another_config_are_refused_with_every_field(
    config: Config, tmp_path: Path
) -> None:
    run(config, tmp_path / "run")
    other = replace(
        config,
        train=replace(config.train, steps=9),
        compare=replace(
            config.compare, candidates=config.compare.candidates[:1], forgetting="x.jsonl"
        ),
    )
    with pytest.raises(ConfigError) as error:
        run(other, tmp_path / "run")
    assert len(error.value.problems) == 4  # two seeds of the one candidate that is left
    assert (
        "seed-3: config.train.steps: was 6, is 9; give another --workdir, or delete this folder"
        in str(error.value)
    )
    assert "config.compare.forgetting: was '', is 'x.jsonl'" in str(error.value)
    more = replace(config, compare=replace(config.compare, seeds=(0, 3, 4)))
    assert run(more, tmp_path / "run") == {}
    assert started(tmp_path / "run")[4:] == ["lora 4", "bitfit 4"]


@pytest.mark.usefixtures("pretended")
def test_rows_that_no_run_could_read_are_refused_before_the_first(
    config: Config, tmp_path: Path
) -> None:
    for changed, text in (
        (replace(config, data=replace(config.data, train="gone.jsonl")), "gone.jsonl"),
        (replace(config, compare=replace(config.compare, forgetting="lost.jsonl")), "lost.jsonl"),
        (
            replace(
                config,
                compare=replace(
                    config.compare, forgetting=str(write_rows(tmp_path / "t.jsonl", "text"))
                ),
            ),
            "label",
        ),
    ):
        with pytest.raises(DataError, match=text):
            run(changed, tmp_path / "run")
    assert not (tmp_path / "run" / "started").exists()


def test_two_comparisons_at_once_in_one_folder_are_refused(config: Config, tmp_path: Path) -> None:
    from jaxpeft.processes.lock import lock_folder

    with lock_folder(tmp_path), pytest.raises(ConfigError, match="another run uses it"):
        run(config, tmp_path)


# ------------------------------------------------------------------------------------------ one run


@pytest.mark.slow
def test_a_run_leaves_its_figures_and_no_checkpoints(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "others.jsonl", "single", 30)
    config = make_config(compare__forgetting=str(rows), optimizer__head_learning_rate=0.1)
    folder = tmp_path / "run"
    result = worker.run(config, folder, StopRequest(), before=True)
    assert result["before"]["accuracy"] < 0.7
    assert f"jaxpeft.load_adapter('{folder}/adapter', model, params)" in result["prediction"]
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result))
    assert not (folder / "checkpoints").exists()
    assert result["config"] == as_dict(config)
    assert result["metric"] == "accuracy"
    assert result["test"]["accuracy"] >= 0
    assert (
        result["adapter_bytes"] == (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    )
    assert 0 < result["trainable_parameters"] < result["total_parameters"]
    assert result["peak_memory_gb"] > 0
    measured = result["forgetting"]
    assert measured["measure"] == "centroid_accuracy"
    assert measured["lost"] == pytest.approx(measured["before"] - measured["after"])


@pytest.mark.slow
def test_a_head_forgets_nothing_and_a_ruined_base_does(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    rows = str(write_rows(tmp_path / "others.jsonl", "single", 60))
    lost = {
        name: worker.run(
            make_config(
                method=name,
                compare__forgetting=rows,
                optimizer__learning_rate=rate,
                train__steps=12,
            ),
            tmp_path / name,
            StopRequest(),
        )["forgetting"]["lost"]
        for name, rate in (("head", 1e-2), ("full", 1.0))
    }
    assert lost["head"] == 0
    assert lost["full"] > 0.05


@pytest.mark.slow
def test_of_a_language_model_the_loss_of_other_texts_is_compared(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    rows = str(write_rows(tmp_path / "others.jsonl", "text", 20))
    result = worker.run(
        make_config("text", compare__forgetting=rows), tmp_path / "run", StopRequest()
    )
    assert result["metric"] == "loss"
    measured = result["forgetting"]
    assert measured["measure"] == "loss"
    assert measured["lost"] == pytest.approx(measured["after"] - measured["before"])
    assert measured["lost"] < 0  # it has learned the words that the other texts are made of, too


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_and_ends_the_same(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(checkpoint__every_steps=2)
    whole = worker.run(config, tmp_path / "whole", StopRequest())
    stop = StopRequest()
    with monkeypatch.context() as patch:
        patch.setattr(
            stop, "raise_if_requested", _once_there(tmp_path / "run" / "checkpoints" / "2")
        )
        with pytest.raises(Stopped):
            worker.run(config, tmp_path / "run", stop)
    assert not (tmp_path / "run" / "result.json").exists()
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    assert worker.run(config, tmp_path / "run", StopRequest())["test"] == whole["test"]


def _once_there(path: Path) -> Callable[[], None]:
    def raise_if_requested() -> None:
        if path.exists():
            raise Stopped(15)

    return raise_if_requested


# ---------------------------------------------------------------------------------------- the table


def results(name: str, values: Sequence[float], **more: Any) -> dict[str, list[dict[str, Any]]]:
    base = {
        "metric": "accuracy",
        "steps": 3,
        "best_step": 3,
        "seconds": 61.4,
        "trainable_parameters": 1_000,
        "total_parameters": 10_000,
        "peak_memory_gb": 1.5,
        "adapter_bytes": 4_100,
        "device": "cpu",
        "jax": "0.10",
        "forgetting": {"measure": "centroid_accuracy", "before": 0.8, "after": 0.75, "lost": 0.05},
    }
    return {
        name: [
            {
                **base,
                **more,
                "test": {"accuracy": value, "loss": 2 * value},
                "config": {"train": {"seed": seed}},
            }
            for seed, value in enumerate(values)
        ]
    }


def candidates(make_config: MakeConfig, *names: str) -> Config:
    return make_config(
        compare__candidates=[{"method": {"name": name}} for name in names],
        compare__seeds=(0, 1),
        compare__forgetting="a/b/c.jsonl",
    )


def test_the_table_has_means_spreads_and_shares(make_config: MakeConfig, tmp_path: Path) -> None:
    config = candidates(make_config, "full", "lora")
    made = {
        **results("full", (0.8, 0.9), trainable_parameters=10_000, adapter_bytes=9e7),
        **results("lora", (0.8, 0.8)),
    }
    comparison_table.write(config, made, {}, tmp_path)
    table = (tmp_path / "comparison.md").read_text().splitlines()
    assert (
        table[2]
        == "| method | accuracy | 95% interval | of full | trained | of all | peak memory |"
        " time | file | forgetting |"
    )
    assert table[4:6] == [
        (
            "| full | 0.8500 ± 0.0707 | 0.2147 to 1.4853 | 100.0% | 10,000 | 100.000% | 1.50 GB | 61 s | 90.00 MB |"
            " +0.0500 ± 0.0000 |"
        ),
        (
            "| lora | 0.8000 ± 0.0000 | 0.8000 to 0.8000 | 94.1% | 1,000 | 10.000% | 1.50 GB | 61 s | 4.1 kB | +0.0500"
            " ± 0.0000 |"
        ),
    ]
    assert "nearest-class-mean accuracy on b/c.jsonl" in "\n".join(table)
    values = json.loads((tmp_path / "comparison.json").read_text())
    assert values["candidates"]["lora"]["figure"] == {
        "mean": 0.8,
        "deviation": 0.0,
        "interval": [0.8, 0.8],
        "values": [0.8, 0.8],
    }
    assert math.isclose(values["candidates"]["lora"]["of_reference"], 0.8 / 0.85)
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_reference_or_rows_for_forgetting_the_table_has_no_such_column(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = candidates(make_config, "lora", "bitfit")
    made = {**results("lora", (0.5,), metric="loss", forgetting=None), "bitfit": []}
    comparison_table.write(config, made, {"bitfit, seed 0": "why\nnot"}, tmp_path)
    table = (tmp_path / "comparison.md").read_text()
    assert "| method | loss (lower is better) | 95% interval | trained |" in table
    assert "| lora (1 of 2 runs) | 1.0000 | - | 1,000 |" in table
    assert "| bitfit (0 of 2 runs) | - | - | - | - | - | - | - |" in table
    assert "* bitfit, seed 0: why not" in table
    assert "orgetting" not in table


# --------------------------------------------------------------------------------------- the config


def problems(values: Mapping[str, Any], **compare: Any) -> list[str]:
    return parse_config({**values, "compare": {"candidates": CANDIDATES, **compare}})[1]


def test_every_problem_of_a_comparison_is_told_at_once(config: Config) -> None:
    values = as_dict(config)
    wrong = (
        {"method": {"name": "lora", "rank": 0}},
        {"method": {"name": "lorra"}},
        {"name": "a/b"},
        {"name": "full"},
        {"method": {"name": "head"}, "learning_rate": 1e-3},
        {"learning_rate": -1.0},
        {"rate": 1},
    )
    told = "\n".join(problems(values, candidates=wrong, seeds=(-1,)))
    for text in (
        "config.compare.candidates[0].method.rank: must be at least 1, is 0",
        "config.compare.candidates[1].method.name: 'lorra' is not a method; did you mean 'lora'",
        "config.compare.candidates[2].name: a/b: must be 1 to 64 letters",
        (
            "config.compare.candidates[3].name: 'full' is the name of a method, but this candidate's"
            " method is 'lora'; set method.name, or use another name"
        ),
        (
            "config.compare.candidates[4].learning_rate: 'head' trains only the head; set"
            " head_learning_rate"
        ),
        "config.compare.candidates: 2 more of its values are invalid",
        "config.compare.seeds: must be at least 0, is -1",
    ):
        assert text in told
    told = "\n".join(problems(values, candidates=wrong[5:], seeds=(0,)))
    assert "config.compare.candidates[0].learning_rate: must be above 0" in told
    assert "config.compare.candidates[1].rate: no such option" in told


@pytest.mark.parametrize(
    ("compare", "text"),
    [
        (
            {"candidates": [*CANDIDATES, CANDIDATES[1]]},
            "candidates: 2 are named 'bitfit'; give each a different name",
        ),
        ({"seeds": ()}, "seeds: is empty; give at least one"),
        ({"seeds": (1, 2, 1)}, "seeds: lists 1 2 times; list it once"),
        (
            {"reference": "lore"},
            "reference: 'lore' is not a candidate; did you mean 'lora'? (known: lora, bitfit)",
        ),
    ],
)
def test_what_does_not_go_together_in_a_comparison(
    config: Config, compare: dict[str, Any], text: str
) -> None:
    assert problems(as_dict(config), **compare) == [f"config.compare.{text}"]


def test_what_does_not_go_with_a_comparison(config: Config) -> None:
    values = as_dict(config)
    values["baselines"], values["method"]["rank"] = ["head"], 3
    told = "\n".join(problems(values))
    assert "config.baselines: is removed: a run trains one method; list the methods instead" in told
    del values["baselines"]
    told = "\n".join(problems(values))
    assert "config.method: lora would not be trained, since a comparison trains only its" in told


def test_a_candidate_without_a_method_has_that_of_the_config(config: Config) -> None:
    values = as_dict(config)
    values["method"]["rank"] = 3
    values["compare"]["candidates"] = [{"method": {"name": "head"}}, {"learning_rate": 1e-3}]
    made, found = parse_config(values)
    assert found == [] and made is not None
    assert made.compares_method and not config.compares_method
    assert made.compare.titles == ("head", "lora")
    assert made.run_of(made.compare.candidates[1], 0).method == made.method
    assert parse_config(as_dict(made)) == (made, [])


def test_a_candidate_that_does_not_suit_the_task_is_named(make_config: MakeConfig) -> None:
    values = as_dict(make_config("text"))
    told = problems(values, candidates=[{"method": {"name": "lora"}}, {"method": {"name": "head"}}])
    assert told == [
        (
            "config.compare.candidates[1], head: method.name: 'head' trains only a classification head,"
            " but the task is 'causal_lm'; use another method"
        )
    ]


def test_a_config_with_candidates_comes_back_from_its_plain_values(config: Config) -> None:
    again, found = parse_config(as_dict(config))
    assert found == []
    assert again == config
    assert config.compare.compared_with is None
