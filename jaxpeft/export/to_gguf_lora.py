"""`--to gguf-lora`: llama.cpp's adapter file, written and read with the package `gguf`.

    general.type = adapter, general.architecture, adapter.type = lora, adapter.lora.alpha
    blk.N.attn_q.weight.lora_a [r, in], blk.N.attn_q.weight.lora_b [out, r], ...

llama.cpp multiplies B A by alpha / r. Its `llama` architecture rotates neighboring pairs of a
head's outputs, where `transformers` rotates the halves of a head: the rows of q and k, and so those
of their B, are reordered. A of the embedding is transposed: its rows are looked up by token.

The names and layouts are those of llama.cpp (github.com/ggml-org/llama.cpp, at the commits in
parentheses): `convert_lora_to_gguf.py` (0b03ada), `permute` and `modify_tensors` of `LlamaModel` in
`convert_hf_to_gguf.py` (`conversion/llama.py` in later versions), and `src/llama-adapter.cpp`
(0650ea8).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpeft.core.targets import find_sites
from jaxpeft.errors import ConfigError, ExportError
from jaxpeft.export.export_job import Job
from jaxpeft.export.server_files import ServerFiles, server_target
from jaxpeft.export.updates import Update

Array = np.ndarray[Any, Any]
FILE = "adapter.gguf"
_ARCHITECTURES: Mapping[str, str] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
"""llama.cpp's architecture of each `model_type`."""
_PAIRS = frozenset({"llama"})
"""Architectures that rotate neighboring pairs of a head's outputs."""


def _package() -> Any:
    """Return the package `gguf`.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ConfigError(
            "--to gguf-lora: needs the package gguf; install it with pip install 'jaxpeft[gguf]'"
        ) from error


def _require_package() -> None:
    _package()


def to_pairs(rows: Array, heads: int) -> Array:
    """Reorder the rows of q or k from halves of a head to neighboring pairs, as `permute` does.

    Args:
        rows: `[out, ...]`, with the rows of one head after another.
        heads: number of heads.
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def from_pairs(rows: Array, heads: int) -> Array:
    """Reorder rows back; the inverse of `to_pairs`."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _heads(job: Job, module: str) -> int | None:
    """Return the number of heads by which a module's outputs are reordered; None for others."""
    if _ARCHITECTURES[job.outline.config["model_type"]] not in _PAIRS:
        return None
    config = job.outline.model.config
    counts = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return counts.get(module.rpartition(".")[2])


def _names(job: Job, modules: Sequence[str]) -> dict[str, str]:
    """Return llama.cpp's name of each module.

    Raises:
        ExportError: The architecture has no such module in llama.cpp.
    """
    gguf = _package()
    name = _ARCHITECTURES[job.outline.config["model_type"]]
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    known = gguf.get_tensor_name_map(arch, job.outline.model.config.num_hidden_layers)
    found = {module: known.get_name(module) for module in modules}
    missing = [module for module, own in found.items() if own is None]
    if missing:
        raise ExportError(f"{missing[0]}: llama.cpp's {name} has no such module")
    return {module: str(own) for module, own in found.items()}


def _write(job: Job, updates: Sequence[Update], folder: Path) -> None:
    gguf, first = _package(), updates[0]
    writer = gguf.GGUFWriter(folder / FILE, _ARCHITECTURES[job.outline.config["model_type"]])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_name(job.request.out.name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, first.scale * first.rank)
    names = _names(job, [one.module for one in updates])
    for one in updates:
        heads = _heads(job, one.module)
        a = one.a if one.embedding else one.a.T
        b = one.b.T if heads is None else to_pairs(one.b.T, heads)
        for end, tensor in (("lora_a", a), ("lora_b", b)):
            writer.add_tensor(f"{names[one.module]}.weight.{end}", np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read(job: Job, folder: Path) -> list[Update]:
    """Read the file as llama.cpp does, with the rows of q and k in the order of `transformers`.

    Raises:
        ExportError: It is not an adapter file of the base's architecture.
    """
    gguf = _package()
    reader = gguf.GGUFReader(folder / FILE)
    keys = gguf.Keys
    wanted = {
        keys.General.TYPE: "adapter",
        keys.Adapter.TYPE: "lora",
        keys.General.ARCHITECTURE: _ARCHITECTURES[job.outline.config["model_type"]],
    }
    found = {key: reader.get_field(key).contents() for key in wanted}
    if found != wanted:
        raise ExportError(f"{folder / FILE}: must have {wanted}, has {found}")
    alpha = float(reader.get_field(keys.Adapter.LORA_ALPHA).contents())
    tensors = {str(tensor.name): np.array(tensor.data) for tensor in reader.tensors}
    updates: list[Update] = []
    for module, name in _names(job, _modules(job)).items():
        if f"{name}.weight.lora_a" not in tensors:
            continue
        a, b = (tensors[f"{name}.weight.{end}"] for end in ("lora_a", "lora_b"))
        embedding, heads = module.endswith("embed_tokens"), _heads(job, module)
        updates.append(
            Update(
                module,
                a if embedding else a.T,
                (b if heads is None else from_pairs(b, heads)).T,
                alpha / b.shape[1],
                embedding=embedding,
            )
        )
    return updates


def _modules(job: Job) -> list[str]:
    """Return the names of all linear modules and embeddings of the base."""
    return [name for site in find_sites(job.base, ("linear", "embedding")) for name in site.names]


def _usage(job: Job, updates: Sequence[Update]) -> str:
    del updates
    return f"serve it: llama-server -m BASE.gguf --lora {job.request.out / FILE}"


GGUF_LORA = server_target(
    "low-rank updates without biases, on linear modules, an untied embedding and head",
    ServerFiles(
        library="llama.cpp",
        embeddings=dict.fromkeys(_ARCHITECTURES, True),
        write=_write,
        read=_read,
        usage=_usage,
        needs=_require_package,
    ),
)
