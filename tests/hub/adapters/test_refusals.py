"""Adapter folders that are refused, each with what is wrong, and nothing loaded."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxpeft
from jaxpeft import LNTuning, Mixed
from jaxpeft.errors import AdapterError, ConfigError, JaxpeftError, TargetError
from tests.hub.helpers import METHOD, QUERY, assert_bit_equal, edit_json, edited, entry, write_raw

HEAD = "base_model.model.classifier"
WEIGHTS = "adapter_model.safetensors"


# --------------------------------------------------------------------------------- folder and files


def test_a_folder_that_is_not_there_is_refused(save, tmp_path):
    saved = save()
    with pytest.raises(AdapterError, match=r"/nothing: no such adapter folder"):
        jaxpeft.load_adapter(tmp_path / "nothing", saved.model, saved.base)


@pytest.mark.parametrize("missing", [WEIGHTS, "adapter_config.json"])
def test_an_incomplete_folder_is_refused(save, missing):
    saved = save()
    (saved.folder / missing).unlink()
    (problem,) = saved.problems()
    assert str(saved.folder) in problem and missing in problem
    assert "the folder is incomplete" in problem or "no such file" in problem


def test_an_adapter_without_the_file_of_jaxpeft_is_loaded(save):
    saved = save()
    (saved.folder / "jaxpeft.json").unlink()
    assert_bit_equal(saved.load()[1], saved.params)


def test_a_pickled_adapter_is_refused_without_reading_it(save, no_unpickling):
    saved = save()
    (saved.folder / WEIGHTS).unlink()
    (saved.folder / "adapter_model.bin").write_bytes(pickle.dumps({"x": 1}))
    (problem,) = saved.problems()
    assert problem.endswith(
        f"no {WEIGHTS}: the folder contains adapter_model.bin, a pickle, which is never read; save it"
        " as safetensors"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"x": 1}), "a pickle or zip file under another name"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"<html></html>", "an HTML or XML page"),
        (b"", "not safetensors, or truncated (0 bytes)"),
    ],
)
def test_another_file_under_the_name_of_the_weights_is_refused(
    save, no_unpickling, content, message
):
    saved = save()
    (saved.folder / WEIGHTS).write_bytes(content)
    (problem,) = saved.problems()
    assert problem.startswith(f"{saved.folder / WEIGHTS}: {message}")


def test_a_truncated_adapter_is_refused(save):
    saved = save()
    content = (saved.folder / WEIGHTS).read_bytes()
    (saved.folder / WEIGHTS).write_bytes(content[:-8])
    (problem,) = saved.problems()
    assert "truncated: 8 bytes are missing" in problem


def test_an_adapter_of_overlapping_tensors_is_refused(save):
    saved = save()
    tensors = load_file(saved.folder / WEIGHTS)
    header = {name: entry(0, t.nbytes, list(t.shape)) for name, t in tensors.items()}
    write_raw(saved.folder / WEIGHTS, header, bytes(4096))
    assert "overlap" in saved.problems()[0]


@pytest.mark.parametrize(
    "name",
    [
        "adapter_config.json",
        "jaxpeft.json",
    ],
)
def test_a_broken_json_file_is_refused_by_line(save, name):
    saved = save()
    (saved.folder / name).write_text('{\n"r": 4,\n')
    (problem,) = saved.problems()
    assert problem.startswith(f"{saved.folder / name}:3:1: not JSON")


# --------------------------------------------------------------------------------- base, task, head


def test_a_changed_base_is_refused(save, tmp_path):
    def nudge(tensors):
        tensors["bert.embeddings.word_embeddings.weight"][0, 0] += 1

    saved = save()
    other = edited(saved.model.source.folder, tmp_path / "other", nudge)
    (problem,) = saved.problems(base=other)
    assert (
        f"jaxpeft.json: the adapter was trained on another base ('{saved.model.source.name}'),"
        f" not {other}: " in problem
    )
    assert (
        "the weights differ (base_sha256 " in problem
        and "; load the base it was trained on, or allow this" in problem
    )
    same = shutil.copytree(saved.model.source.folder, tmp_path / "same")
    assert_bit_equal(saved.load(base=same)[1], saved.params)


def test_another_task_pooling_and_base_are_listed_together(save, tmp_path):
    saved = save()
    other = edited(
        saved.model.source.folder, tmp_path / "other", config=lambda c: c.update(hidden_act="relu")
    )
    edit_json(saved.folder / "jaxpeft.json", lambda extra: extra.update(pooling="mean"))
    task, pooling, base = saved.problems(base=other, task="token_classification")
    assert task.endswith(
        "adapter_config.json: task_type is SEQ_CLS, but the model is loaded for TOKEN_CLS"
    )
    assert pooling.endswith("jaxpeft.json: pooling is 'mean', but the model has None")
    assert "another base" in base


def test_another_pooling_is_refused(save):
    saved = save(pooling="mean")
    assert saved.problems(pooling="cls") == [
        f"{saved.folder / 'jaxpeft.json'}: pooling is 'mean', but the model has 'cls'"
    ]
    assert_bit_equal(saved.load(pooling="mean")[1], saved.params)


def test_the_architecture_s_own_pooling_may_be_named(save):
    saved = save()
    assert_bit_equal(saved.load(pooling="pooler")[1], saved.params)


def test_another_number_of_labels_is_refused(save):
    saved = save()
    assert sorted(saved.problems(num_labels=5)) == [
        f"{saved.folder / WEIGHTS}: misshaped: {HEAD}.bias is [3], must be [5]",
        f"{saved.folder / WEIGHTS}: misshaped: {HEAD}.weight is [3, 32], must be [5, 32]",
    ]


def test_a_base_that_is_already_adapted_is_refused(save):
    saved = save()
    with pytest.raises(
        ConfigError, match=r"already has lora leaves; rewrite the base, or merge first"
    ):
        jaxpeft.load_adapter(saved.folder, saved.model, saved.params)


# ------------------------------------------------------------------------------------------ tensors


@pytest.mark.parametrize("scan", [False, True])
def test_every_tensor_that_does_not_fit_is_listed_at_once(save, scan):
    def spoil(tensors):
        del tensors[f"{QUERY}.lora_A.weight"]
        tensors[f"{QUERY}.lora_B.weight"] = np.zeros((32, 5), np.float32)
        tensors[f"{QUERY}.base_layer.weight"] = np.zeros((32, 32), np.float32)
        tensors[f"{HEAD}.bias"] = np.zeros(4, np.float32)

    saved = save()
    saved.edit(spoil)
    assert set(saved.problems(scan_layers=scan)) == {
        f"{saved.folder / WEIGHTS}: extra: {QUERY}.base_layer.weight",
        f"{saved.folder / WEIGHTS}: missing: {QUERY}.lora_A.weight",
        f"{saved.folder / WEIGHTS}: misshaped: {QUERY}.lora_B.weight is [32, 5], must be [32, 4]",
        f"{saved.folder / WEIGHTS}: misshaped: {HEAD}.bias is [4], must be [3]",
    }


def test_every_tensor_that_is_not_finite_is_listed_at_once(save):
    def spoil(tensors):
        tensors[f"{QUERY}.lora_A.weight"][1, 1] = np.nan
        tensors[f"{HEAD}.weight"][0, 0] = np.inf

    saved = save()
    saved.edit(spoil)
    assert sorted(saved.problems()) == [
        f"{saved.folder / WEIGHTS}: not finite: {QUERY}.lora_A.weight",
        f"{saved.folder / WEIGHTS}: not finite: {HEAD}.weight",
    ]


def test_of_very_many_tensors_the_first_are_told_and_the_others_counted(save):
    saved = save()
    extra = {f"base_model.model.odd.{i}": np.zeros(1, np.float32) for i in range(100)}
    saved.edit(lambda tensors: tensors.update(extra))
    told = saved.problems()
    assert len(told) == 21
    assert told[-1] == f"{saved.folder / WEIGHTS}: ... and 80 more"


def test_tensors_of_whole_numbers_are_refused(save):
    saved = save()
    saved.edit(lambda tensors: tensors.update({f"{HEAD}.bias": np.arange(3)}))
    assert "classifier.bias" in saved.problems()[0]


# ----------------------------------------------------------------------------------------- settings


def test_unsupported_settings_are_listed_at_once_and_nothing_is_loaded(save):
    saved = save()
    saved.config(
        use_qalora=True, init_lora_weights="pissa_niter_4", trainable_token_indices=[-1], r=0
    )
    found = [
        problem.removeprefix(f"{saved.folder / 'adapter_config.json'}: ")
        for problem in saved.problems()
    ]
    starts = [
        "lora.rank: must be at least 1, is 0",
        "init_lora_weights: 'pissa_niter_4' changed the base at initialization",
    ]
    starts += [
        "use_qalora: True is not supported",
        "trainable_token_indices: must be token ids",
    ]
    assert len(found) == len(starts)
    for start in starts:
        assert any(problem.startswith(start) for problem in found), start


def test_an_adapter_of_another_method_is_refused(save):
    saved = save()
    saved.config(peft_type="POLY")
    (problem,) = saved.problems()
    assert "peft_type 'POLY' is not supported (supported: LORA, " in problem
    assert problem.endswith(
        "; each row needs the number of its task, and the models have no such input"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_modules": ["query", "q_proj"]}, r"targets: 'q_proj' matches no site"),
        ({"rank_pattern": {"q_proj": 3}}, r"rank_pattern: 'q_proj' matches no adapted site"),
        (
            {"modules_to_save": ["lm_head"]},
            r"modules_to_save: 'lm_head' matches no module of the model",
        ),
        ({"layers_to_transform": [7]}, r"layers_to_transform: no layer 7; the model has 0 to 1"),
    ],
    ids=["targets", "rank_pattern", "modules_to_save", "layers"],
)
def test_settings_that_name_nothing_in_the_model_are_refused(save, values, message):
    saved = save()
    saved.config(**values)
    with pytest.raises(JaxpeftError, match=message) as caught:
        saved.load()
    assert isinstance(caught.value, (AdapterError, TargetError))


@pytest.mark.parametrize(
    "change",
    [
        {"parts": None},
        {"parts": ["lora"]},
        {"parts": ["lora", "../lora"]},
        {"method": None},
        {"method": {"name": "mixed"}},
    ],
    ids=lambda change: str(next(iter(change.values()))),
)
def test_a_mixed_adapter_names_a_folder_for_each_of_its_methods(save, change):
    saved = save(Mixed(methods=(METHOD, LNTuning())))
    edit_json(saved.folder / "jaxpeft_parts.json", lambda content: content.update(change))
    assert "must have 'parts' with a folder for each method, and 'method'" in saved.problems()[0]
