"""A variant of a method against the real `peft`, both ways, for the tests of single methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxpeft
from tests.conformance.conftest import moved
from tests.conformance.test_peft import TASKS, Case, ours, theirs
from tests.hub.helpers import peft_load, peft_save

# peft 0.21 asks transformers 5.23 for an attribute that it calls deprecated.
quiet = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def case_of(method: Any, kind: str, config: str, size: float = 0.2, **options: Any) -> Case:
    """Make a case: a method, and the class and options of peft's config that mean the same."""
    return Case(method=method, kind=kind, peft=(config, options), size=size, padding="right")


def exported(reference: Any, folder: Path, case: Case) -> float:
    """Save a moved adapter, loads it with peft, and return the largest gap of the logits."""
    torch_model = reference(case.kind, TASKS[case.kind])
    model, base = torch_model.load()
    params = moved(
        case.method, jaxpeft.rewrite(case.method, base, jax.random.key(0)), size=case.size
    )
    jaxpeft.save_adapter(folder, case.method, params, model)
    return gap(
        theirs(case, peft_load(torch_model.folder, case.task, folder)),
        ours(case, model, params),
        torch_model,
        case,
    )


def imported(reference: Any, folder: Path, case: Case) -> tuple[float, Any]:
    """Load what peft saved, unrolled and scanned, and return the largest gap of the logits, and the
    method.
    """
    torch_model = reference(case.kind, TASKS[case.kind])
    config, options = case.peft
    adapted = peft_save(
        torch_model.folder, case.task, folder, config=config, size=case.size, **options
    )
    return loaded_gap(torch_model, folder, case, theirs(case, adapted))


def loaded_gap(torch_model: Any, folder: Path, case: Case, wanted: Any) -> tuple[float, Any]:
    """Load a folder, unrolled and scanned, and return the largest gap to the wanted logits, and the
    method.
    """
    gaps: list[float] = []
    method: Any = None
    for scan in (False, True):
        model, base = torch_model.load(scan_layers=scan)
        method, params = jaxpeft.load_adapter(folder, model, base)
        gaps.append(gap(wanted, ours(case, model, params), torch_model, case))
    return max(gaps), method


def gap(wanted: Any, found: Any, torch_model: Any, case: Case) -> float:
    """Return the largest difference as a share of the largest logit; the adapter must change
    something.
    """
    assert np.abs(wanted - theirs(case, torch_model.model)).max() > 0.02, (
        "the adapter changes too little to tell anything"
    )
    return float(np.abs(found - wanted).max()) / max(1.0, float(np.abs(wanted).max()))
