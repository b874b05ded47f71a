"""Bottleneck adapters go both ways between jaxpeft and the real `adapters` library, with the same
logits.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxpeft
from jaxpeft.errors import AdapterError, ConfigError
from tests.conformance.conftest import moved
from tests.conftest import ROOT
from tests.core.helpers import load, run
from tests.hub.helpers import edit_json
from tests.models.conftest import LABELS, make_batch

LIBRARY = ROOT / ".venv" / "adapters"
MARK = 1e-4
BATCH = make_batch("right")
CLASSES = {
    ("bert", "sequence_classification"): "BertForSequenceClassification",
    ("bert", "token_classification"): "BertForTokenClassification",
    ("bert", "encoder"): "BertModel",
    ("roberta", "sequence_classification"): "RobertaForSequenceClassification",
    ("distilbert", "sequence_classification"): "DistilBertForSequenceClassification",
    ("llama", "causal_lm"): "LlamaForCausalLM",
    ("llama", "sequence_classification"): "LlamaForSequenceClassification",
    ("qwen2", "causal_lm"): "Qwen2ForCausalLM",
}
HOUSLBY = jaxpeft.Adapter(placement="houlsby", reduction_factor=4, non_linearity="swish")
PFEIFFER = jaxpeft.Adapter(reduction_factor=4)
PARALLEL = jaxpeft.Adapter(placement="parallel", reduction_factor=2, scaling=4.0)
COMPACTER = jaxpeft.Compacter(reduction_factor=4, rule_range=0.1)


@dataclasses.dataclass(frozen=True)
class Case:
    """One adapter on one model, as both sides call it; `options` are the library's, of `config`."""

    method: Any
    config: str
    options: dict[str, Any]
    kind: str = "bert"
    task: str = "sequence_classification"
    size: float = 0.2
    head: dict[str, Any] | None = None


HOUSLBY_ = ("DoubleSeqBnConfig", {"reduction_factor": 4})
PFEIFFER_ = ("SeqBnConfig", {"reduction_factor": 4})
PARALLEL_ = ("ParBnConfig", {"reduction_factor": 2})
COMPACTER_ = ("CompacterConfig", {"reduction_factor": 4, "phm_init_range": 0.1})
CASES = {
    "houlsby-bert": Case(HOUSLBY, *HOUSLBY_),
    "houlsby-llama": Case(HOUSLBY, *HOUSLBY_, "llama", "causal_lm"),
    "houlsby-distilbert": Case(HOUSLBY, *HOUSLBY_, "distilbert"),
    "pfeiffer-bert": Case(PFEIFFER, *PFEIFFER_),
    "pfeiffer-tokens": Case(PFEIFFER, *PFEIFFER_, task="token_classification"),
    "pfeiffer-encoder": Case(PFEIFFER, *PFEIFFER_, task="encoder"),
    "pfeiffer-roberta": Case(PFEIFFER, *PFEIFFER_, "roberta"),
    "pfeiffer-llama": Case(PFEIFFER, *PFEIFFER_, "llama", "causal_lm"),
    "pfeiffer-llama-score": Case(PFEIFFER, *PFEIFFER_, "llama"),
    "pfeiffer-qwen2": Case(PFEIFFER, *PFEIFFER_, "qwen2", "causal_lm"),
    "parallel-bert": Case(PARALLEL, *PARALLEL_),
    "parallel-llama": Case(PARALLEL, *PARALLEL_, "llama", "causal_lm"),
    "compacter-bert": Case(COMPACTER, *COMPACTER_),
    "compacter-llama": Case(COMPACTER, *COMPACTER_, "llama", "causal_lm"),
    "compacter++": Case(
        dataclasses.replace(COMPACTER, placement="pfeiffer", rank=2),
        "CompacterPlusPlusConfig",
        {"reduction_factor": 4, "phm_init_range": 0.1, "phm_rank": 2},
    ),
    "learned": Case(
        dataclasses.replace(
            PARALLEL, scaling="learned", sublayers="attention", layers_to_transform=(1,)
        ),
        "ParBnConfig",
        {
            "reduction_factor": 2,
            "scaling": "learned",
            "mh_adapter": True,
            "output_adapter": False,
            "leave_out": [0],
        },
    ),
    "channel": Case(
        dataclasses.replace(
            HOUSLBY, scaling="channel", sublayers="feed_forward", non_linearity="leaky_relu"
        ),
        "DoubleSeqBnConfig",
        {
            "reduction_factor": 4,
            "scaling": "channel",
            "mh_adapter": False,
            "non_linearity": "leakyrelu",
        },
    ),
    "head of the library": Case(
        PFEIFFER,
        *PFEIFFER_,
        head={"num_labels": LABELS, "layers": 1, "activation_function": None, "use_pooler": True},
    ),
    "head of the library-roberta": Case(
        PFEIFFER, *PFEIFFER_, "roberta", head={"num_labels": LABELS}
    ),
}
every_case = pytest.mark.parametrize("name", CASES)


def installed() -> bool:
    return bool(list(importlib.metadata.distributions(name="adapters", path=[str(LIBRARY)])))


HOW = (
    "pip install --no-deps --target .venv/adapters adapters==1.3.0 transformers==4.57.6"
    " huggingface_hub==0.36.2 tokenizers==0.22.2 requests urllib3 certifi charset-normalizer"
)
needs_library = pytest.mark.skipif(
    not installed(), reason=f"the adapters library is not installed apart: {HOW}"
)


def real(case: Case, out: Any) -> Any:
    return out[BATCH.mask.astype(bool)] if out.ndim == 3 else out


def logits(case: Case, model: Any, params: Any) -> Any:
    return real(case, np.asarray(run(model, params)))


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What the library said of every case: the logits of adapters that it loaded, and of those that
    it made.
    """

    folder: Path
    ours: dict[str, Any]
    theirs: Any


@pytest.fixture(scope="module")
def exchange(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Exchange:
    """Save every adapter here, then let the library load them, and make its own, all in one
    process.
    """
    folder = tmp_path_factory.mktemp("adapters")
    batch = {"input_ids": BATCH.ids.tolist(), "attention_mask": BATCH.mask.tolist()}
    jobs: dict[str, Any] = {}
    ours: dict[str, Any] = {}
    for name, case in CASES.items():
        torch_model = reference(case.kind, case.task)
        model, base = torch_model.load()
        params = moved(
            case.method, jaxpeft.rewrite(case.method, base, jax.random.key(0)), size=case.size
        )
        jaxpeft.save_adapter(folder / f"{name} ours", case.method, params, model)
        ours[name] = logits(case, model, params), logits(case, model, base)
        made = CLASSES[case.kind, case.task]
        job = {
            "base": str(torch_model.folder),
            "batch": batch,
            "size": case.size,
            "head": "classification" in case.task,
            "model_class": f"{made.partition('For')[0]}AdapterModel" if case.head else made,
        }
        jobs[f"{name} load"] = job | {"load": str(folder / f"{name} ours")}
        jobs[f"{name} save"] = job | {
            "save": str(folder / f"{name} theirs"),
            "config_class": case.config,
            "options": case.options,
            "head_options": case.head,
        }
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("adapters_library.py")
    environment = {**os.environ, "PYTHONPATH": str(LIBRARY), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(folder / "jobs.json"), str(folder / "out.npz")],
        env=environment,
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return Exchange(folder, ours, np.load(folder / "out.npz"))


def check(record: Any, wanted: Any, found: Any, plain: Any) -> None:
    gap = float(np.abs(found - wanted).max())
    record("gap", gap)
    assert np.abs(wanted - plain).max() > 0.02, "the adapter changes too little to tell anything"
    assert gap <= MARK * max(1.0, float(np.abs(wanted).max()))


@pytest.mark.slow
@needs_library
@every_case
def test_the_library_gives_the_logits_of_what_jaxpeft_saved(
    exchange: Exchange, record_property: Any, name: str
) -> None:
    found, plain = exchange.ours[name]
    check(record_property, real(CASES[name], exchange.theirs[f"{name} load"]), found, plain)


@pytest.mark.slow
@needs_library
@every_case
def test_jaxpeft_gives_the_logits_of_what_the_library_saved(
    exchange: Exchange, reference: Any, record_property: Any, name: str
) -> None:
    case = CASES[name]
    wanted = real(case, exchange.theirs[f"{name} save"])
    model, base = reference(case.kind, case.task).load(scan_layers=True)
    method, params = jaxpeft.load_adapter(exchange.folder / f"{name} theirs", model, base)
    for field in (
        "name",
        "placement",
        "sublayers",
        "reduction_factor",
        "scaling",
        "layers_to_transform",
    ):
        assert getattr(method, field) == getattr(case.method, field)
    check(record_property, wanted, logits(case, model, params), exchange.ours[name][1])


# ----------------------------------------------------------------------------------------- refusals


@dataclasses.dataclass(frozen=True)
class Folder:
    """An adapter folder that jaxpeft wrote, and the model that it is for."""

    path: Path
    model: Any
    base: Any
    params: Any

    def section(self, **values: Any) -> None:
        edit_json(self.path / "adapter_config.json", lambda config: config["config"].update(values))

    def edit(self, file: str, **values: Any) -> None:
        edit_json(self.path / file, lambda config: config.update(values))

    def load(self) -> Any:
        return jaxpeft.load_adapter(self.path, self.model, self.base)

    def problem(self) -> str:
        with pytest.raises(AdapterError) as caught:
            self.load()
        return "\n".join(caught.value.problems)


def saved(path: Path, method: Any = PFEIFFER, kind: str = "bert", **options: Any) -> Folder:
    model, base = load(kind, **options)
    params = moved(method, jaxpeft.rewrite(method, base, jax.random.key(0)))
    jaxpeft.save_adapter(path, method, params, model)
    return Folder(path, model, base, params)


def test_the_files_and_their_content(tmp_path: Path) -> None:
    saved(tmp_path, dataclasses.replace(PARALLEL, layers_to_transform=(1,)))
    assert {p.name for p in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter.safetensors",
        "head_config.json",
        "model_head.safetensors",
        "jaxpeft.json",
        "README.md",
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["name"], config["version"], config["model_type"]) == (
        "default",
        "adapters.1.3.0",
        "bert",
    )
    assert config["config"] == {
        "non_linearity": "relu",
        "reduction_factor": 2.0,
        "scaling": 4.0,
        "dropout": 0.0,
        "init_weights": "mam_adapter",
        "is_parallel": True,
        "original_ln_before": False,
        "original_ln_after": True,
        "residual_before_ln": True,
        "mh_adapter": False,
        "output_adapter": True,
        "leave_out": [0],
    }
    stem = "bert.encoder.layer.1.output.adapters.default"
    assert {name: t.shape for name, t in load_file(tmp_path / "adapter.safetensors").items()} == {
        f"{stem}.adapter_down.0.weight": (16, 32),
        f"{stem}.adapter_down.0.bias": (16,),
        f"{stem}.adapter_up.weight": (32, 16),
        f"{stem}.adapter_up.bias": (32,),
    }
    card = (tmp_path / "README.md").read_text()
    assert "library_name: adapters" in card
    assert "use_safetensors=True" in card


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ln_after": True}, "ln_after: True is not supported by the adapter method"),
        ({"ln_before": True}, "ln_before: True is not supported"),
        ({"use_gating": True}, "use_gating: True is not supported"),
        ({"inv_adapter": "nice"}, "inv_adapter: 'nice' is not supported"),
        ({"cross_adapter": True}, "cross_adapter: True is not supported"),
        ({"stochastic_depth": 0.1}, "stochastic_depth: 0.1 is not supported"),
        ({"something_new": 3}, "something_new: 3 is not supported"),
        (
            {"original_ln_after": False},
            "original_ln_after False, residual_before_ln True: does not match a placement",
        ),
        (
            {"residual_before_ln": "post_add"},
            "residual_before_ln 'post_add': does not match a placement",
        ),
        (
            {"mh_adapter": False, "output_adapter": False},
            "mh_adapter, output_adapter: neither is true",
        ),
        (
            {"reduction_factor": {"1": 8, "default": 4}},
            "adapter.reduction_factor: must be a number, is {'1': 8, 'default': 4}",
        ),
        (
            {"reduction_factor": None},
            "reduction_factor: is not set; use the value of the adapter's training",
        ),
        ({"non_linearity": "prelu"}, "adapter.non_linearity: must be one of"),
        (
            {"architecture": "lora"},
            "architecture: 'lora' is not supported; only this library's bottleneck adapters are",
        ),
        (
            {"mh_adapter": True},
            "missing: bert.encoder.layer.0.attention.output.dense.adapter_down.0.weight",
        ),
        ({"reduction_factor": 2}, "adapter_up.weight is [32, 8], must be [32, 16]"),
    ],
)
def test_options_that_are_not_supported_are_refused(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    folder = saved(tmp_path)
    folder.section(**change)
    assert said in folder.problem()


@pytest.mark.parametrize(
    "change",
    [
        {"shared_phm_rule": False},
        {"factorized_phm_rule": True},
        {"factorized_phm_W": False},
        {"shared_W_phm": True},
        {"phm_bias": False},
        {"learn_phm": False},
    ],
)
def test_other_kinds_of_compacter_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = saved(tmp_path, COMPACTER)
    folder.section(**change)
    (key,) = change
    assert f"{key}: {change[key]} is not supported by the compacter method" in folder.problem()


def test_what_says_nothing_of_the_computation_is_read_over(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    folder.section(
        init_weights="bert",
        init_weights_seed=3,
        phm_dim=8,
        adapter_residual_before_ln=True,
        ln_after=False,
    )
    method, params = folder.load()
    assert method.init_weights == "bert"
    np.testing.assert_array_equal(run(folder.model, params), run(folder.model, folder.params))


@pytest.mark.parametrize(("version", "found"), [(True, "gelu"), (False, "gelu_new")])
def test_gelu_of_a_file_without_a_version_is_gelu_new_as_in_the_library(
    tmp_path: Path, version: bool, found: str
) -> None:
    folder = saved(tmp_path, dataclasses.replace(PFEIFFER, non_linearity="gelu"))
    edit_json(
        tmp_path / "adapter_config.json", lambda config: None if version else config.pop("version")
    )
    assert folder.load()[0].non_linearity == found


def test_an_adapter_for_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    folder.edit("adapter_config.json", model_type="roberta")
    assert "model_type: the adapter is for 'roberta', the model is 'bert'" in folder.problem()
    folder.edit("adapter_config.json", config="pfeiffer")
    assert "config: must be a section with the adapter's options, is 'pfeiffer'" in folder.problem()


def test_a_pickle_is_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (tmp_path / "adapter.safetensors").rename(tmp_path / "pytorch_adapter.bin")
    said = folder.problem()
    assert (
        "no adapter.safetensors: the folder contains pytorch_adapter.bin, a pickle, which is never"
        " read" in said
    )
    assert (
        "save it again in the adapters library, model.save_adapter(folder, name,"
        " use_safetensors=True)" in said
    )


def test_an_adapter_of_another_library_is_not_overwritten(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    other = jaxpeft.LoRA(rank=2)
    with pytest.raises(
        AdapterError,
        match=r"contains adapter.safetensors, an adapter of the adapters library \(AdapterHub\)",
    ):
        jaxpeft.save_adapter(
            tmp_path, other, jaxpeft.rewrite(other, folder.base, jax.random.key(0)), folder.model
        )


def test_a_tensor_more_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    tensors = load_file(tmp_path / "adapter.safetensors")
    extra = {"bert.invertible_adapters.default.F.0.weight": np.zeros((2, 2), np.float32)}
    save_file(tensors | extra, tmp_path / "adapter.safetensors")
    assert "extra: bert.invertible_adapters.default.F.0.weight" in folder.problem()


def test_an_adapter_without_a_head_leaves_the_model_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(tmp_path)
    for file in ("model_head.safetensors", "head_config.json"):
        (tmp_path / file).unlink()
    with caplog.at_level(logging.WARNING):
        _, params = folder.load()
    assert "has no model_head.safetensors; the model's own head is kept" in caplog.text
    np.testing.assert_array_equal(
        params["classifier"]["kernel"], folder.base["classifier"]["kernel"]
    )


def test_an_adapter_with_a_head_goes_onto_an_encoder_without_it(tmp_path: Path) -> None:
    folder = saved(tmp_path, COMPACTER)
    (tmp_path / "jaxpeft.json").unlink()
    model, base = load("bert", task="encoder")
    method, params = jaxpeft.load_adapter(tmp_path, model, base)
    for name in ("compacter_up_left", "compacter_down_bias"):
        layer = ("encoder", "layer", "1", "output", "dense", name)
        np.testing.assert_array_equal(
            jaxpeft_get(params, layer), jaxpeft_get(folder.params["bert"], layer)
        )
    jaxpeft.save_adapter(tmp_path / "again", method, params, model)
    assert "shared_parameters.default.phm_rule" in load_file(
        tmp_path / "again" / "adapter.safetensors"
    )
    np.testing.assert_array_equal(
        jaxpeft.load_adapter(tmp_path / "again", model, base)[1]["compacter_rule"],
        folder.params["compacter_rule"],
    )


def jaxpeft_get(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


FLEX = {"head_type": "classification", "layers": 1, "activation_function": None, "use_pooler": True}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"model_class": "BertForTokenClassification"},
            "'BertForTokenClassification' has a different kind of head",
        ),
        (
            {"config": FLEX | {"head_type": "tagging"}},
            "head_type: 'tagging' is not a head for sequence_classification",
        ),
        (
            {"config": FLEX | {"layers": 2}},
            "layers: the head has 2, the model's has 1 (classifier)",
        ),
        (
            {"config": FLEX | {"use_pooler": False}},
            "the head uses pooling 'cls', the model 'pooler'; load the model with pooling='cls'",
        ),
    ],
)
def test_a_head_that_the_model_has_not_is_refused(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    folder = saved(tmp_path)
    folder.edit("head_config.json", **change)
    assert said in folder.problem()


def test_a_head_that_reads_elsewhere_is_refused_where_it_is_not_our_own(tmp_path: Path) -> None:
    folder = saved(tmp_path, pooling="mean")
    folder.load()
    (tmp_path / "jaxpeft.json").unlink()
    assert (
        "the head uses pooling 'pooler', the model 'mean'; load the model with pooling='pooler'"
        in folder.problem()
    )


@pytest.mark.parametrize("trained", [False, True])
def test_a_language_model_head_must_be_that_of_the_base(tmp_path: Path, trained: bool) -> None:
    folder = saved(tmp_path, kind="llama")
    head = np.ascontiguousarray(np.asarray(folder.base["lm_head"]["kernel"]).T) + np.float32(
        trained
    )
    save_file({"lm_head.weight": head}, tmp_path / "model_head.safetensors")
    if trained:
        assert (
            "lm_head.weight differs from the base's: it was trained with the adapter"
            in folder.problem()
        )
    else:
        folder.load()


def test_sites_that_the_library_does_not_adapt_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(
        AdapterError,
        match="query: the adapters library supports adapters only at the end of a sub-layer",
    ):
        saved(tmp_path, jaxpeft.Adapter(placement="houlsby", targets=("query",)))
    with pytest.raises(
        AdapterError, match=r"attention has adapters in the layers \[0\], feed-forward in \[0, 1\]"
    ):
        saved(
            tmp_path,
            jaxpeft.Adapter(
                targets=r".*(layer\.\d\.output\.dense|layer\.0\.attention\.output\.dense)"
            ),
        )
    with pytest.raises(
        ConfigError, match="modules_to_save: files of the adapters library cannot store"
    ):
        jaxpeft.Adapter(modules_to_save=("pooler",))
