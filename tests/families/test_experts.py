"""Mixtures of experts: adapters of experts, their gradients, the load-balancing loss, and what is
refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft.core.expert_sites import adapts_experts
from jaxpeft.core.tree import unstack_layers
from jaxpeft.errors import ConfigError, TargetError
from jaxpeft.methods import METHODS
from jaxpeft.models.base import ROUTING
from jaxpeft.models.experts import Mixture, balance_loss
from jaxpeft.train.__main__ import main
from jaxpeft.train.losses import loss_for
from jaxpeft.train.step import make_loss_sum
from tests.export.making import assert_close, ours, theirs
from tests.hub.helpers import peft_load, peft_save, trained
from tests.models.conftest import Reference, forward, make_batch
from tests.representatives import both_stacks
from tests.train.runs import write_config, write_rows

CAUSAL = "causal_lm"
GATED = ("gate_proj", "up_proj", "down_proj")
EXPERTS = {
    "mixtral": ("w1", "w2", "w3"),
    "qwen3_moe": GATED,
    "glm4_moe": GATED,
    "deepseek_v3": GATED,
    "gpt_oss": ("gate_up_proj", "down_proj"),
}
OUTSIDE = {
    **dict.fromkeys(("glm4_moe", "deepseek_v3"), ("shared_experts", "mlp")),
    "qwen3_moe": ("mlp",),
}
"""Modules that have parts with the names of those of an expert."""
every_family = pytest.mark.parametrize("kind", EXPERTS)
Make = Callable[..., Reference]


# PEFT itself writes a pattern for the rank of the joint gate and up, and does not find it
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@every_family
@both_stacks
@pytest.mark.representatives("scanned-mixtral")
def test_peft_gives_the_logits_of_adapted_experts(
    reference: Make, tmp_path: Path, kind: str, scan: bool
) -> None:
    made = reference(kind, CAUSAL)
    model, base = made.load(scan_layers=scan)
    others = tuple(f"{module}.{name}" for module in OUTSIDE.get(kind, ()) for name in GATED)
    method = jaxpeft.LoRA(rank=4, targets=("o_proj", *EXPERTS[kind]), exclude=others)
    params = trained(method, jaxpeft.rewrite(method, base, jax.random.key(0)))
    jaxpeft.save_adapter(tmp_path / "a", method, params, model)
    assert_close(
        ours(model, params), theirs(CAUSAL, peft_load(made.folder, CAUSAL, tmp_path / "a"))
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@every_family
@both_stacks
@pytest.mark.parametrize(
    "parameters",
    [
        ("gate_up_proj", "down_proj"),
        ("gate_up_proj",),
        ("down_proj",),
        ("down_proj", "router"),
    ],
    ids="-".join,
)
@pytest.mark.representatives("gate_up_proj-down_proj-scanned-qwen3_moe")
def test_an_adapter_of_parameters_gives_the_logits_of_peft(
    reference: Make, tmp_path: Path, kind: str, scan: bool, parameters: tuple[str, ...]
) -> None:
    made = reference(kind, CAUSAL)
    router = f"mlp.{'router' if kind == 'gpt_oss' else 'gate'}.weight"
    names = [router if name == "router" else f"mlp.experts.{name}" for name in parameters]
    torch_model = peft_save(
        made.folder, CAUSAL, tmp_path / "a", r=4, target_modules=["o_proj"], target_parameters=names
    )
    model, base = made.load(scan_layers=scan)
    method, params = jaxpeft.load_adapter(tmp_path / "a", model, base)
    assert_close(ours(model, params), theirs(CAUSAL, torch_model))
    jaxpeft.save_adapter(tmp_path / "b", method, params, model)
    _, again = jaxpeft.load_adapter(tmp_path / "b", model, base)
    assert_close(ours(model, params), ours(model, again))


ADAPTING = tuple(
    name
    for name, method in METHODS.items()
    # linear modules of experts have no bias for beft
    if adapts_experts(method) and name not in ("trainable_tokens", "beft")
)
OPTIONS: dict[str, dict[str, Any]] = {
    "vblora": {"vectors": 9, "vector_length": 8},
    "c3a": {"block_size": 8},
    "fourierft": {"frequencies": 100},
    "waveft": {"coefficients": 100},
    "shira": {"rank": 4},
    "road": {"group_size": 8},
    "miss": {"rank": 4},
}


@pytest.mark.slow
@both_stacks
@pytest.mark.parametrize("name", ADAPTING)
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
@pytest.mark.representatives("qwen3_moe-lora-scanned")
def test_adapted_experts_compute_as_their_merged_kernels(
    reference: Make, scan: bool, kind: str, name: str
) -> None:
    model, base = reference(kind, CAUSAL).load(scan_layers=scan)
    method = METHODS[name](targets=r".*\.experts\..*", **OPTIONS.get(name, {}))
    fresh = jaxpeft.rewrite(method, base, jax.random.key(0))
    if method.fresh_is_base:
        assert_close(ours(model, fresh), ours(model, base))
    params = trained(method, fresh)
    merged = jaxpeft.merge(method, params)
    assert_close(ours(model, params), ours(model, merged))
    assert np.abs(ours(model, merged) - ours(model, base)).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "other", [jaxpeft.DoRA(rank=2), jaxpeft.HiRA(rank=2)], ids=["dora", "hira"]
)
def test_two_adapters_of_experts_compute_as_they_are_merged(reference: Make, other: Any) -> None:
    model, base = reference("qwen3_moe", CAUSAL).load(scan_layers=True)
    method = jaxpeft.Mixed(methods=(jaxpeft.IA3(targets=("up_proj",), feedforward=()), other))
    params = trained(method, jaxpeft.rewrite(method, base, jax.random.key(0)))
    assert_close(ours(model, params), ours(model, jaxpeft.merge(method, params)))


@every_family
@pytest.mark.representatives("gpt_oss")
def test_gradients_of_layers_are_those_of_torch(reference: Make, kind: str) -> None:
    import torch

    made, batch = reference(kind, CAUSAL), make_batch("none")
    model, params = made.load(scan_layers=True)

    def loss(params: Any) -> Any:
        return jnp.mean(jnp.square(jaxpeft.apply(model, params, batch.ids)))

    layers = unstack_layers(jax.jit(jax.grad(loss))(params))["model"]["layers"]
    for leaf in made.model.parameters():
        leaf.grad = None
    torch.mean(made.model(torch.tensor(batch.ids, dtype=torch.long)).logits ** 2).backward()
    mixture = model.config.mixture
    for i, layer in enumerate(made.model.model.layers):
        own = {"mlp": layers[str(i)].get("block_sparse_moe"), **layers[str(i)]}
        for name, leaf in layer.named_parameters():
            assert_close(np.asarray(as_in_torch(own, name.split("."), mixture)), leaf.grad.numpy())


def as_in_torch(module: Any, steps: Sequence[str], mixture: Mixture) -> Any:
    """Return a leaf by its name in transformers, which joins gate and up, and in its layout."""
    *steps, last = steps
    for step in steps:
        module = module[step]
    if steps[-1:] != ["experts"]:
        if last == "weight":
            return module["kernel"].T if "kernel" in module else module["scale"]
        return module[last]
    joint = last.startswith("gate_up_proj")
    names = mixture.names[:-1] if joint else mixture.names[-1:]
    leaf = "bias" if last.endswith("_bias") else "kernel"
    whole = np.concatenate([np.asarray(module[name][leaf]) for name in names], axis=-1)
    return whole if leaf == "bias" or mixture.stacked else whole.swapaxes(-1, -2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
@both_stacks
@pytest.mark.representatives("scanned-qwen3_moe")
def test_the_load_balancing_loss_is_that_of_transformers(
    reference: Make, kind: str, scan: bool
) -> None:
    import torch

    made, batch = reference(kind, CAUSAL), make_batch("right")
    model, params = made.load(scan_layers=scan)
    _, sown = jaxpeft.apply(model, params, batch.ids, batch.mask, mutable=[ROUTING])
    with torch.no_grad():
        out = made.model(
            torch.tensor(batch.ids, dtype=torch.long),
            attention_mask=torch.tensor(batch.mask, dtype=torch.long),
            output_router_logits=True,
        )
    assert_close(np.asarray(balance_loss(sown[ROUTING])), np.asarray(out.aux_loss))


@pytest.mark.slow
def test_the_load_balancing_loss_is_added_to_that_of_a_batch(reference: Make) -> None:
    batch = make_batch("right")
    rows = {
        "input_ids": batch.ids,
        "attention_mask": batch.mask,
        "labels": np.where(batch.mask, batch.ids, -100),
        "weights": np.ones(len(batch.ids), np.float32),
    }
    sums = {}
    for coefficient in (0.0, 0.5):
        made = reference(
            "qwen3_moe", CAUSAL, output_router_logits=True, router_aux_loss_coef=coefficient
        )
        model, params = made.load(scan_layers=True)
        sums[coefficient], weight = make_loss_sum(model, loss_for(CAUSAL, None))(
            params, {}, rows, None
        )
    _, sown = jaxpeft.apply(model, params, batch.ids, batch.mask, mutable=[ROUTING])
    added = 0.5 * balance_loss(sown[ROUTING])
    np.testing.assert_allclose((sums[0.5] - sums[0.0]) / weight, added, rtol=1e-4)


@pytest.mark.slow
def test_a_rule_spreads_experts_over_the_expert_axis_of_a_mesh(reference: Make) -> None:
    made = reference("mixtral", CAUSAL)
    alone = made.load(scan_layers=True)
    ids = np.tile(make_batch("none").ids[:2], (2, 1))
    rules = ((r".*/experts/.*/kernel", "expert", "", "fsdp"),)
    config = jaxpeft.MeshConfig(strategy="fsdp", expert=2, fsdp=2, rules=rules)
    mesh = jaxpeft.create_device_mesh(config)
    model, params = made.load(scan_layers=True, mesh=mesh, rules=jaxpeft.sharding_rules(config))
    kernel = params["model"]["layers"]["block_sparse_moe"]["experts"]["w1"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[1] == kernel.shape[1] // 2
    run = jax.jit(jaxpeft.on_mesh(mesh, lambda params, ids: jaxpeft.apply(model, params, ids)))
    assert_close(np.asarray(run(params, ids)), np.asarray(forward(*alone, ids, None)))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp_tensor", "sequence"])
def test_sinks_are_spread_with_their_heads(reference: Make, strategy: str) -> None:
    made = reference("gpt_oss", CAUSAL)
    ids = np.tile(make_batch("none").ids[:2], (2, 1))
    sizes = {"sequence": 4, "data": 2} if strategy == "sequence" else {"tensor": 2, "fsdp": 4}
    config = jaxpeft.MeshConfig(strategy=strategy, **sizes)
    mesh = jaxpeft.create_device_mesh(config)
    where = {"mesh": mesh, "rules": jaxpeft.sharding_rules(config)}
    model, params = made.load(attention="chunked", **where)

    def loss(params: Any, model: Any) -> Any:
        return jnp.mean(jnp.square(jaxpeft.apply(model, params, ids)))

    gradients = jaxpeft.on_mesh(mesh, lambda params: jax.grad(loss)(params, model))
    own = jax.jit(gradients)(params)
    alone, params = made.load()
    wanted = jax.jit(lambda params: jax.grad(loss)(params, alone))(params)
    for one, other in zip(jax.tree.leaves(own), jax.tree.leaves(wanted), strict=True):
        assert_close(np.asarray(one), np.asarray(other))


@pytest.mark.slow
def test_quantized_experts_with_adapters_over_a_mesh(reference: Make) -> None:
    made = reference("qwen3_moe", CAUSAL, moe_intermediate_size=64, hidden_size=64)
    method = jaxpeft.LoRA(rank=4, targets="all-linear")
    ids = np.tile(make_batch("none").ids[:2], (2, 1))
    outputs = []
    for config in (None, jaxpeft.MeshConfig(strategy="fsdp")):
        where = {}
        if config is not None:
            mesh = jaxpeft.create_device_mesh(config)
            where = {"mesh": mesh, "rules": jaxpeft.sharding_rules(config)}
        model, base = made.load(scan_layers=True, quant="nf4", **where)
        params = trained(method, jaxpeft.rewrite(method, base, jax.random.key(0)))
        outputs.append(np.asarray(forward(model, params, ids, None)))
    assert_close(*outputs)


def test_an_adapter_that_cannot_adapt_experts_is_refused(reference: Make) -> None:
    _, base = reference("qwen3_moe", CAUSAL).load(scan_layers=True)
    key = jax.random.key(0)
    with pytest.raises(
        TargetError, match=r"lora\.dropout: is 0\.1, but the inputs of experts have"
    ):
        jaxpeft.rewrite(jaxpeft.LoRA(dropout=0.1, targets=("down_proj",)), base, key)
    with pytest.raises(
        TargetError, match=r"adapter cannot adapt experts, such as model\.layers\.1"
    ):
        jaxpeft.rewrite(jaxpeft.Adapter(targets=("down_proj",)), base, key)
    with pytest.raises(
        TargetError, match=r"sublayers: 'both' adapts feed-forwards, but this model"
    ):
        jaxpeft.rewrite(jaxpeft.Adapter(placement="houlsby"), base, key)
    jaxpeft.rewrite(jaxpeft.Adapter(placement="houlsby", sublayers="attention"), base, key)
    only_attention = jaxpeft.rewrite(jaxpeft.LoRA(dropout=0.1, targets=("q_proj",)), base, key)
    assert "lora_a" in only_attention["model"]["layers"]["4"]["self_attn"]["q_proj"]


@pytest.mark.slow
def test_a_stack_of_adapters_of_experts_is_refused(reference: Make) -> None:
    model, base = reference("qwen3_moe", CAUSAL).load(scan_layers=True)
    method = jaxpeft.LoRA(rank=2, targets=("down_proj",))
    one = jaxpeft.rewrite(method, base, jax.random.key(0))
    stack = jaxpeft.bank([(method, one), (method, one)])
    with pytest.raises(ConfigError, match="an adapter stack cannot adapt experts; exclude them"):
        jaxpeft.apply(model, stack, make_batch("none").ids, adapter=0)


def test_all_linear_leaves_out_the_router(reference: Make) -> None:
    _, base = reference("qwen3_moe", CAUSAL).load(scan_layers=True)
    params = jaxpeft.rewrite(jaxpeft.LoRA(targets="all-linear"), base, jax.random.key(0))
    layer = params["model"]["layers"]["1:4:2"]["mlp"]
    assert "lora_a" not in layer["gate"]
    assert layer["experts"]["up_proj"]["lora_a"].shape == (2, 6, 32, 8)
    params = jaxpeft.rewrite(jaxpeft.LoRA(targets=("gate",)), base, jax.random.key(0))
    assert "lora_a" in params["model"]["layers"]["1:4:2"]["mlp"]["gate"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"method__targets": "all-linear"}, "36 of 36 modules of experts are trained"),
        ({"method__targets": ("q_proj",)}, "0 of 36 modules of experts are trained"),
        ({"method__targets": r".*\.experts\.2\.up_proj"}, "2 of 36 modules of experts"),
    ],
    ids=["all", "none", "one"],
)
def test_a_run_learns_and_says_which_experts_it_trains(
    reference: Make,
    tiny_models: Mapping[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    method: dict[str, Any],
    said: str,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(reference("qwen3_moe", CAUSAL, output_router_logits=True).folder, folder)
    for file in tiny_models["llama"].glob("*token*"):
        shutil.copy(file, folder)
    rows = write_rows(tmp_path / "rows.jsonl", "text")
    options = {"train__steps": 6, "optimizer__learning_rate": 1e-2, "log__plot": False}
    options["model__scan_layers"] = True
    config = write_config(
        tmp_path / "mine.py", folder, rows, model__task=CAUSAL, **options, **method
    )
    with caplog.at_level("INFO", "jaxpeft"):
        assert main(["--config", str(config), "--workdir", str(tmp_path / "run")]) == 0
    assert any(said in message for message in caplog.messages)
    losses = [
        json.loads(line).get("loss")
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert all(loss is None or np.isfinite(loss) for loss in losses)
