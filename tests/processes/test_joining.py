"""How the processes of a run find each other; and while they wait, they can be stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.faults.team import free_port
from tests.train.runs import write_config, write_rows


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.representatives("15-143")
def test_a_signal_ends_the_waiting_for_the_others(
    tmp_path: Path, tiny_models: Mapping[str, Path], number: signal.Signals, code: int
) -> None:
    config = write_config(
        tmp_path / "mine.py",
        tiny_models["bert"],
        write_rows(tmp_path / "rows.jsonl", "single"),
        train__steps=2,
    )
    words = [
        "env",
        "--default-signal=INT",
        sys.executable,
        "-m",
        "jaxpeft.train",
        "--config",
        str(config),
        "--workdir",
        str(tmp_path / "run"),
        "--coordinator",
        f"127.0.0.1:{free_port()}",
        "--processes",
        "2",
        "--process",
        "0",
    ]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(words, cwd=ROOT, stderr=said, env=dict(os.environ))
    try:
        until = time.monotonic() + 60
        while "waiting for 2 processes" not in (tmp_path / "said").read_text():
            assert time.monotonic() < until and process.poll() is None, (
                tmp_path / "said"
            ).read_text()
            time.sleep(0.1)
        time.sleep(1)  # until it waits where nothing of Python's runs
        process.send_signal(number)
        assert process.wait(timeout=20) == code
    finally:
        process.kill()
    assert "stopped on request; there was nothing new to save" in (tmp_path / "said").read_text()


@pytest.mark.slow
def test_processes_of_mpirun_find_each_other_by_what_jax_reads_of_open_mpi() -> None:
    code = (
        "import os, jax; from jaxpeft.processes import clusters, distributed\npeers ="
        " distributed.start(clusters.find(os.environ),"
        " clusters.Waits(start=120))\nprint(peers.process, jax.process_count(),"
        " peers.all_gather('names', [f'of {peers.process}']))\njax.distributed.shutdown()"
    )
    there = {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1,10.148.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "JAX_COORDINATOR_PORT": str(free_port()),
        "JAX_PLATFORMS": "cpu",
    }
    ranks = [
        {"OMPI_COMM_WORLD_RANK": str(i), "OMPI_COMM_WORLD_LOCAL_RANK": str(i)} for i in range(2)
    ]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            env={**os.environ, **there, **rank},
            text=True,
        )
        for rank in ranks
    ]
    try:
        said = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert said == [f"{i} 2 [['of 0'], ['of 1']]\n" for i in range(2)]
    assert [process.returncode for process in processes] == [0, 0]
