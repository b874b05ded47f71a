"""Several processes that load one model, really run: each reads its part of the bytes, and together
they have the numbers of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxpeft
from jaxpeft.core import paths
from jaxpeft.hub import base_identity, sources
from tests.conftest import ROOT

SIZES = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4}


def run(count: int, folder: Path, **options: Any) -> list[Any]:
    """Run the processes and return what they printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-m", "tests.hub.weights.loading_process"]
    # the reading is tried, not the compiler: without the cache of programs, which the tests of one
    # process share
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAXPEFT_CACHE": "off"}
    started = [
        subprocess.Popen(
            [*program, str(port), str(count), str(i), str(folder), json.dumps(options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        for i in range(count)
    ]
    try:
        said = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), "\n".join(err for _, err in said)
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


def checksums(params: Any) -> dict[str, str]:
    return {
        paths.text(p): hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
        for p, leaf in paths.walk(params)
    }


CASES = [
    (2, {"mesh": (4, 1), "way": "rows"}),
    (2, {"mesh": (4, 1), "way": "columns", "scan_layers": True}),
    (4, {"mesh": (4, 2), "way": "both"}),
    (4, {"mesh": (8, 1), "way": "rows", "quant": "nf4"}),
    (2, {"mesh": (4, 1), "way": "columns", "quant": "nf4", "scan_layers": True}),
    (2, {"mesh": (2, 2), "way": "layers", "quant": "int8", "scan_layers": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "options"), CASES, ids=lambda value: str(value))
def test_each_process_reads_its_part_and_together_they_have_the_numbers_of_one(
    reference: Any, count: int, options: dict[str, Any]
) -> None:
    folder = reference("llama", "causal_lm", **SIZES).folder
    given = {key: value for key, value in options.items() if key not in ("mesh", "way")}
    _, plain = jaxpeft.load(folder, task="causal_lm", cache=False, **given)
    said = run(count, folder, **options)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(jaxpeft.load(folder, task="causal_lm")[1]))
    for one in said:
        assert one["sha256"] == checksums(plain)
        assert one["base"] == base_identity.fingerprint(sources.resolve(folder, None))
        if "quant" not in options:
            assert one["asked"] == pytest.approx(one["held"], rel=0.01)
        # what no axis divides, such as the scales of norms or an embedding along its columns, is
        # small here
        assert one["asked"] == pytest.approx(total / count, rel=0.1)
