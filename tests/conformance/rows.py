"""The methods, one row each: what the table of properties is tried on. A new method is one row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jaxpeft

DECODER, ENCODER = "llama", "bert"


@dataclass(frozen=True)
class Row:
    """One method, as it is tried.

    Attributes:
        method: with options for tiny models.
        models: which of the decoder and the encoder it is for.
        other: the same kind of method with other options: another adapter of a bank, None for the
            same.
        peft: what the real `peft` calls it: the name of a config class and its options; None where
            no file of peft's can hold it.
        moved: how far its trained leaves are moved from where they begin.
        why: why a fresh adapter changes the outputs, for a method that says so.
        scanned: whether stacked layers will do.
        alone: why several cannot serve one batch, as it is told; empty where they can.
        unmerged: why it cannot be merged on a model, as it is told; without an entry it can.
        unquantized: why its base cannot be quantized, as it is told; empty where it can.
        peft_models: those on which the real `peft` can do it.
        padding: side of the rows that are compared with the real `peft`.
    """

    method: Any
    models: tuple[str, ...] = (DECODER, ENCODER)
    peft: tuple[str, Mapping[str, Any]] | None = None
    moved: float = 0.2
    why: str = ""
    scanned: bool = True
    padding: str = "right"
    alone: str = ""
    unmerged: Mapping[str, str] = field(default_factory=dict[str, str])
    unquantized: str = ""
    peft_models: tuple[str, ...] = (DECODER, ENCODER)


LINEAR = r".*\.(q_proj|down_proj|query|output\.dense)"
"""Some linear sites of both tiny models."""

QUANTIZED = "which is quantized"
ATTENDED = "every token attends to the virtual ones, whatever they hold"

ROWS: Mapping[str, Row] = {
    "lora": Row(
        jaxpeft.LoRA(rank=4, alpha=6.0, targets=LINEAR),
        peft=("LoraConfig", {"r": 4, "lora_alpha": 6, "target_modules": LINEAR}),
    ),
    "lora pissa": Row(jaxpeft.LoRA(rank=4, alpha=6.0, init_weights="pissa")),
    "lora olora": Row(jaxpeft.LoRA(rank=4, alpha=6.0, init_weights="olora")),
    "ln_tuning": Row(
        jaxpeft.LNTuning(), peft=("LNTuningConfig", {"target_modules": r".*(norm|LayerNorm)$"})
    ),
    "freeze": Row(jaxpeft.Freeze(layers=1), scanned=False, unquantized=QUANTIZED),
    "trainable_tokens": Row(
        jaxpeft.TrainableTokens(tokens=(5, 17, 40)),
        peft=("TrainableTokensConfig", {"token_indices": [5, 17, 40]}),
        peft_models=(DECODER,),  # its TrainableTokens saves no heads
        moved=1.0,
    ),
    "mixed": Row(
        jaxpeft.Mixed(
            methods=(
                jaxpeft.LoRA(rank=4, targets=r".*(q_proj|query)"),
                jaxpeft.LoRA(rank=2, targets=r".*(up_proj|intermediate\.dense)"),
                jaxpeft.LNTuning(),
            )
        )
    ),
    "beft": Row(
        jaxpeft.BEFT(targets=LINEAR),
        models=(ENCODER, DECODER),  # first the one that it can be merged into
        peft=("BeftConfig", {"target_modules": LINEAR}),
        unmerged={DECODER: "merging beft needs a bias, but the module has none"},
    ),
    "bitfit": Row(jaxpeft.BitFit(), models=(ENCODER,)),
    "head": Row(jaxpeft.Head(), models=(ENCODER,)),
    "full": Row(jaxpeft.Full(), unquantized=QUANTIZED),
    "ia3": Row(
        jaxpeft.IA3(targets=LINEAR, feedforward=r".*(down_proj|\.output\.dense)"),
        peft=(
            "IA3Config",
            {"target_modules": LINEAR, "feedforward_modules": r".*(down_proj|\.output\.dense)"},
        ),
    ),
    "loha": Row(
        jaxpeft.LoHa(rank=4, alpha=6.0, targets=LINEAR),
        peft=("LoHaConfig", {"r": 4, "alpha": 6, "target_modules": LINEAR}),
    ),
    "lokr": Row(
        jaxpeft.LoKr(rank=2, alpha=3.0, targets=LINEAR, decompose_both=True, decompose_factor=6),
        peft=(
            "LoKrConfig",
            {
                "r": 2,
                "alpha": 3,
                "target_modules": LINEAR,
                "decompose_both": True,
                "decompose_factor": 6,
            },
        ),
    ),
    "dora": Row(
        jaxpeft.DoRA(rank=4, alpha=6.0, targets=LINEAR),
        peft=("LoraConfig", {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "use_dora": True}),
    ),
    "lora_fa": Row(
        jaxpeft.LoRAFA(rank=4, alpha=6.0, targets=LINEAR),
        peft=("LoraConfig", {"r": 4, "lora_alpha": 6, "target_modules": LINEAR}),
    ),
    "vera": Row(
        jaxpeft.VeRA(rank=16, targets=LINEAR),
        peft=("VeraConfig", {"r": 16, "target_modules": LINEAR}),
        moved=0.1,
    ),
    "pvera": Row(
        jaxpeft.PVeRA(rank=16, targets=LINEAR),
        peft=("PveraConfig", {"r": 16, "target_modules": LINEAR}),
        moved=0.1,
    ),
    "adalora": Row(
        jaxpeft.AdaLoRA(rank=4, target_rank=3, alpha=6.0, final_steps=1, targets=LINEAR),
        peft=(
            "AdaLoraConfig",
            {
                "init_r": 4,
                "target_r": 2,
                "lora_alpha": 6,
                "total_step": 9,
                "target_modules": LINEAR,
            },
        ),
        moved=0.4,
    ),
    "randlora": Row(
        jaxpeft.RandLora(rank=5, alpha=2.0, targets=LINEAR),
        peft=("RandLoraConfig", {"r": 5, "randlora_alpha": 2, "target_modules": LINEAR}),
        moved=0.1,
    ),
    "gralora": Row(
        jaxpeft.GraLoRA(rank=4, hybrid_rank=2, alpha=6.0, targets=LINEAR),
        peft=("GraloraConfig", {"r": 4, "hybrid_r": 2, "alpha": 6, "target_modules": LINEAR}),
    ),
    "vblora": Row(
        jaxpeft.VBLoRA(vectors=12, vector_length=8, targets=LINEAR),
        peft=("VBLoRAConfig", {"num_vectors": 12, "vector_length": 8, "target_modules": LINEAR}),
        why="no logit would have a gradient",
    ),
    "unilora": Row(
        jaxpeft.UniLoRA(rank=4, length=50, targets=LINEAR),
        peft=(
            "UniLoraConfig",
            {"r": 4, "theta_d_length": 50, "save_indices": True, "target_modules": LINEAR},
        ),
        why="neither matrix would have a gradient",
    ),
    "hira": Row(
        jaxpeft.HiRA(rank=4, targets=LINEAR),
        peft=("HiraConfig", {"r": 4, "target_modules": LINEAR}),
        moved=0.5,
    ),
    "peanut": Row(
        jaxpeft.PEANuT(rank=4, depth=1, activation="tanh", targets=LINEAR),
        peft=("PeanutConfig", {"r": 4, "depth": 1, "act_fn": "tanh", "target_modules": LINEAR}),
        moved=0.4,
    ),
    "glora": Row(
        jaxpeft.GLoRA(rank=4, bias_form="vector", targets=LINEAR),
        peft=("GloraConfig", {"r": 4, "config_D_E": "vector", "target_modules": LINEAR}),
    ),
    "deft": Row(
        jaxpeft.DEFT(rank=4, alpha=6, targets=LINEAR),
        peft=("DeftConfig", {"r": 4, "alpha": 6, "target_modules": LINEAR}),
        why="what is injected is what is removed, up to rounding",
    ),
    "osf": Row(
        jaxpeft.OSF(kept_rank=0.75, targets=LINEAR),
        peft=("OSFConfig", {"effective_rank": 0.75, "target_modules": LINEAR}),
        moved=0.1,
    ),
    "c3a": Row(
        jaxpeft.C3A(block_size=8, targets=LINEAR),
        peft=("C3AConfig", {"block_size": 8, "target_modules": LINEAR}),
        moved=1.0,
    ),
    "fourierft": Row(
        jaxpeft.FourierFT(frequencies=40, targets=LINEAR),
        peft=("FourierFTConfig", {"n_frequency": 40, "target_modules": LINEAR}),
        moved=1.0,
    ),
    "waveft": Row(
        jaxpeft.WaveFT(coefficients=40, wavelet="db2", scaling=1.0, targets=LINEAR),
        peft=(
            "WaveFTConfig",
            {
                "n_frequency": 40,
                "wavelet_family": "db2",
                "scaling": 1.0,
                "target_modules": LINEAR,
            },
        ),
    ),
    "shira": Row(
        jaxpeft.SHiRA(rank=2, targets=LINEAR),
        peft=("ShiraConfig", {"r": 2, "target_modules": LINEAR}),
    ),
    "supertuning": Row(
        jaxpeft.SuperTuning(share=0.05, rank=2, targets=LINEAR),
        peft=("SupertuningConfig", {"sparsity": 0.95, "r": 2, "target_modules": LINEAR}),
    ),
    "oft": Row(
        jaxpeft.OFT(block_size=8, targets=LINEAR),
        peft=("OFTConfig", {"oft_block_size": 8, "target_modules": LINEAR}),
        moved=0.1,
    ),
    "boft": Row(
        jaxpeft.BOFT(block_size=4, targets=LINEAR),
        peft=("BOFTConfig", {"boft_block_size": 4, "target_modules": LINEAR}),
    ),
    "boft butterfly": Row(jaxpeft.BOFT(block_size=4, factors=3, targets=LINEAR)),
    "hra": Row(
        jaxpeft.HRA(rank=4, targets=LINEAR),
        peft=("HRAConfig", {"r": 4, "target_modules": LINEAR}),
    ),
    "road": Row(
        jaxpeft.RoAd(variant="road_2", group_size=8, targets=LINEAR),
        peft=("RoadConfig", {"variant": "road_2", "group_size": 8, "target_modules": LINEAR}),
    ),
    "prefix": Row(
        jaxpeft.PrefixTuning(num_virtual_tokens=5),
        peft=("PrefixTuningConfig", {"num_virtual_tokens": 5}),
        why=ATTENDED,
    ),
    "prefix projection": Row(
        jaxpeft.PrefixTuning(num_virtual_tokens=5, projection=True, encoder_hidden_size=12),
        peft=(
            "PrefixTuningConfig",
            {"num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 12},
        ),
        why=ATTENDED,
    ),
    "ptuning_v2": Row(
        jaxpeft.PTuningV2(num_virtual_tokens=5),
        peft=("PrefixTuningConfig", {"num_virtual_tokens": 5}),
        why=ATTENDED,
    ),
    "cartridge": Row(
        jaxpeft.Cartridge(num_virtual_tokens=5, frozen_tokens=2),
        peft=("CartridgeConfig", {"num_virtual_tokens": 5, "num_frozen_tokens": 2}),
        why=ATTENDED,
    ),
    "prompt": Row(
        jaxpeft.PromptTuning(num_virtual_tokens=5),
        peft=("PromptTuningConfig", {"num_virtual_tokens": 5}),
        why=ATTENDED,
    ),
    "ptuning": Row(
        jaxpeft.PTuning(num_virtual_tokens=5, encoder_hidden_size=12),
        peft=("PromptEncoderConfig", {"num_virtual_tokens": 5, "encoder_hidden_size": 12}),
        why=ATTENDED,
    ),
    "ptuning lstm": Row(
        jaxpeft.PTuning(num_virtual_tokens=5, encoder="lstm", encoder_hidden_size=12),
        peft=(
            "PromptEncoderConfig",
            {
                "num_virtual_tokens": 5,
                "encoder_hidden_size": 12,
                "encoder_reparameterization_type": "LSTM",
            },
        ),
        why=ATTENDED,
    ),
    "delora": Row(
        jaxpeft.DeLoRA(rank=4, boundary=2.0, targets=LINEAR),
        peft=("DeloraConfig", {"r": 4, "delora_lambda": 2, "target_modules": LINEAR}),
    ),
    "miss": Row(
        jaxpeft.MiSS(rank=5, targets=LINEAR),
        peft=("MissConfig", {"r": 5, "target_modules": LINEAR}),
        moved=0.05,
    ),
    "miss bat": Row(
        jaxpeft.MiSS(rank=4, variant="bat", targets=LINEAR),
        peft=("MissConfig", {"r": 4, "init_weights": "bat", "target_modules": LINEAR}),
        moved=0.05,
    ),
    "adapter houlsby": Row(
        jaxpeft.Adapter(placement="houlsby", reduction_factor=4, non_linearity="swish")
    ),
    "adapter pfeiffer": Row(jaxpeft.Adapter(reduction_factor=4, dropout=0.1)),
    "adapter parallel": Row(
        jaxpeft.Adapter(placement="parallel", reduction_factor=2, scaling="learned")
    ),
    "adapter bert": Row(
        jaxpeft.Adapter(reduction_factor=4, init_weights="bert"),
        why="both matrices begin random and small",
    ),
    "compacter": Row(jaxpeft.Compacter(reduction_factor=4, rule_range=0.1)),
}

SHOWN: Mapping[str, Any] = {
    "trainable_tokens": jaxpeft.TrainableTokens(tokens=tuple(range(100))),
    "mixed": ROWS["mixed"].method,
}
"""Options with which a method's share of a large model is shown, where it has no defaults for all.
"""
