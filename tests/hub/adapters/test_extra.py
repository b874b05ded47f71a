"""`jaxpeft.json` beside an adapter: damage is found tensor by tensor, what a run decided comes
back, hostile content is refused.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import struct

import pytest

import jaxpeft
from jaxpeft.errors import AdapterError, ConfigError
from jaxpeft.hub.adapters.settings import Settings
from tests.hub.helpers import METHOD, QUERY, assert_bit_equal, edit_json, peft_load, trained

WEIGHTS, EXTRA = "adapter_model.safetensors", "jaxpeft.json"
SEQUENCE = "sequence_classification"


def flip(file, tensor, bit=0):
    """Flips one bit of a tensor's first number."""
    raw = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    at = 8 + length + json.loads(raw[8 : 8 + length])[tensor]["data_offsets"][0]
    raw[at + bit // 8] ^= 1 << bit % 8
    file.write_bytes(raw)


def drop_record(folder):
    edit_json(folder / EXTRA, lambda extra: extra.pop("sha256"))


# ------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("bit", [0, 9, 22])
@pytest.mark.parametrize("tensor", [f"{QUERY}.lora_A.weight", "base_model.model.classifier.bias"])
@pytest.mark.representatives("*lora_A.weight-22", "*classifier.bias-0")
def test_a_flipped_bit_is_refused_by_the_name_of_its_tensor(save, tensor, bit):
    saved = save()
    flip(saved.folder / WEIGHTS, tensor, bit)
    (problem,) = saved.problems()
    assert (
        problem
        == f"{saved.folder / WEIGHTS}: {tensor}: its SHA-256 differs from jaxpeft.json; copy"
        " the adapter again; if it was changed on purpose, remove 'sha256' from"
        f" {saved.folder / EXTRA}"
    )
    drop_record(saved.folder)  # the remedy
    saved.load()


@pytest.mark.parametrize(
    ("method", "kind", "task"),
    [
        (jaxpeft.Full(), "llama", "causal_lm"),
        (jaxpeft.IA3(), "bert", SEQUENCE),
        (jaxpeft.Adapter(), "bert", SEQUENCE),
        (jaxpeft.Mixed(methods=(METHOD, jaxpeft.LNTuning())), "bert", SEQUENCE),
    ],
    ids=["full", "ia3", "adapters library", "mixed"],
)
@pytest.mark.representatives("full", "adapters library")
def test_a_flipped_bit_is_found_in_the_files_of_every_layout(save, method, kind, task):
    saved = save(method, kind, task)
    files = sorted(saved.folder.rglob("*.safetensors"))
    for file in files:
        raw = file.read_bytes()
        file.write_bytes(raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:])
        (problem,) = saved.problems()
        assert (
            problem.startswith(f"{file}: ") and "its SHA-256 differs from jaxpeft.json" in problem
        )
        file.write_bytes(raw)
    assert_bit_equal(saved.load()[1], saved.params)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapter_that_peft_has_saved_again_is_told_apart_from_damage(save):
    import torch

    saved = save()
    theirs = peft_load(saved.model.source.folder, SEQUENCE, saved.folder)
    theirs.save_pretrained(saved.folder)
    # the same numbers under another library's config
    assert_bit_equal(saved.load()[1], saved.params)
    with torch.no_grad():
        for name, leaf in theirs.named_parameters():
            if "lora_" in name:
                leaf.add_(0.1)
    theirs.save_pretrained(saved.folder)
    (problem,) = saved.problems()
    assert (
        f"{saved.folder}: another library saved this folder after jaxpeft.json was written: the"
        " SHA-256 of 8 tensors of" in problem
    )
    assert problem.endswith(
        f"remove 'sha256' from {saved.folder / EXTRA}; otherwise copy the adapter again"
    )
    drop_record(saved.folder)
    saved.load()


def test_an_edited_field_is_believed_and_told(save, caplog):
    saved = save(labels=("no", "maybe", "yes"))
    edit_json(saved.folder / EXTRA, lambda extra: extra.update(labels=["yes", "maybe", "no"]))
    saved.config(lora_alpha=12.0, base_model_name_or_path="elsewhere")
    method, _ = saved.load()
    assert method.alpha == 12.0
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told == [
        (
            f"{saved.folder / 'adapter_config.json'}: edited since it was saved; the edited"
            " values are used: lora_alpha"
        ),
        f"{saved.folder / EXTRA}: edited since it was saved; the edited values are used: labels",
    ]


@pytest.mark.parametrize("whole", [True, False])
def test_what_nothing_vouches_for_is_told(save, caplog, whole):
    caplog.set_level(logging.INFO)
    saved = save()
    if whole:
        (saved.folder / EXTRA).unlink()
    else:
        drop_record(saved.folder)
    saved.load()
    why = f"no {EXTRA}" if whole else f"{EXTRA} has no sha256"
    assert f"{saved.folder}: {why}; the files are not checked for changes" in caplog.text


# ------------------------------------------------------------------------------------------ hostile

HOSTILE = {
    "labels of another type": (
        {"labels": "abc"},
        "labels: must be a list of unique names, is 'abc'",
    ),
    "labels that are not text": (
        {"labels": [1, 2, 3]},
        "labels: must be a list of unique names, is [1, 2, 3]",
    ),
    "a label twice": ({"labels": ["a", "a", "b"]}, "labels: must be a list of unique names"),
    "labels of another number": ({"labels": ["a"]}, "labels: 1 names for num_labels 3; fix it"),
    "a task that is none": ({"task": "x" * 500}, "task: must be one of causal_lm, "),
    "a number in a task's place": ({"task": 3}, "task: must be one of causal_lm, "),
    "pooling": ({"pooling": ["mean"]}, "pooling: must be a name, is ['mean']"),
    "a problem type that is none": (
        {"problem_type": "sigmoid"},
        "problem_type: must be one of single_label_",
    ),
    "vocab_size": ({"vocab_size": 10**299}, "vocab_size: must be a positive integer, is 1000"),
    "num_labels": ({"num_labels": True}, "num_labels: must be a positive integer, is True"),
    "quant": ({"quant": "nf4"}, "quant: 'nf4' is not supported by this version of jaxpeft"),
    "base_sha256": ({"base_sha256": [1]}, "base_sha256: must be 64 hexadecimal digits, is [1]"),
    "sha256": (
        {"sha256": ["a"]},
        "sha256: must map each file name to the SHA-256 of its items",
    ),
    "sha256 of a file": (
        {"sha256": {WEIGHTS: {"x": 3}}},
        "sha256: must map each file name to the SHA-256",
    ),
    "a file elsewhere": (
        {"sha256": {"../x.safetensors": {}}},
        "sha256: must map each file name to the SHA-256",
    ),
}


@pytest.mark.parametrize(("values", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_tampered_file_is_refused(save, values, message):
    saved = save()
    edit_json(saved.folder / EXTRA, lambda extra: extra.update(values))
    for refused in (lambda: jaxpeft.read_settings(saved.folder), saved.load):
        with pytest.raises((AdapterError, ConfigError)) as caught:
            refused()
        problem = str(caught.value)
        assert message in problem and str(saved.folder / EXTRA) in problem
        assert len(problem) < 600


@pytest.mark.parametrize(
    "text", ["[]", "{", "[" * 100_000, '{"a": ' * 5000, '"x"', '{"num_labels": ' + "9" * 5000 + "}"]
)
def test_what_is_no_json_object_is_refused(save, text):
    saved = save()
    (saved.folder / EXTRA).write_text(text)
    assert saved.problems()
    with pytest.raises(AdapterError, match=EXTRA):
        jaxpeft.read_settings(saved.folder)


# ----------------------------------------------------------------------------------------- settings


def test_what_a_run_decided_comes_back(save):
    saved = save(labels=("no", "maybe", "yes"), pooling="mean")
    found = jaxpeft.read_settings(saved.folder)
    assert (found.task, found.num_labels, found.labels) == (SEQUENCE, 3, ("no", "maybe", "yes"))
    assert (found.problem_type, found.pooling) == (None, "mean")
    model, params = jaxpeft.load(saved.model.source.folder, **found.load_options)
    _, params = jaxpeft.load_adapter(saved.folder, model, params)
    (answer,) = found.predict(jaxpeft.apply(model, params, [[1, 2, 3]]))
    assert answer in ("no", "maybe", "yes")


def test_settings_of_a_mixed_adapter_are_those_of_its_parts(save):
    saved = save(jaxpeft.Mixed(methods=(METHOD, jaxpeft.LNTuning())), labels=("no", "maybe", "yes"))
    assert jaxpeft.read_settings(saved.folder).labels == ("no", "maybe", "yes")


def test_an_adapter_of_another_library_has_no_settings(save, tmp_path):
    saved = save()
    (saved.folder / EXTRA).unlink()
    assert jaxpeft.read_settings(saved.folder) == Settings()
    with pytest.raises(AdapterError, match="no such adapter folder"):
        jaxpeft.read_settings(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("problem_type", "logits", "wanted"),
    [
        ("single_label_classification", [[0.1, 3, 2]], ["maybe"]),
        ("multi_label_classification", [[0.1, -3, 2], [-1, -1, -1]], [["no", "yes"], []]),
        ("regression", [[0.5], [-2]], [0.5, -2]),
        (None, [[[0, 1, 0], [0, 0, 1]]], [["maybe", "yes"]]),
    ],
)
def test_predictions_have_the_names_of_the_labels(problem_type, logits, wanted):
    assert (
        Settings(labels=("no", "maybe", "yes"), problem_type=problem_type).predict(logits) == wanted
    )


@pytest.mark.parametrize("labels", [("a", "b"), ("a", "a", "b")])
def test_labels_that_are_not_those_of_the_head_are_not_saved(save, labels):
    with pytest.raises(AdapterError, match="save_adapter: labels: "):
        save(labels=labels)


# -------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_the_files_have_the_mode_of_any_new_file(save, mask, mode):
    before = os.umask(mask)
    try:
        saved = save()
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in saved.folder.iterdir()} == {mode}


def test_the_card_of_a_method_that_peft_has_not_does_not_say_peft(save):
    card = (save(jaxpeft.Full(), labels=("no", "maybe", "yes")).folder / "README.md").read_text()
    assert "\nlibrary_name: jaxpeft\n" in card.split("---")[1]
    assert "from peft" not in card
    assert "# full weights for " in card and "Hugging Face PEFT has no method 'full'" in card
    assert "* outputs, in order: no, maybe, yes" in card


def test_other_libraries_are_told_the_folder_of_a_packaged_base(save, tmp_path):
    saved = save()
    packaged = saved.model.clone(
        source=type(saved.model.source)("package:tiny", saved.model.source.folder, "1.0")
    )
    jaxpeft.save_adapter(tmp_path / "packaged", METHOD, trained(METHOD, saved.params), packaged)
    config = json.loads((tmp_path / "packaged" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (
        str(saved.model.source.folder),
        None,
    )
