"""`--to vllm`: an adapter folder that vLLM's LoRA loader accepts, a plain LoRA in PEFT's format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpeft.errors import ExportError
from jaxpeft.export import merged_model
from jaxpeft.export.export_job import Job
from jaxpeft.export.server_files import ServerFiles, server_target
from jaxpeft.export.to_peft import model_with_name
from jaxpeft.export.updates import Update, with_updates
from jaxpeft.export.vllm_rules import CLASSES, RANKS, max_rank, parse_name
from jaxpeft.hub.adapters.folder_layout import CONFIG
from jaxpeft.hub.adapters.layouts import LAYOUTS
from jaxpeft.hub.adapters.save import save_adapter
from jaxpeft.hub.weights.safetensors_files import read_header
from jaxpeft.json_files import read_json


def _write(job: Job, updates: Sequence[Update], folder: Path) -> None:
    method, params = with_updates(updates, job.base)
    save_adapter(folder, method, params, model_with_name(job), settings=job.adapter.settings)
    merged_model.copy_files(None, job.adapter.folder, folder, job.adapter.settings)


def _read(job: Job, folder: Path) -> list[Update]:
    """Read the folder as vLLM does: names and scale by its rules.

    Raises:
        ExportError: vLLM would refuse the folder, or ignore a tensor.
    """
    config = read_json(folder / CONFIG)
    refused = {key: config.get(key) for key in ("modules_to_save", "use_dora", "trainable_tokens")}
    refused |= {"bias": None if config["bias"] == "none" else config["bias"]}
    if any(refused.values()) or config["r"] > RANKS[-1]:
        raise ExportError(f"{folder / CONFIG}: vLLM does not support {refused}, r {config['r']}")
    serving = CLASSES[job.outline.config["model_type"]]
    root = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    found: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
    for name, tensor in read_header(folder / LAYOUTS["peft"].weights).items():
        module, factor = parse_name(name, serving)
        found.setdefault(module, {})[factor] = tensor.read().T
    return [
        Update(
            module,
            factors["a"],
            factors["b"],
            config["lora_alpha"] / root,
            embedding=module.endswith("embed_tokens"),
        )
        for module, factors in found.items()
    ]


def _usage(job: Job, updates: Sequence[Update]) -> str:
    base, rank = job.adapter.base or job.outline.model.source.name, max_rank(updates[0].rank)
    return (
        f"serve it: vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules"
        f" NAME={job.request.out}"
    )


VLLM = server_target(
    "low-rank updates without biases, of rank 512 at most, on linear modules; of llama and mistral"
    " also on an untied embedding and head",
    ServerFiles(
        library="vLLM",
        embeddings={kind: bool(serving.embeddings) for kind, serving in CLASSES.items()},
        most_rank=RANKS[-1],
        write=_write,
        read=_read,
        usage=_usage,
    ),
)
