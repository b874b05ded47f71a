"""The step of `benchmarks.step` on torch: Hugging Face transformers and PEFT, in their usual
configurations.

    python -m benchmarks.step_peer PEER [the options of benchmarks.step]

Prints one JSON line. The model has the same shape, random weights and token ids; LoRA is on all
linear layers, experts included, with adapters in bfloat16, which is faster than PEFT's usual float32; no other tensor
is cast to float32 either. AdamW is fused.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from typing import Any

from benchmarks import step


@dataclasses.dataclass(frozen=True)
class Peer:
    """A configuration of PEFT: compiled, with gradient checkpointing, on an NF4 base by
    bitsandbytes, or with the kernels of Liger.
    """

    compiled: bool = False
    checkpointed: bool = False
    nf4: bool = False
    liger: bool = False


PEERS = {
    "peft": Peer(),
    "peft-compile": Peer(compiled=True),
    "peft-checkpoint": Peer(checkpointed=True),
    "peft-nf4": Peer(nf4=True),
    "peft-nf4-checkpoint": Peer(nf4=True, checkpointed=True),
    "peft-liger": Peer(liger=True),
    "peft-liger-checkpoint": Peer(liger=True, checkpointed=True),
}


def main(argv: list[str]) -> None:
    """Measure one peer."""
    parser = argparse.ArgumentParser(prog="benchmarks.step_peer")
    parser.add_argument("peer", choices=sorted(PEERS))
    parser.add_argument("--shape", choices=sorted(step.SHAPES), default="llama3_8b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", nargs="*")
    parser.add_argument("--steps", type=int, default=12)
    options, _ = parser.parse_known_args(argv)
    options.method, options.quant = "lora", "nf4" if PEERS[options.peer].nf4 else "none"
    step.emit(measure(options.peer, PEERS[options.peer], options))


def measure(name: str, how: Peer, options: Any) -> dict[str, Any]:
    """Measure a peer."""
    began = time.perf_counter()
    import peft
    import torch
    import transformers

    model = made(how, options)
    trained = [p for p in model.parameters() if p.requires_grad]
    cuda = torch.cuda.is_available()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-4, fused=True)
    run = torch.compile(model) if how.compiled else model
    if cuda:
        # of training alone: a model is quantized after it is there
        torch.cuda.reset_peak_memory_stats()
    ids = torch.tensor(step.token_ids(options), dtype=torch.long, device=model.device)
    losses: list[Any] = []
    seconds: list[float] = []
    for _ in range(options.steps + 3):
        start = time.perf_counter()
        loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        if len(seconds) == 1:
            first = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    kind = torch.cuda.get_device_name() if cuda else "cpu"
    adapter = sum(p.numel() for p in trained)
    return {
        "program": name,
        "remat": "full" if how.checkpointed else "none",
        **step.figures(options, adapter, seconds[3:], peak, kind),
        "first_step_s": round(first, 1),
        "loss": [round(losses[0], 4), round(losses[-1], 4)],
        "torch": torch.__version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
    }


def made(how: Peer, options: Any) -> Any:
    """Return the model with its adapter, on the device."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    if how.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    config = AutoConfig.for_model(**(step.COMMON | dict(step.SHAPES[options.shape])))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    if how.nf4:
        _to_nf4(model)
    if how.checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.config.use_cache = False
    experts = [name for name, _ in model.named_parameters() if ".mlp.experts." in name]
    lora = LoraConfig(
        r=options.rank,
        lora_alpha=options.rank,
        target_modules=options.targets or "all-linear",
        target_parameters=None if options.targets else experts or None,
    )
    adapted = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for parameter in adapted.parameters():
        # bitsandbytes' layers give theirs in float32: products with it are slow
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    return adapted.train()


def _to_nf4(model: Any) -> None:
    """Replace the linear layers by bitsandbytes' 4-bit layers, with double quantization."""
    import bitsandbytes as bnb
    import torch

    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear):
                layer = bnb.nn.Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=False,
                    compute_dtype=torch.bfloat16,
                    compress_statistics=True,
                    quant_type="nf4",
                )
                # quantized on the device that it is on, as soon as the layer is put there
                layer.weight = bnb.nn.Params4bit(
                    child.weight.data,
                    requires_grad=False,
                    quant_type="nf4",
                    compress_statistics=True,
                )
                setattr(parent, name, layer.to(child.weight.device))
    model.is_loaded_in_4bit = True


if __name__ == "__main__":
    main(sys.argv[1:])
