"""Model folders, targets and adapters that do not fit, and files made to do harm: refused by name,
nothing loaded by half.
"""

from __future__ import annotations

import json
import pickle
import resource
import shutil
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxpeft
from jaxpeft.core import paths
from tests.faults.conftest import GOOD, Done, Job, Marks, command, cut_short, files, library
from tests.faults.test_input import refused
from tests.hub.helpers import QUERY, edit_json

WEIGHTS = "model.safetensors"
Tensors = dict[str, np.ndarray[Any, Any]]
Models = Mapping[str, Path]
SECONDS, MEGABYTES = 5.0, 1024


@pytest.fixture
def model(tiny_models: Models, tmp_path: Path) -> Path:
    """A copy of the tiny BERT, to be damaged."""
    return Path(shutil.copytree(tiny_models["bert"], tmp_path / "model"))


def change(file: Path, edit: Callable[[Tensors], Any]) -> None:
    """Change the tensors of a file."""
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------ weights


def test_case_32_every_misfit_of_the_weights_is_in_one_message_with_the_nearest_names(
    job: Job, marks: Marks, model: Path
) -> None:
    name = next(
        name
        for name in load_file(model / WEIGHTS)
        if name.endswith("layer.0.attention.self.query.weight")
    )
    prefix = name.removesuffix("attention.self.query.weight")

    def spoil(tensors: Tensors) -> None:
        tensors[f"{prefix}attention.self.qury.weight"] = tensors.pop(name)
        tensors[f"{prefix}output.dense.weight"] = np.zeros((3, 5), np.float32)
        tensors[f"{prefix}output.dense.bias"] = np.zeros(32, np.int64)
        tensors["stray.weight"] = np.zeros(3, np.float32)

    change(model / WEIGHTS, spoil)
    refused(
        job,
        marks,
        f"{model}: the weights do not fit the model in config.json (5 problems)",
        f"missing: bert.{name}; did you mean",
        "misshaped: ",
        "is [3, 5], must be ",
        "not floating: ",
        "is int64",
        "extra: stray.weight",
        "did you mean",
        arguments=(f"--config.model.path={model}",),
        most=7,
    )


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (_cut, "truncated: 100 bytes are missing"),
    "pointer": (
        lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "a Git LFS pointer, not the weights",
    ),
    "page": (
        lambda f: f.write_text("<!DOCTYPE html><html>403</html>"),
        "an HTML or XML page, not the weights",
    ),
    "empty": (lambda f: f.write_bytes(b""), "not safetensors, or truncated (0 bytes)"),
    "gone": (
        lambda f: f.unlink(),
        "no model.safetensors and no model.safetensors.index.json; the folder contains",
    ),
}


@pytest.mark.parametrize("how", FILES)
def test_case_32_a_file_that_holds_something_else_is_refused_saying_what(
    job: Job, marks: Marks, model: Path, how: str
) -> None:
    spoil, said = FILES[how]
    spoil(model / WEIGHTS)
    refused(job, marks, str(model), said, arguments=(f"--config.model.path={model}",))


@pytest.mark.parametrize("how", ["missing", "twice"])
def test_case_32_a_shard_that_is_missing_or_a_tensor_in_two_is_refused(
    job: Job, marks: Marks, model: Path, how: str
) -> None:
    tensors = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, of in parts.items():
        save_file(
            {name: tensors[name] for name in (names if how == "twice" and file[0] == "b" else of)},
            model / file,
        )
    where = {name: file for file, of in parts.items() for name in of}
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": where}))
    if how == "missing":
        (model / "b.safetensors").unlink()
    said = (
        ("b.safetensors", "no such file")
        if how == "missing"
        else (names[0], "a.safetensors", "b.safetensors")
    )
    refused(job, marks, *said, arguments=(f"--config.model.path={model}",), most=7)


# ------------------------------------------------------------------------------------------ targets


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("qery,value", ("config.method.targets: 'qery' matches no site; did you mean 'query'",)),
        (
            "LayerNorm,query",
            (
                (
                    "config.method.targets: 'LayerNorm' matches bert.embeddings.LayerNorm, which is a"
                    " norm site; lora adapts linear"
                ),
            ),
        ),
        ("encoder,query", ("config.method.targets: 'encoder' matches no site",)),
        (
            r".*\.q",
            (
                "the regular expression '.*\\\\.q' matches no full site name",
                "the model has 17 site names, such as",
            ),
        ),
        ("(", ("config.method.targets: '(' is not a regular expression",)),
    ],
    ids=["name", "norm", "module", "expression", "broken"],
)
def test_case_33_targets_that_match_nothing_are_refused_with_what_there_is(
    job: Job, marks: Marks, targets: str, said: tuple[str, ...]
) -> None:
    refused(job, marks, *said, arguments=(f"--config.method.targets={targets}",))


def test_case_33_modules_to_save_that_are_none_are_refused(job: Job, marks: Marks) -> None:
    said = "config.method.modules_to_save: 'poler' matches no module of the model"
    refused(job, marks, said, arguments=("--config.method.modules_to_save=poler",))


# ----------------------------------------------------------------------------------------- adapters


@pytest.fixture
def adapter(whole: Job, tmp_path: Path) -> Path:
    """A copy of the adapter that a run has left."""
    return Path(shutil.copytree(whole.workdir / "adapter", tmp_path / "adapter"))


def load_it(
    marks: Marks, models: Models, folder: Path, *texts: str, base: Path | None = None
) -> None:
    """Loading the adapter is refused; the base that it was to be loaded onto, and its files, are as
    they were.
    """
    model, params = jaxpeft.load(
        base or models["bert"], task="sequence_classification", num_labels=3
    )
    leaves, there = (
        {path: np.asarray(leaf).tobytes() for path, leaf in paths.walk(params)},
        files(folder),
    )
    done = library(lambda: jaxpeft.load_adapter(folder, model, params))
    marks.exit(done, 2)
    marks.message(done, *texts)
    marks.early(done)
    assert {path: np.asarray(leaf).tobytes() for path, leaf in paths.walk(params)} == leaves
    marks.kept(there, files(folder))


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"peft_type": "POLY"}, "peft_type 'POLY' is not supported (supported: LORA, "),
    "qalora": (
        {"use_qalora": True},
        "use_qalora: True is not supported by the lora method; nothing was loaded",
    ),
    "alora": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens: [1] is not supported"),
    "later": ({"use_something_new": True}, "use_something_new: True is not supported"),
    "init": ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' changed the base"),
    "rank": ({"r": 0}, "lora.rank: must be at least 1, is 0"),
    "alpha": ({"lora_alpha": "much"}, "lora.alpha: must be a number, is 'much'"),
    "pattern": ({"rank_pattern": {"qery": 4}}, "rank_pattern: 'qery' matches no adapted site"),
    "other rank": ({"rank_pattern": {"query": 4}}, "misshaped: "),
    "infinite": ({"lora_alpha": float("inf")}, "must be a finite number"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_case_34_an_adapter_with_what_is_not_known_is_refused_by_name(
    marks: Marks, tiny_models: Models, adapter: Path, what: str
) -> None:
    values, said = CONFIGS[what]
    edit_json(adapter / "adapter_config.json", lambda config: config.update(values))
    load_it(marks, tiny_models, adapter, str(adapter), said)


def test_case_34_an_adapter_without_alpha_is_refused(
    marks: Marks, tiny_models: Models, adapter: Path
) -> None:
    edit_json(adapter / "adapter_config.json", lambda config: config.pop("lora_alpha"))
    load_it(
        marks,
        tiny_models,
        adapter,
        f"{adapter}/adapter_config.json: lora_alpha: is not set; use the value of",
    )


@pytest.mark.parametrize("how", ["missing", "extra", "misshaped", "not finite"])
def test_case_34_an_adapter_whose_tensors_do_not_fit_is_not_loaded_by_half(
    marks: Marks, tiny_models: Models, adapter: Path, how: str
) -> None:
    def spoil(tensors: Tensors) -> None:
        name = f"{QUERY}.lora_A.weight"
        if how == "missing":
            del tensors[name]
        elif how == "extra":
            tensors[f"{QUERY}.lora_C.weight"] = np.zeros((8, 32), np.float32)
        elif how == "misshaped":
            tensors[name] = tensors[name][:, :-1].copy()
        else:
            tensors[name][0, 0] = np.nan

    change(adapter / "adapter_model.safetensors", spoil)
    load_it(
        marks, tiny_models, adapter, f"{adapter}/adapter_model.safetensors: {how}: ", "self.query"
    )


def test_case_34_an_adapter_of_another_base_is_refused(
    marks: Marks, tiny_models: Models, adapter: Path, model: Path
) -> None:
    change(
        model / WEIGHTS,
        lambda tensors: tensors.update({k: v + 1 for k, v in list(tensors.items())[:1]}),
    )
    load_it(marks, tiny_models, adapter, "the adapter was trained on another base (", base=model)


# ------------------------------------------------------------------------------------------ hostile


class Canary:
    """What leaves a file behind when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._file,)


@pytest.mark.parametrize("name", [WEIGHTS, "pytorch_model.bin"])
def test_case_38_a_pickle_is_refused_and_not_read(
    job: Job, marks: Marks, model: Path, tmp_path: Path, name: str
) -> None:
    canary = tmp_path / "canary"
    (model / WEIGHTS).unlink()
    (model / name).write_bytes(pickle.dumps({"x": Canary(canary)}))
    refused(job, marks, str(model), "pickle", arguments=(f"--config.model.path={model}",))
    assert not canary.exists()


def test_case_38_a_pickled_adapter_is_refused_and_not_read(
    marks: Marks, tiny_models: Models, adapter: Path, tmp_path: Path
) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps({"x": Canary(tmp_path / "canary")}))
    load_it(
        marks,
        tiny_models,
        adapter,
        "the folder contains adapter_model.bin, a pickle, which is never read",
    )
    assert not (tmp_path / "canary").exists()


@pytest.mark.slow
def test_case_38_code_in_a_model_folder_is_not_run_whatever_its_config_asks(
    job: Job, whole: Job, marks: Marks, model: Path, tmp_path: Path
) -> None:
    (model / "modeling_mine.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    automatic = {
        "AutoConfig": "modeling_mine.Config",
        "AutoModel": "modeling_mine.Model",
        "AutoTokenizer": ["modeling_mine.T", None],
    }
    for file in ("config.json", "tokenizer_config.json"):
        edit_json(
            model / file, lambda config: config.update(auto_map=automatic, trust_remote_code=True)
        )
    done = job.here(f"--config.model.path={model}")
    marks.in_time(done)
    assert not (tmp_path / "canary").exists()
    assert done.returncode == 0, done.stderr
    marks.same_end(job, whole)


def test_case_38_trust_remote_code_is_refused_by_name(job: Job, marks: Marks) -> None:
    said = (
        "config.model.trust_remote_code: refused: no code of a model, a data set or an adapter is"
        " ever run; remove it"
    )
    refused(job, marks, said, arguments=("--config.model.trust_remote_code=true",))


@pytest.mark.slow
def test_case_38_code_in_a_checkpoint_is_not_run(
    job: Job, whole: Job, marks: Marks, tmp_path: Path
) -> None:
    step = cut_short(job, whole)
    code = f"open({str(tmp_path / 'canary')!r}, 'w')\n"
    for folder in (job.workdir, job.checkpoints, job.checkpoints / str(step)):
        for name in ("config.py", "sitecustomize.py", "conftest.py"):
            (folder / name).write_text(code)
    done = job()
    marks.exit(done, 0)
    marks.message(done, f"restoring step {step}")
    assert not (tmp_path / "canary").exists()
    marks.same_end(job, whole)


def peak_of(job: Job, *arguments: str) -> tuple[Done, float]:
    """Run the command in a fresh Python; return its peak of memory, too, in MB: the kernel's, of
    this program alone.
    """
    code = (
        "import sys; from jaxpeft.train.__main__ import main; code ="
        " main(sys.argv[1:])\nprint('PEAK',"
        " open('/proc/self/status').read().partition('VmHWM:')[2].split()[0], file=sys.stderr);"
        " sys.exit(code)"
    )
    done = command(
        ["-c", code, "--config", str(job.config), "--workdir", str(job.workdir), *arguments]
    )
    return done, int(done.stderr.rpartition("PEAK ")[2]) / 1024


TEMPLATES = {
    "internals": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "does something forbidden"),
    "endless": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "takes more than 2 s",
    ),
    "range": (
        "{% for i in range(10**9) %}{% endfor %}",
        "does something forbidden: Range too big",
    ),
    "memory": ("{{ '%4000000000d' % 1 }}", "takes too much memory"),
}


@pytest.mark.parametrize("how", TEMPLATES)
@pytest.mark.representatives("internals", "range", "memory")
def test_case_40_a_hostile_template_is_refused_in_time(chats: Any, marks: Marks, how: str) -> None:
    template, said = TEMPLATES[how]
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(
        chats([GOOD] * 300, template),
        marks,
        "rows.jsonl:",
        "the chat template",
        said,
        "fix the template",
        most=21,
    )
    assert time.process_time() - began < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


def test_case_40_a_catastrophic_expression_is_refused_in_time(job: Job, marks: Marks) -> None:
    began = time.process_time()
    said = (
        "config.method.targets: the regular expression '(.|..|...)*[^\\\\w.]' takes more than 2 s"
        " to match the model's module names"
    )
    refused(job, marks, said, arguments=(r"--config.method.targets=(.|..|...)*[^\w.]",))
    assert time.process_time() - began < SECONDS


@pytest.mark.slow
def test_case_40_a_header_of_10_gb_is_refused_without_reading_it(
    job: Job, marks: Marks, model: Path
) -> None:
    with (model / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", 10 << 30) + b"{")
        file.truncate(8 + (10 << 30))  # a hole: it takes no place on the disk
    began = time.process_time()
    refused(job, marks, f"{model}/{WEIGHTS}: ", arguments=(f"--config.model.path={model}",))
    assert time.process_time() - began < SECONDS
    done, peak = peak_of(job, f"--config.model.path={model}")
    assert (done.returncode, peak < MEGABYTES) == (2, True), (done.stderr, peak)
