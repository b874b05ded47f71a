"""Outputs of rows do not depend on the mesh."""

from __future__ import annotations

import numpy as np
import pytest

from jaxpeft.evaluate.prepared_rows import prepare_rows
from jaxpeft.evaluate.row_outputs import Runner
from jaxpeft.inference.adapted_model import load_adapted
from jaxpeft.sharding.mesh_config import MeshConfig


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["answers", pytest.param("tags", marks=pytest.mark.slow)])
def test_a_sharded_model_has_the_same_outputs(kind, trained):
    run = trained(kind)
    found = []
    for mesh in (None, MeshConfig(strategy="fsdp", fsdp=2, data=1)):
        loaded = load_adapted(None, run.folder, sharding=mesh)
        assert (loaded.mesh is None) == (mesh is None)
        rows = prepare_rows(str(run.rows), loaded, {})
        runner = Runner(loaded, 5, rows.encoder.pad_id)
        if kind == "tags":
            found.append(np.concatenate(runner.logits(loaded.params, rows.encoded)))
            continue
        apart = runner.divergences(loaded.params, loaded.base, rows.encoded)
        found.append(np.stack([runner.losses(loaded.params, rows.encoded), apart]))
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-5)
