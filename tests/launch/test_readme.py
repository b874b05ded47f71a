"""launch/README.md: every command in it is run, with stand-ins for the programs of clouds and
clusters.
"""

from __future__ import annotations

import re

import pytest
import yaml

from jaxpeft.command.parser import read_arguments
from jaxpeft.train.arguments import RunArguments, job_of
from tests.launch.helpers import LAUNCH, ROOT, Stubs, bash
from tests.launch.manifests import parse, require_sound

README = LAUNCH / "README.md"
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
PROGRAMS = ("docker", "gcloud", "kubectl", "xpk", "sbatch", "sky", "python")
# what each needs to be told, so that it goes on to the end
ANSWERS = {
    "gcloud": (
        'case "$*" in *describe*) echo ACTIVE ;; *" ssh "*status*) echo "jaxpeft: done" ;; esac'
    ),
    "python": '[[ "$1" != -c ]] || echo 12345',
}


def ids(block: str) -> str:
    return block.splitlines()[-1][:40]


@pytest.mark.parametrize("block", BLOCKS, ids=ids)
def test_a_block_runs_to_its_end(block: str, stubs: Stubs) -> None:
    for program in PROGRAMS:
        stubs.add(program, ANSWERS.get(program))
    script = stubs.folder / "block.sh"
    script.write_text(f"set -euo pipefail\n{block}")
    done = bash(
        script, env=stubs.environment(PYTHON=str(stubs.folder / "bin" / "python"), EVERY="0")
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert stubs.calls(), "the block calls nothing"
    for call in stubs.noted():
        require_known(call["name"], call["arguments"], call["stdin"])


def require_known(program: str, arguments: list[str], stdin: str) -> None:
    """Refuse a call that its program, or jaxpeft, would refuse, as far as that is known here."""
    for word in arguments:
        assert not word.startswith(("launch/", "configs/")) or (ROOT / word).exists(), (
            f"there is no {word}"
        )
    if program == "kubectl" and arguments[0] == "apply":
        require_sound(parse(stdin))
    if arguments[:2] == ["-m", "jaxpeft.train"]:
        require_trainable(arguments[2:])
    if program == "sbatch":
        at = arguments.index("launch/slurm.sbatch")
        assert all(word.startswith("--") for word in arguments[:at])
        require_trainable(arguments[at + 1 :])
    if program == "sky":
        assert arguments[0] == "jobs" and arguments[1] in ("launch", "queue")


def require_trainable(arguments: list[str]) -> None:
    """Refuse what the trainer would refuse."""
    job_of(*read_arguments(RunArguments, [*arguments, "--validate"]))


def runs_of(text: str) -> set[tuple[str, str]]:
    """Return the folder and the config of every `sky jobs launch`; what is not given is as in the
    task.
    """
    found = set()
    for line in re.findall(r"^sky jobs launch .*$", text.replace("\\\n", ""), re.MULTILINE):
        given = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())["envs"]
        given |= dict(re.findall(r"--env (\w+)=(\S+)", line))
        found.add((f"{given['BUCKET']}/{given['RUN']}", given["CONFIG"]))
    return found


def test_no_two_runs_have_one_folder() -> None:
    runs = runs_of(README.read_text())
    assert len(runs) == len({folder for folder, _ in runs}) == 2


def test_a_run_in_the_folder_of_another_would_be_noticed() -> None:
    line = "sky jobs launch launch/skypilot.yaml --env RUN=llama"
    runs = runs_of(f"{line} --env CONFIG=configs/llama3_8b_lora.py\n{line} \\\n  --env EXTRA=tpu\n")
    assert len(runs) == 2 and len({folder for folder, _ in runs}) == 1


def test_a_config_that_is_not_there_would_be_noticed(stubs: Stubs) -> None:
    with pytest.raises(AssertionError, match="there is no configs"):
        require_known("python", ["-m", "jaxpeft.train", "--config", "configs/gone.py"], "")


def test_every_file_is_in_the_readme_and_every_link_leads_somewhere() -> None:
    text = README.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (LAUNCH / link).exists(), link
    beside = {"README.md", "constraints.txt", "Dockerfile.dockerignore", "tpu_host.sh", "common.sh"}
    named = {path.name for path in LAUNCH.iterdir()} - beside
    assert not [name for name in sorted(named) if name not in text and name != "gpu_jobset.yaml"]


def test_every_launcher_has_a_row_and_a_section() -> None:
    text = README.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and "](" in line]
    assert len(rows) == 7 and all(len(row.split("|")) == 6 for row in rows)
    for launcher in (
        "local.sh",
        "tpu_vm.sh",
        "jobset.sh",
        "xpk.sh",
        "slurm.sbatch",
        "skypilot.yaml",
    ):
        assert any(launcher in block for block in BLOCKS), launcher


def test_every_command_line_is_in_a_block_that_is_run() -> None:
    """A fence of another kind would not be run."""
    assert len(re.findall(r"^```", README.read_text(), re.MULTILINE)) == 2 * len(BLOCKS)


@pytest.mark.parametrize("script", [path.name for path in sorted(LAUNCH.glob("*.sh"))])
def test_variables_that_the_readme_sets_are_in_the_head_of_a_script(script: str) -> None:
    text = (LAUNCH / script).read_text()
    for block in (block for block in BLOCKS if f"launch/{script}" in block):
        for name in set(re.findall(r"\b([A-Z]{2,})=", block)):
            assert re.search(rf"\b{name}\b", text), f"{script} knows no {name}"
