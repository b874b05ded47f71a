"""launch/Dockerfile: hadolint finds nothing; pinned, not root, no secrets; only sources are sent to
the builder.
"""

from __future__ import annotations

import re
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.launch.helpers import LAUNCH, ROOT, mutated, tool

DOCKERFILE = LAUNCH / "Dockerfile"
SECRET = re.compile(
    r"(?i)(token|secret|passw|api_?key|credential|hf_[a-z0-9]{8}|--mount=type=secret)"
)


@dataclass(frozen=True)
class Instruction:
    name: str
    rest: str


def instructions(path: Path) -> list[Instruction]:
    """Read a Dockerfile, lines that go on joined, without comments."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    parts = (line.split(None, 1) for line in text.splitlines() if line.strip())
    return [Instruction(name.upper(), rest) for name, rest in parts]


def require_sound(path: Path) -> None:
    """Refuse an image that is not the same tomorrow, runs as root, holds what it should not, or
    keep signals from Python.

    Raises:
        ValueError: naming everything that is wrong.
    """
    found = instructions(path)

    def of(name: str) -> list[str]:
        return [one.rest for one in found if one.name == name]

    installs = [part for run in of("RUN") for part in re.findall(r"pip install [^&;]*", run)]
    wrong = {
        "FROM": not all(
            re.fullmatch(r"[a-z0-9./-]+:\d+\.\d+\.\d+[a-z0-9.-]*(@sha256:[0-9a-f]{64})?", rest)
            for rest in of("FROM")
        ),
        "USER": not of("USER") or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", of("USER")[-1]),
        "USER after": any(one.name in ("RUN", "COPY") for one in found[_last(found, "USER") :]),
        "secrets": any(
            SECRET.search(f"{one.name} {one.rest}")
            for one in found
            if one.name in ("ARG", "ENV", "RUN", "COPY", "LABEL")
        ),
        "COPY": any(re.match(r"(--\S+ )*(\.|/|~|\S*\*)\S* ", rest) for rest in of("COPY")),
        "ADD": bool(of("ADD")),
        "pip": (
            not installs
            or any("--constraint" not in one or "--no-cache-dir" not in one for one in installs)
        ),
        "ACCELERATOR": not all(f"{name})" in " ".join(of("RUN")) for name in ("cpu", "tpu", "gpu")),
        "ENTRYPOINT": not of("ENTRYPOINT") or not of("ENTRYPOINT")[-1].startswith('["python"'),
        "VOLUME": of("VOLUME") != ["/runs"],
    }
    if names := [name for name, bad in wrong.items() if bad]:
        raise ValueError(", ".join(names))


def _last(found: list[Instruction], name: str) -> int:
    return max((index for index, one in enumerate(found) if one.name == name), default=0)


def test_the_image_is_sound() -> None:
    require_sound(DOCKERFILE)


MISTAKES = {
    "the newest Python": ("FROM python:3.12.12-slim-bookworm", "FROM python:latest", "FROM"),
    "some Python 3": ("FROM python:3.12.12-slim-bookworm", "FROM python:3-slim", "FROM"),
    "no tag": ("FROM python:3.12.12-slim-bookworm", "FROM python", "FROM"),
    "root": ("USER 1000:1000", "USER 0:0", "USER"),
    "nobody said": ("USER 1000:1000\n", "", "USER, USER after"),
    "something after it": ("USER 1000:1000", "USER 1000:1000\nRUN pip --version", "USER after"),
    "a secret": ("ARG ACCELERATOR=cpu", "ARG ACCELERATOR=cpu\nARG HF_TOKEN", "secrets"),
    "a secret in the environment": ("ENV HF_HOME", "ENV API_KEY=abc\nENV HF_HOME", "secrets"),
    "the whole folder": ("COPY configs /app/configs", "COPY . /app", "COPY"),
    "from the network": (
        "COPY configs /app/configs",
        "ADD https://example.org/configs.tar /app/",
        "ADD",
    ),
    "versions of today": ("--constraint /src/launch/constraints.txt ", "", "pip"),
    "no TPU": ("tpu) extras", "tpus) extras", "ACCELERATOR"),
    "a shell in front": (
        'ENTRYPOINT ["python", "-m", "jaxpeft.train"]',
        "ENTRYPOINT python -m jaxpeft.train",
        "ENTRYPOINT",
    ),
    "the runs go with the container": ("VOLUME /runs\n", "", "VOLUME"),
}


@pytest.mark.parametrize(("before", "after", "said"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_refused(before: str, after: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{said}$"):
        require_sound(mutated(DOCKERFILE, before, after, tmp_path))


def hadolint(path: Path) -> subprocess.CompletedProcess[str]:
    words = [
        tool("hadolint"),
        "--no-color",
        "--config",
        "/dev/null",
        "--failure-threshold=style",
        str(path),
    ]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


def test_hadolint_finds_nothing() -> None:
    found = hadolint(DOCKERFILE)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.parametrize(
    ("before", "after", "rule"),
    [
        ("FROM python:3.12.12-slim-bookworm", "FROM python", "DL3006"),
        ("USER 1000:1000", "USER root", "DL3002"),
        ("--no-cache-dir ", "", "DL3042"),
        ("RUN useradd", "RUN cd /tmp && useradd", "DL3003"),
    ],
)
def test_hadolint_would_find_a_mistake(before: str, after: str, rule: str, tmp_path: Path) -> None:
    assert rule in hadolint(mutated(DOCKERFILE, before, after, tmp_path)).stdout


@pytest.mark.parametrize(
    ("accelerator", "code", "installed"),
    [("cpu", 0, "/src"), ("tpu", 0, "/src[tpu]"), ("gpu", 0, "/src[cuda,k8s]"), ("cuda", 2, None)],
)
def test_what_is_installed_for_an_accelerator(
    accelerator: str, code: int, installed: str | None, tmp_path: Path
) -> None:
    (run,) = (
        one.rest
        for one in instructions(DOCKERFILE)
        if one.name == "RUN" and "pip install" in one.rest
    )
    script = f"pip() {{ printf '%s\\n' \"$@\"; }}; ACCELERATOR={accelerator}; {run}"
    done = subprocess.run(
        ["sh", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code
    assert done.stdout.splitlines()[-1:] == ([installed] if installed else [])


def test_the_extras_are_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"tpu", "cuda", "k8s"} <= project["optional-dependencies"].keys()


# -------------------------------------------------------------------------------- what goes into it


def pins() -> dict[str, str]:
    lines = [
        line
        for line in (LAUNCH / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9a-z.+]+", line) for line in lines) and len(
        set(lines)
    ) == len(lines)
    return dict(line.split("==") for line in lines)


def require_pins(pinned: dict[str, str]) -> None:
    """Refuse pins that leave something of pyproject.toml out, or that it does not allow.

    Raises:
        ValueError: naming what is wrong.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [
        one for extra in ("tpu", "cuda", "k8s") for one in project["optional-dependencies"][extra]
    ]
    wrong: list[str] = []
    for requirement in map(Requirement, [*project["dependencies"], *optional]):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name not in pinned or not requirement.specifier.contains(pinned[name]):
            wrong.append(f"{requirement}: is pinned to {pinned.get(name)}")
    if wrong:
        raise ValueError(", ".join(wrong))


def test_everything_is_pinned_to_what_the_project_allows() -> None:
    pinned = pins()
    require_pins(pinned)
    assert {"jaxlib", "libtpu", "jax-cuda13-plugin", "kubernetes"} <= pinned.keys()
    assert pinned["jax"] == pinned["jaxlib"] == pinned["jax-cuda13-plugin"]


@pytest.mark.parametrize("change", [{"jax": "0.9.0"}, {"optax": None}], ids=["too old", "left out"])
def test_wrong_pins_are_refused(change: dict[str, str | None]) -> None:
    pinned = {name: version for name, version in (pins() | change).items() if version}
    with pytest.raises(ValueError, match="is pinned to"):
        require_pins(pinned)


def test_the_builder_gets_what_is_copied_and_nothing_else() -> None:
    lines = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        word
        for one in instructions(DOCKERFILE)
        if one.name == "COPY"
        for word in one.rest.split()[:-1]
    }
    assert [line for line in lines if line and line[0] not in "#!"] == ["*", "**/__pycache__"]
    assert kept == copied and all((ROOT / path).exists() for path in kept)
