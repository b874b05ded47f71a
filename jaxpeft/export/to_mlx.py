"""`--to mlx`: the adapter files of MLX-LM.

    adapters.safetensors   MODULE.lora_a [in, r], MODULE.lora_b [r, out]; of DoRA, MODULE.m [out]
    adapter_config.json    {"fine_tune_type": "lora" or "dora", "num_layers": the last layers that
                           have adapters, "lora_parameters": {"rank", "scale", "dropout", "keys"}}

`scale` multiplies A B as it is, without the division by the rank. `keys` are names of modules
within a layer, or of modules outside of the layers. A module that is named there but has no tensors
keeps `lora_b = 0` and computes the base.

The names, shapes and the meaning of the scale are those of mlx-lm 0.32: `mlx_lm/tuner/lora.py`,
`dora.py`, and `load_adapters` and `linear_to_lora_layers` of `utils.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpeft.export.export_job import Job
from jaxpeft.export.server_files import ServerFiles, server_target
from jaxpeft.export.updates import Update
from jaxpeft.hub.adapters.folder_layout import CONFIG
from jaxpeft.hub.weights.safetensors_files import read_header
from jaxpeft.hub.weights.safetensors_writing import write_arrays
from jaxpeft.json_files import read_json

_WEIGHTS = "adapters.safetensors"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def _write(job: Job, updates: Sequence[Update], folder: Path) -> None:
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for one in updates:
        tensors |= {f"{one.module}.lora_a": one.a, f"{one.module}.lora_b": one.b}
        if one.magnitude is not None:
            tensors[f"{one.module}.m"] = one.magnitude
    places = [_LAYER.fullmatch(one.module) for one in updates]
    layers = [int(place[1]) for place in places if place]
    total, first = job.outline.model.config.num_hidden_layers, updates[0]
    keys = {place[2] if place else one.module for place, one in zip(places, updates, strict=True)}
    config = {
        "model": job.adapter.base or job.outline.model.source.name,
        "fine_tune_type": "lora" if first.magnitude is None else "dora",
        "num_layers": total - min(layers, default=0),
        "lora_parameters": {
            "rank": first.rank,
            "scale": first.scale,
            "dropout": 0.0,
            "keys": sorted(keys),
        },
    }
    write_arrays(tensors, folder / _WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _read(job: Job, folder: Path) -> list[Update]:
    """Read the files as MLX-LM does: the scale from the options, the rest by names of tensors."""
    del job
    options = read_json(folder / CONFIG)
    tensors = {name: tensor.read() for name, tensor in read_header(folder / _WEIGHTS).items()}
    scaled = options["fine_tune_type"] == "dora"
    modules = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    return [
        Update(
            module,
            tensors[f"{module}.lora_a"],
            tensors[f"{module}.lora_b"],
            float(options["lora_parameters"]["scale"]),
            tensors[f"{module}.m"] if scaled else None,
            module.endswith("embed_tokens"),
        )
        for module in modules
    ]


def _usage(job: Job, updates: Sequence[Update]) -> str:
    del updates
    base = job.adapter.base or job.outline.model.source.name
    return f"serve it: mlx_lm.server --model {base} --adapter-path {job.request.out}"


MLX = server_target(
    "low-rank updates without biases, on linear modules, an untied embedding and head; DoRA on"
    " linear modules",
    ServerFiles(
        library="MLX-LM",
        embeddings=dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), True),
        magnitudes=True,
        write=_write,
        read=_read,
        usage=_usage,
    ),
)
