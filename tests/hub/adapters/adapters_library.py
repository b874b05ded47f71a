"""Runs the real `adapters` library, which needs an older transformers, in a process of its own:
jobs in, logits out.

    python adapters_library.py JOBS.json OUT.npz

It is started with the folder that the library is installed to in front of everything else, and
imports nothing of jaxpeft. A job says which model class of transformers (or of the library) loads
which folder, and which adapter it loads, or which it makes, with every leaf random, and saves.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def run(job: dict[str, Any]) -> np.ndarray[Any, Any]:
    import adapters
    import torch
    import transformers

    torch.manual_seed(1)
    library = job["model_class"].endswith("AdapterModel")
    model = getattr(adapters if library else transformers, job["model_class"]).from_pretrained(
        job["base"]
    )
    if not library:
        adapters.init(model)
    if job.get("load"):
        info: dict[str, Any] = {}
        model.load_adapter(job["load"], use_safetensors=True, set_active=True, loading_info=info)
        # what the library does not find, or does not know, it only mentions
        assert not info.get("unexpected_keys"), info
        assert not [
            key for key in info.get("missing_keys", []) if job["head"] or "heads." not in key
        ], info
        return logits(model, job)
    config = getattr(adapters, job["config_class"])(**job["options"])
    if library:
        model.add_classification_head("made", **job["head_options"])
    model.add_adapter("made", config=config, set_active=True)
    with torch.no_grad():
        for key, leaf in model.named_parameters():
            if "made" in key or key.startswith(("classifier", "pre_classifier", "score")):
                leaf.add_(job["size"] * torch.randn_like(leaf))
    model.save_adapter(
        job["save"], "made", use_safetensors=job.get("safetensors", True), with_head=job["head"]
    )
    return logits(model, job)


def logits(model: Any, job: dict[str, Any]) -> np.ndarray[Any, Any]:
    import torch

    given = {key: torch.tensor(value) for key, value in job["batch"].items()}
    with torch.no_grad():
        out = model.eval()(**given)
    return (out.logits if "logits" in out else out.last_hidden_state).numpy()


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    np.savez(sys.argv[2], **{name: run(job) for name, job in jobs.items()})
