"""Adapters of every method that Hugging Face PEFT has go both ways, with the same logits; the gaps
are recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxpeft
from tests.conformance.conftest import moved
from tests.conformance.rows import ROWS
from tests.hub.helpers import peft_load, peft_save
from tests.models.conftest import Batch, Reference, forward, make_batch
from tests.representatives import METHODS
from tests.representatives import case as param

pytestmark = [
    # It copies RandLora's shared bases, each as large as a kernel, to every site of a file, and
    # misses the copies elsewhere.
    pytest.mark.filterwarnings(
        "ignore:Found missing adapter keys .*randlora_[AB].default.*:UserWarning"
    ),
    # BEFT says that it cannot be merged.
    pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias:UserWarning"),
    # It knows norms of no model.
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    # BOFT looks for a CUDA extension, without which it computes one butterfly factor.
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1:UserWarning"),
    # SHiRA makes sparse tensors, of which torch says once that it does not check them.
    pytest.mark.filterwarnings(
        "ignore:Sparse invariant checks are implicitly disabled:UserWarning"
    ),
]

TASKS = {
    "llama": "causal_lm",
    "bert": "sequence_classification",
    "roberta": "sequence_classification",
}
MARK = 1e-4


@dataclass(frozen=True)
class Case:
    """One method on one model, as both sides call it."""

    method: Any
    kind: str
    peft: tuple[str, Mapping[str, Any]]
    size: float
    padding: str

    @property
    def task(self) -> str:
        return TASKS[self.kind]

    @property
    def batch(self) -> Batch:
        return make_batch(self.padding)


CASES = {
    f"{name}-{kind}": Case(row.method, kind, row.peft, row.moved, row.padding)
    for name, row in ROWS.items()
    if row.peft is not None
    for kind in row.models
    if kind in row.peft_models
}
QUICK = {f"{name}-{kind}" for name, kind in METHODS.items()}
every_case = pytest.mark.parametrize(
    "case", [param(name, case, quick=name in QUICK) for name, case in CASES.items()]
)


def theirs(case: Case, torch_model: Any) -> Any:
    out = Reference(Path(), case.task, torch_model)(case.batch)
    return real(case, out[:, -case.batch.ids.shape[1] :] if out.ndim == 3 else out)


def ours(case: Case, model: Any, params: Any) -> Any:
    return real(case, np.asarray(forward(model, params, case.batch.ids, case.batch.mask)))


def real(case: Case, out: Any) -> Any:
    return out[case.batch.mask.astype(bool)] if out.ndim == 3 else out


def check(record: Any, case: Case, wanted: Any, plain: Any, found: Any) -> None:
    gap = float(np.abs(found - wanted).max())
    record("gap", gap)
    assert np.abs(wanted - plain).max() > 0.02, "the adapter changes too little to tell anything"
    assert gap <= MARK * max(1.0, float(np.abs(wanted).max()))


@every_case
def test_the_real_peft_gives_the_logits_of_what_jaxpeft_saved(
    reference: Any,
    tmp_path: Path,
    record_property: Any,
    case: Case,
) -> None:
    torch_model = reference(case.kind, case.task)
    model, base = torch_model.load()
    params = moved(
        case.method, jaxpeft.rewrite(case.method, base, jax.random.key(0)), size=case.size
    )
    jaxpeft.save_adapter(tmp_path, case.method, params, model)
    loaded = theirs(case, peft_load(torch_model.folder, case.task, tmp_path))
    check(record_property, case, loaded, theirs(case, torch_model.model), ours(case, model, params))


@pytest.mark.slow  # `test_golden.py` compares with logits that peft gave before
@every_case
def test_jaxpeft_gives_the_logits_of_what_the_real_peft_saved(
    reference: Any,
    tmp_path: Path,
    record_property: Any,
    case: Case,
) -> None:
    torch_model = reference(case.kind, case.task)
    config, options = case.peft
    adapted = peft_save(
        torch_model.folder, case.task, tmp_path, config=config, size=case.size, **options
    )
    wanted = theirs(case, adapted)
    for scan in (False, True):
        model, base = torch_model.load(scan_layers=scan)
        method, params = jaxpeft.load_adapter(tmp_path, model, base)
        # The same method, or what it is a form of: a file of peft's says LORA of LoRA-FA and
        # PREFIX_TUNING of P-tuning v2.
        assert isinstance(case.method, type(method))
        check(
            record_property,
            case,
            wanted,
            theirs(case, torch_model.model),
            ours(case, model, params),
        )
