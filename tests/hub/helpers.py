"""What the tests of the hub share: files made byte by byte, copies of a model folder with something
wrong in them.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxpeft
from jaxpeft.core import paths
from jaxpeft.core.rewriting import trainable_mask
from jaxpeft.errors import AdapterError
from jaxpeft.methods.lora import LoRA

Tensors = dict[str, np.ndarray[Any, Any]]


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    """Write a safetensors file of any header, fitting or not; bytes are taken as they are."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(begin: Any, end: Any, shape: Any, dtype: Any = "F32") -> dict[str, Any]:
    """Return one entry of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def shard(folder: Path, files: dict[str, Tensors]) -> Path:
    """Write files of tensors and the index that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    where = {name: file for file, tensors in files.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
    return folder


def edited(
    source: Path,
    target: Path,
    weights: Callable[[Tensors], Any] | None = None,
    config: Callable[[dict[str, Any]], Any] | None = None,
) -> Path:
    """Copy a model folder; `weights` and `config` change what they are given, in place."""
    shutil.copytree(source, target)
    if weights is not None:
        tensors = load_file(target / "model.safetensors")
        weights(tensors)
        save_file(
            {name: np.ascontiguousarray(t) for name, t in tensors.items()},
            target / "model.safetensors",
        )
    if config is not None:
        edit_json(target / "config.json", config)
    return target


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def assert_bit_equal(a: Any, b: Any) -> None:
    """Two trees have the same paths, shapes, dtypes and bits."""
    ours, theirs = dict(paths.walk(a)), dict(paths.walk(b))
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        one, other = np.asarray(leaf), np.asarray(theirs[path])
        assert (one.dtype, one.shape) == (other.dtype, other.shape), path
        assert one.tobytes() == other.tobytes(), path


def trained(method: Any, params: Any, seed: int = 0) -> Any:
    """Add noise to the leaves that are trained, as training would; zero padding stays zero, as it
    does in training.
    """
    mask, rng = trainable_mask(method, params), np.random.default_rng(seed)

    def change(path: tuple[str, ...], leaf: Any) -> Any:
        if not paths.get(mask, path):
            return leaf
        noise = 0.2 * rng.standard_normal(leaf.shape)
        if path[-1] in ("lora_a", "lora_b"):
            used = np.any(np.asarray(paths.get(params, path[:-1])["lora_a"]) != 0, axis=-2)
            noise = noise * (used[..., None, :] if path[-1] == "lora_a" else used[..., None])
        return leaf + jax.numpy.asarray(noise, leaf.dtype)

    return paths.map_with_path(change, params)


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"
METHOD = LoRA(rank=4, alpha=6.0, targets=("query", "value"))


@dataclasses.dataclass(frozen=True)
class Saved:
    """A trained adapter on disk, and what it was made from."""

    folder: Path
    model: Any
    base: Any
    params: Any

    def load(self, **options: Any) -> Any:
        """Load it onto the base that it was made from, or onto one loaded anew with these
        options.
        """
        model, params = self.model, self.base
        if options:
            given = {"task": "sequence_classification", "dtype": jax.numpy.float32} | options
            model, params = jaxpeft.load(given.pop("base", self.model.source.folder), **given)
        return jaxpeft.load_adapter(self.folder, model, params)

    def problems(self, **options: Any) -> list[str]:
        """Return why it is refused."""
        with pytest.raises(AdapterError) as caught:
            self.load(**options)
        return list(caught.value.problems)

    def edit(self, change: Callable[[Tensors], Any]) -> None:
        """Change its tensors in place."""
        file = self.folder / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    def config(self, **values: Any) -> None:
        """Change its adapter_config.json in place."""
        edit_json(self.folder / "adapter_config.json", lambda config: config.update(values))


# --------------------------------------------------------------------------------------------- peft

_CLASSES = {
    "causal_lm": ("AutoModelForCausalLM", "CAUSAL_LM"),
    "sequence_classification": ("AutoModelForSequenceClassification", "SEQ_CLS"),
    "token_classification": ("AutoModelForTokenClassification", "TOKEN_CLS"),
    "encoder": ("AutoModel", "FEATURE_EXTRACTION"),
}


def torch_base(folder: Path, task: str) -> Any:
    """Load a fresh torch model: peft changes the one that it is given."""
    import transformers

    return _past_by_its_old_name(
        getattr(transformers, _CLASSES[task][0]).from_pretrained(folder).eval()
    )


def _past_by_its_old_name(model: Any) -> Any:
    """Let a model take `past_key_values`, which transformers 5.24 calls `cache`.

    peft 0.21 looks for the old name in the signature of a classifier, and refuses prefix tuning
    where it is not there.
    """
    import inspect

    if "cache" not in inspect.signature(model.base_model.forward).parameters:
        return model
    forward = model.forward

    def called(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        past = {} if past_key_values is None else {"cache": past_key_values}
        return forward(*args, **kwargs, **past)

    model.forward = called
    return model


def peft_load(folder: Path, task: str, adapter: Path) -> Any:
    """Load an adapter folder with the real peft."""
    from peft import PeftModel

    return PeftModel.from_pretrained(torch_base(folder, task), adapter).eval()


def peft_save(
    folder: Path,
    task: str,
    adapter: Path,
    *,
    config: str = "LoraConfig",
    size: float = 0.2,
    **options: Any,
) -> Any:
    """Make an adapter with the real peft, trained leaves random, and save it; return the torch
    model.
    """
    import peft
    import torch

    torch.manual_seed(1)
    options = {"task_type": _CLASSES[task][1], **options}
    model = peft.get_peft_model(torch_base(folder, task), getattr(peft, config)(**options)).eval()
    with torch.no_grad():
        for leaf in model.parameters():
            if leaf.requires_grad:
                leaf.add_(size * torch.randn_like(leaf))
    model.save_pretrained(adapter)
    return model
