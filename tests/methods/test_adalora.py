"""AdaLoRA's own: ranks step by step as PEFT allocates them, the penalty, padding, resuming, and
files that were cut.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft
from jaxpeft.checkpoint.manager import Checkpoints
from jaxpeft.core import paths
from jaxpeft.errors import ConfigError, TargetError
from jaxpeft.train.losses import loss_for
from jaxpeft.train.step import init_state, make_train_step
from tests.conformance.test_peft import ours, theirs
from tests.core.helpers import BATCH, QUICK, leaves, load
from tests.hub.helpers import peft_load, torch_base
from tests.methods.interop import case_of, exported, gap, imported, loaded_gap, quiet
from tests.models.conftest import reference  # noqa: F401 - a fixture

RATE = 0.1
NAMES = {"adalora_a": "lora_A", "adalora_e": "lora_E", "adalora_b": "lora_B"}
SHAPES = {"one": (8, 6), "two": (6, 5), "three": (5, 7)}


def torch_model(method: Any, steps: int) -> Any:
    """Make three linear modules with peft's AdaLoRA; `forward` gives a loss of zero and what peft
    adds to it.
    """
    import torch
    from peft import AdaLoraConfig, get_peft_model

    class Three(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, (n_in, n_out) in SHAPES.items():
                self.add_module(name, torch.nn.Linear(n_in, n_out))

        def forward(self) -> Any:
            return SimpleNamespace(loss=torch.zeros(()))

    config = AdaLoraConfig(
        init_r=method.rank,
        target_r=method.target_rank,
        tinit=method.initial_steps,
        tfinal=method.final_steps,
        deltaT=method.interval,
        beta1=method.beta1,
        beta2=method.beta2,
        orth_reg_weight=method.orthogonality,
        total_step=steps,
        target_modules=list(SHAPES),
    )
    return get_peft_model(Three(), config)


def tensors(model: Any) -> dict[tuple[str, str], Any]:
    """Return peft's parameters by our paths."""
    layers = {name: getattr(model.base_model.model, name) for name in SHAPES}
    return {
        (name, key): getattr(layer, theirs)["default"]
        for name, layer in layers.items()
        for key, theirs in NAMES.items()
    }


def as_leaf(key: str, array: Any) -> jax.Array:
    """Copy: JAX would share the memory that torch changes in place."""
    return jnp.asarray(np.array(array.reshape(-1) if key == "adalora_e" else array.T, np.float32))


SCHEDULES = {
    "plain": ({"rank": 4, "target_rank": 2}, 11),
    "with rests": (
        {
            "rank": 4,
            "target_rank": 1,
            "initial_steps": 3,
            "final_steps": 4,
            "interval": 2,
            "beta1": 0.7,
            "beta2": 0.9,
        },
        17,
    ),
    "never due before the end": (
        {"rank": 3, "target_rank": 2, "initial_steps": 1, "final_steps": 2, "interval": 50},
        8,
    ),
    "nothing to cut": ({"rank": 2, "target_rank": 1, "interval": 3}, 10),
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.representatives("with rests")
def test_ranks_are_those_of_pefts_allocator_step_by_step(name: str) -> None:
    import torch

    options, steps = SCHEDULES[name]
    method, rng = jaxpeft.AdaLoRA(**options), np.random.default_rng(1)
    model = torch_model(method, steps)
    given = tensors(model)
    with torch.no_grad():
        for tensor in given.values():
            tensor.copy_(torch.tensor(rng.normal(size=tensor.shape)))
    params = paths.build(
        [(path, as_leaf(path[1], tensor.detach().numpy())) for path, tensor in given.items()]
    )
    penalty = float(model.base_model().loss)
    np.testing.assert_allclose(method.penalty(params), penalty, rtol=1e-5)

    optimizer = method.optimizer(optax.sgd(RATE), steps)
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    left: list[int] = []
    for k in range(1, steps + 1):
        for tensor in given.values():
            tensor.grad = torch.tensor(rng.normal(size=tensor.shape), dtype=torch.float32)
        grads = paths.build(
            [(path, as_leaf(path[1], tensor.grad.numpy())) for path, tensor in given.items()]
        )
        with torch.no_grad():
            for tensor in given.values():
                tensor -= RATE * tensor.grad
        model.base_model.update_and_allocate(k)
        params, state = step(params, state, grads)
        for path, tensor in given.items():
            wanted = as_leaf(path[1], tensor.detach().numpy())
            np.testing.assert_allclose(
                paths.get(params, path), wanted, rtol=1e-5, atol=1e-6, err_msg=f"step {k}: {path}"
            )
        left.append(sum(int(jnp.sum(params[site]["adalora_e"] != 0)) for site in SHAPES))
    assert left[-1] == 3 * method.target_rank
    assert left[0] == 3 * method.rank or method.initial_steps == 0
    assert step._cache_size() == 1


class Training:
    """A tiny decoder, trained for a few steps on one batch."""

    def __init__(self, method: Any, steps: int, *, scan: bool) -> None:
        self.method = method
        model, base = load("llama", scan_layers=scan)
        params = jaxpeft.rewrite(method, base, jax.random.key(0))
        trainable, self.frozen = jaxpeft.partition(params, jaxpeft.trainable_mask(method, params))
        optimizer = method.optimizer(optax.adamw(0.02), steps)
        step = make_train_step(model, loss_for("causal_lm", None), optimizer, 1, method.penalty)
        self.step = jax.jit(step, compiler_options=QUICK)
        self.state = init_state(trainable, optimizer, 0)
        labels = np.where(BATCH.mask, BATCH.ids, -100).astype(np.int32)
        self.batch = {
            "input_ids": BATCH.ids,
            "attention_mask": BATCH.mask,
            "labels": labels,
            "weights": np.ones(3, np.float32),
        }

    def run(self, steps: int) -> Any:
        """Goes on for some steps, and gives the trained leaves by name."""
        for _ in range(steps):
            self.state, _ = self.step(self.state, self.frozen, self.batch)
        return leaves(self.state.trainable)


@pytest.mark.slow
def test_layers_that_are_not_adapted_count_for_nothing() -> None:
    method = jaxpeft.AdaLoRA(
        rank=4,
        target_rank=2,
        targets=("q_proj", "down_proj"),
        layers_to_transform=(1,),
        final_steps=1,
    )
    stacked, plain = (Training(method, 5, scan=scan) for scan in (True, False))
    fresh = [method.penalty(training.state.trainable) for training in (stacked, plain)]
    np.testing.assert_allclose(*fresh, rtol=1e-6)
    found = dict(stacked.run(5).items())
    zero = 0
    for name, leaf in plain.run(5).items():
        both = found[name.replace("layers/1/", "layers/")]
        assert not both[0].any(), name
        np.testing.assert_allclose(both[1], leaf, rtol=1e-3, atol=1e-4, err_msg=name)
        zero += int(np.sum(np.asarray(leaf) == 0)) if name.endswith("adalora_e") else 0
    assert zero == 4
    assert all(np.isfinite(leaf).all() for leaf in found.values())


@pytest.mark.slow
def test_it_goes_on_from_a_checkpoint_bit_by_bit(tmp_path: Path) -> None:
    method = jaxpeft.AdaLoRA(
        rank=4, target_rank=1, targets=("q_proj", "down_proj"), interval=2, final_steps=2
    )
    whole = Training(method, 7, scan=True)
    whole.run(7)
    for at in (3, 5, 6):
        first, second = (Training(method, 7, scan=True) for _ in range(2))
        first.step = second.step = whole.step  # one program
        first.run(at)
        checkpoints = Checkpoints(tmp_path / str(at), 1)
        checkpoints.save(at, first.state, None, {})
        second.state = checkpoints.restore(at, second.state, None)[0]
        checkpoints.close()
        second.run(7 - at)
        for one, other in zip(
            jax.tree.leaves(second.state), jax.tree.leaves(whole.state), strict=True
        ):
            np.testing.assert_array_equal(one, other)


def test_the_schedule_must_fit_the_run() -> None:
    method = jaxpeft.AdaLoRA(initial_steps=6, final_steps=4)
    message = (
        r"method.initial_steps: 6 steps at the start and 4 at the end \(final_steps\) leave none of"
        r" the run's 10 steps"
    )
    with pytest.raises(ConfigError, match=message):
        method.optimizer(optax.sgd(1.0), 10)
    method.optimizer(optax.sgd(1.0), 11)
    with pytest.raises(
        ConfigError, match=r"adalora\.target_rank: is 9, but must not be above rank 4"
    ):
        jaxpeft.AdaLoRA(rank=4, target_rank=9)
    with pytest.raises(
        ConfigError, match=r"adalora\.rank_pattern: 'q_proj' is 5, but must not be above rank 4"
    ):
        jaxpeft.AdaLoRA(rank=4, target_rank=4, rank_pattern={"q_proj": 5})
    with pytest.raises(TargetError, match="rank_pattern: 'q_proj' is not an adapted site"):
        jaxpeft.rewrite(
            jaxpeft.AdaLoRA(rank_pattern={"q_proj": 5}), load("llama")[1], jax.random.key(0)
        )
    assert jaxpeft.AdaLoRA(orthogonality=0.0).penalty({}) is None


# -------------------------------------------------------------------------------------------- files

TARGETS = r".*\.(q_proj|down_proj)"


@pytest.mark.slow
@quiet
@pytest.mark.filterwarnings(
    "ignore:The following rank_pattern keys did not match any targeted module:RuntimeWarning"
)
@pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor.s. have invalid shape")
def test_a_file_that_was_cut_is_read_and_written(reference: Any, tmp_path: Path) -> None:
    import peft
    import torch

    method = jaxpeft.AdaLoRA(rank=4, target_rank=2, alpha=6.0, targets=TARGETS)
    case = case_of(method, "llama", "AdaLoraConfig")
    torch_model, rng = reference("llama", "causal_lm"), torch.Generator().manual_seed(0)
    config = peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        lora_alpha=6,
        total_step=3,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(torch_base(torch_model.folder, case.task), config).eval()
    parameters = {name: leaf for name, leaf in model.named_parameters() if leaf.requires_grad}
    for leaf in parameters.values():
        leaf.data.add_(0.5 * torch.randn(leaf.shape, generator=rng))
    for step in range(1, 4):
        for leaf in parameters.values():
            leaf.grad = torch.randn(leaf.shape, generator=rng)
        model.base_model.update_and_allocate(step)
    nothing = "model.layers.1.self_attn.q_proj"
    pattern = model.peft_config["default"].rank_pattern
    pattern[f"{nothing}.lora_E.default"] = [False] * 4  # as it may come about
    model.base_model.model.get_submodule(nothing).lora_E["default"].data.zero_()
    kept = {name.removesuffix(".lora_E.default"): sum(flags) for name, flags in pattern.items()}
    model.save_pretrained(tmp_path / "theirs")
    wanted = theirs(case, model)
    far, found = loaded_gap(torch_model, tmp_path / "theirs", case, wanted)
    assert far < 1e-5
    assert found.rank_pattern == kept
    assert found.leaves.names[0] == "adalora_a"
    assert sorted(set(kept.values()))[0] == 0

    our_model, base = torch_model.load(scan_layers=True)
    loaded, params = jaxpeft.load_adapter(tmp_path / "theirs", our_model, base)
    jaxpeft.save_adapter(tmp_path / "ours", loaded, params, our_model)
    again = peft_load(torch_model.folder, case.task, tmp_path / "ours")
    assert gap(theirs(case, again), ours(case, our_model, params), torch_model, case) < 1e-5
    loaded.optimizer(optax.adamw(0.1), 5).init(params)


VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "biases": (
        "bert",
        {"targets": ("query",), "bias": "lora_only"},
        {"target_modules": ["query"], "bias": "lora_only"},
    ),
    "schedule": (
        "llama",
        {
            "targets": TARGETS,
            "dropout": 0.1,
            "initial_steps": 2,
            "final_steps": 3,
            "interval": 4,
            "beta1": 0.7,
            "beta2": 0.6,
            "orthogonality": 0.25,
        },
        {
            "target_modules": TARGETS,
            "lora_dropout": 0.1,
            "tinit": 2,
            "tfinal": 3,
            "deltaT": 4,
            "beta1": 0.7,
            "beta2": 0.6,
            "orth_reg_weight": 0.25,
        },
    ),
}


@pytest.mark.slow
@quiet
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.representatives("schedule")
def test_variants_go_both_ways(reference: Any, tmp_path: Path, name: str) -> None:
    kind, options, peft = VARIANTS[name]
    method = jaxpeft.AdaLoRA(rank=4, target_rank=2, alpha=6.0, **options)
    case = case_of(
        method,
        kind,
        "AdaLoraConfig",
        size=0.5,
        init_r=4,
        target_r=2,
        lora_alpha=6,
        total_step=20,
        **peft,
    )
    assert exported(reference, tmp_path / "ours", case) < 1e-5
    far, found = imported(reference, tmp_path / "theirs", case)
    assert far < 1e-5
    assert found == method


def test_what_is_refused_in_a_file() -> None:
    config = {
        "init_r": 4,
        "target_r": 8,
        "lora_alpha": 8,
        "target_modules": ["q"],
        "r": 8,
        "total_step": 10,
    }
    values, problems = jaxpeft.AdaLoRA.peft.read_options(jaxpeft.AdaLoRA, config)
    assert not problems
    assert values["target_rank"] == 4  # peft cuts nothing then
    for pattern in ({"q.lora_E": 3}, [1]):
        _, problems = jaxpeft.AdaLoRA.peft.read_options(
            jaxpeft.AdaLoRA, config | {"rank_pattern": pattern}
        )
        assert problems == ["rank_pattern: must be a list of booleans for each site"]
    _, problems = jaxpeft.AdaLoRA.peft.read_options(
        jaxpeft.AdaLoRA, {"target_modules": ["q"], "use_dora": True, "alpha_pattern": {"q": 1}}
    )
    assert problems == [
        "use_dora: True is not supported by the adalora method; nothing was loaded",
        "alpha_pattern: {'q': 1} is not supported by the adalora method; nothing was loaded",
        "init_r: is not set; use the value of the adapter's training",
        "lora_alpha: is not set; use the value of the adapter's training",
    ]
