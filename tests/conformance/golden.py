"""Write the golden adapters, each with the logits that the real `peft` computes with it.

`python -m tests.conformance.golden NAME ...` writes those of some rows of `rows.py`, without names
all of them.

`golden/bases` holds the two tiny models, `golden/NAME` the files that `peft` saves of a method, and
`logits.safetensors` the logits of the last token that is no padding, or of the row where the model
classifies rows. With them `make test` compares every method with `peft` without importing it;
`make test-all` compares them with the `peft` that is installed.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.conformance.rows import ROWS
from tests.conformance.test_peft import CASES, TASKS, Case
from tests.hub.helpers import peft_save, torch_base
from tests.models.conftest import Batch, Reference, _make

FOLDER = Path(__file__).parent / "golden"
LOGITS = FOLDER / "logits.safetensors"
GOLDEN = {
    name: CASES[f"{name}-{row.peft_models[0]}"]
    for name, row in ROWS.items()
    if row.peft is not None
}
"""One model for each method that `peft` has."""


def base_of(case: Case) -> Path:
    """Return the folder of the model that an adapter is for."""
    return FOLDER / "bases" / case.kind


def last(batch: Batch, logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the logits of each row's last token that is no padding, `[rows, vocabulary]`, or those
    of the row.
    """
    if logits.ndim == 2:
        return logits
    logits = logits[:, -batch.ids.shape[1] :]  # in front of them, the virtual tokens
    places = batch.mask.shape[1] - 1 - batch.mask[:, ::-1].argmax(axis=1)
    return logits[np.arange(len(logits)), places]


def theirs(case: Case, model: Any) -> np.ndarray[Any, Any]:
    """Return the logits of a torch model."""
    return last(case.batch, Reference(Path(), case.task, model)(case.batch))


def save(name: str, folder: Path) -> Any:
    """Save an adapter of a method with the real `peft`; return its torch model."""
    case = GOLDEN[name]
    config, options = case.peft
    model = peft_save(base_of(case), case.task, folder, config=config, size=case.size, **options)
    file = folder / "adapter_config.json"
    content = json.loads(file.read_text()) | {"base_model_name_or_path": None}
    file.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    (folder / "README.md").unlink()
    return model


def write_bases() -> None:
    """Write the models, random ones."""
    with tempfile.TemporaryDirectory() as made:
        for kind in sorted({case.kind for case in GOLDEN.values()}):
            _make(Path(made) / kind, kind, TASKS[kind], None, {})
            (FOLDER / "bases" / kind).mkdir(parents=True)
            for file in ("config.json", "model.safetensors"):
                shutil.copy(Path(made) / kind / file, FOLDER / "bases" / kind / file)


def main(names: Sequence[str]) -> None:
    """Write the files of some methods anew, without names all files."""
    if not names:
        shutil.rmtree(FOLDER, ignore_errors=True)
        write_bases()
    logits = load_file(LOGITS) if LOGITS.is_file() else {}
    for case in {case.kind: case for case in GOLDEN.values()}.values():
        logits[f"base {case.kind}"] = theirs(case, torch_base(base_of(case), case.task))
    for name in names or GOLDEN:
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        logits[name] = theirs(GOLDEN[name], save(name, FOLDER / name))
    save_file({name: np.ascontiguousarray(logits[name]) for name in sorted(logits)}, LOGITS)


if __name__ == "__main__":
    main(sys.argv[1:])
