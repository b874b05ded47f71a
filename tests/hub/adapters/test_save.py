"""Adapters go both ways between jaxpeft and the real peft on torch, with the same logits."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxpeft
from jaxpeft.errors import AdapterError
from jaxpeft.methods.lora import LoRA
from tests.hub.helpers import peft_load, peft_save, trained
from tests.models.conftest import Reference, forward, make_batch

# peft 0.21 asks transformers 5.23 for an attribute that it calls deprecated.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)

TOLERANCE = 1e-5  # of the largest logit: float32 sums in another order
PEFT_NAMES = {
    "rank": "r",
    "alpha": "lora_alpha",
    "rslora": "use_rslora",
    "targets": "target_modules",
    "exclude": "exclude_modules",
}
QV = ("q_proj", "v_proj")
CAUSAL, SEQUENCE, TOKENS, ENCODER = (
    "causal_lm",
    "sequence_classification",
    "token_classification",
    "encoder",
)


@dataclasses.dataclass(frozen=True)
class Case:
    kind: str
    task: str
    options: dict[str, Any]


CASES = {
    "llama": Case("llama", CAUSAL, {"targets": QV}),
    "all-linear": Case("llama", CAUSAL, {"targets": "all-linear"}),
    "rank_pattern": Case(
        "llama",
        CAUSAL,
        {"targets": QV, "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 7}},
    ),
    "alpha_pattern": Case(
        "llama",
        CAUSAL,
        {"targets": QV, "alpha_pattern": {"0.self_attn.q_proj": 1.0, "v_proj": 20.0}},
    ),
    "rslora": Case("llama", CAUSAL, {"targets": QV, "rslora": True, "rank_pattern": {"v_proj": 3}}),
    "layers": Case(
        "llama", CAUSAL, {"targets": QV, "layers_to_transform": (1,), "layers_pattern": ("layers",)}
    ),
    "exclude": Case(
        "llama",
        CAUSAL,
        {"targets": "all-linear", "exclude": ("down_proj", "layers.0.self_attn.q_proj")},
    ),
    "exclude regex": Case("llama", CAUSAL, {"targets": QV, "exclude": r".*\.0\..*q_proj"}),
    "regex": Case("llama", CAUSAL, {"targets": r"model\.layers\.\d\.(mlp\.up|self_attn\.k)_proj"}),
    "lm_head whole": Case("llama", CAUSAL, {"targets": QV, "modules_to_save": ("lm_head",)}),
    "embedding whole": Case("llama", CAUSAL, {"targets": QV, "modules_to_save": ("embed_tokens",)}),
    "attention whole": Case(
        "llama", CAUSAL, {"targets": "all-linear", "modules_to_save": ("self_attn",)}
    ),
    "norms whole": Case("llama", CAUSAL, {"targets": QV, "modules_to_save": ("norm",)}),
    "llama classes": Case("llama", SEQUENCE, {"targets": "all-linear"}),
    "bert": Case("bert", SEQUENCE, {"targets": ("query", "dense")}),
    "bias lora_only": Case("bert", SEQUENCE, {"targets": ("query", "dense"), "bias": "lora_only"}),
    "bias all": Case("bert", SEQUENCE, {"targets": ("query", "output.dense"), "bias": "all"}),
    "pooler whole": Case(
        "bert", SEQUENCE, {"targets": ("query", "dense"), "modules_to_save": ("pooler",)}
    ),
    "bias of two layers": Case(
        "bert", SEQUENCE, {"targets": ("key",), "bias": "lora_only", "layers_to_transform": (0,)}
    ),
    "bert tokens": Case("bert", TOKENS, {"targets": ("value", "dense"), "bias": "lora_only"}),
    "bert encoder": Case("bert", ENCODER, {"targets": ("query", "value")}),
    "roberta": Case("roberta", SEQUENCE, {"targets": ("query", "dense")}),
    "distilbert": Case("distilbert", SEQUENCE, {"targets": ("q_lin", "lin2")}),
    "distilbert tokens": Case("distilbert", TOKENS, {"targets": ("out_lin", "lin1")}),
}
# Where layers differ, or many leaves are stacked, scanned layers are tried as well.
SCANNED = {
    "llama",
    "all-linear",
    "rank_pattern",
    "alpha_pattern",
    "rslora",
    "layers",
    "exclude",
    "exclude regex",
    "bert",
    "bias lora_only",
    "bias all",
    "roberta",
    "distilbert",
    "bert tokens",
    "llama classes",
}
ROWS = [(name, scan) for name in CASES for scan in ((False, True) if name in SCANNED else (False,))]
every_case = pytest.mark.parametrize(
    ("case", "scan"),
    [
        pytest.param(CASES[name], scan, id=f"{name}-{'scanned' if scan else 'unrolled'}")
        for name, scan in ROWS
    ],
)
one_of_each_kind = pytest.mark.representatives(
    "llama-unrolled",
    "rank_pattern-scanned",
    "alpha_pattern-unrolled",
    "rslora-scanned",
    "layers-scanned",
    "exclude-unrolled",
    "regex-unrolled",
    "lm_head whole-*",
    "attention whole-*",
    "llama classes-scanned",
    "bias all-scanned",
    "bias lora_only-unrolled",
    "bert tokens-unrolled",
    "distilbert-scanned",
    "roberta-unrolled",
)
some_of_each_kind = pytest.mark.representatives(
    "rank_pattern-scanned",
    "layers-scanned",
    "lm_head whole-*",
    "llama classes-scanned",
    "bias all-scanned",
    "bert tokens-unrolled",
    "roberta-unrolled",
)


BATCH = make_batch("right")


def real(task, out):
    """Keep what belongs to tokens."""
    return out[BATCH.mask.astype(bool)] if task != SEQUENCE else out


def ours(model, params):
    return real(model.options.task, np.asarray(forward(model, params, BATCH.ids, BATCH.mask)))


def theirs(task, torch_model):
    return real(task, Reference(None, task, torch_model)(BATCH))


def assert_same(torch_model, adapted, model, params):
    """The logits are the same, and the adapter changes them."""
    wanted = theirs(torch_model.task, adapted)
    assert np.abs(wanted - theirs(torch_model.task, torch_model.model)).max() > 0.05, (
        "the adapter changes too little"
    )
    assert np.abs(ours(model, params) - wanted).max() <= TOLERANCE * max(1, np.abs(wanted).max())


@every_case
@some_of_each_kind
def test_peft_gives_the_logits_of_an_adapter_that_jaxpeft_saved(reference, tmp_path, case, scan):
    torch_model = reference(case.kind, case.task)
    model, params = torch_model.load(scan_layers=scan)
    method = LoRA(**{"rank": 4, "alpha": 6.0} | case.options)
    params = trained(method, jaxpeft.rewrite(method, params, jax.random.key(0)))
    jaxpeft.save_adapter(tmp_path, method, params, model)
    assert_same(torch_model, peft_load(torch_model.folder, case.task, tmp_path), model, params)


@every_case
@one_of_each_kind
def test_jaxpeft_gives_the_logits_of_an_adapter_that_peft_saved(reference, tmp_path, case, scan):
    torch_model = reference(case.kind, case.task)
    options = {PEFT_NAMES.get(key, key): value for key, value in case.options.items()}
    lists = {
        key: list(value) if isinstance(value, tuple) else value for key, value in options.items()
    }
    adapted = peft_save(
        torch_model.folder, case.task, tmp_path, **{"r": 4, "lora_alpha": 6} | lists
    )
    model, params = torch_model.load(scan_layers=scan)
    method, params = jaxpeft.load_adapter(tmp_path, model, params)
    assert (method.rank, method.alpha) == (4, 6.0)
    assert_same(torch_model, adapted, model, params)


@pytest.mark.parametrize(
    "name", ["all-linear", "rank_pattern", "bias lora_only", "embedding whole", "distilbert"]
)
@pytest.mark.representatives("rank_pattern", "bias lora_only")
def test_both_write_the_same_tensors(reference, tmp_path, name):
    """What peft saves again, of an adapter that jaxpeft saved, are the same names, shapes and
    bits.
    """
    case = CASES[name]
    torch_model = reference(case.kind, case.task)
    model, params = torch_model.load(scan_layers=True)
    method = LoRA(rank=4, **case.options)
    params = trained(method, jaxpeft.rewrite(method, params, jax.random.key(0)))
    jaxpeft.save_adapter(tmp_path / "ours", method, params, model)
    peft_load(torch_model.folder, case.task, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    one, other = (
        load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")
    )
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        np.testing.assert_array_equal(tensor, other[key], err_msg=key)
        assert tensor.dtype == other[key].dtype


@pytest.mark.parametrize(
    "options", [{}, {"layers_to_transform": (0,)}], ids=["all layers", "one layer"]
)
def test_all_linear_is_saved_as_the_names_it_stands_for(reference, tmp_path, options):
    torch_model = reference("llama", CAUSAL)
    model, params = torch_model.load()
    method = LoRA(targets="all-linear", **options)
    params = trained(method, jaxpeft.rewrite(method, params, jax.random.key(0)))
    jaxpeft.save_adapter(tmp_path, method, params, model)
    names = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    linear = {n for n, m in torch_model.model.named_modules() if type(m).__name__ == "Linear"} - {
        "lm_head"
    }
    assert set(names) == {name for name in linear if not options or ".0." in name}
    assert_same(torch_model, peft_load(torch_model.folder, CAUSAL, tmp_path), model, params)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
def test_all_linear_leaves_the_head_out_for_peft_too(reference, tmp_path, kind):
    """peft's own all-linear cannot be used with these heads, the names that jaxpeft saves can."""
    torch_model = reference(kind, SEQUENCE)
    model, params = torch_model.load(scan_layers=True)
    method = LoRA(targets="all-linear")
    params = trained(method, jaxpeft.rewrite(method, params, jax.random.key(0)))
    jaxpeft.save_adapter(tmp_path, method, params, model)
    assert_same(torch_model, peft_load(torch_model.folder, SEQUENCE, tmp_path), model, params)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_the_first_of_two_patterns_that_match_still_wins_after_saving(reference, tmp_path, field):
    model, params = reference("llama", CAUSAL).load()
    method = LoRA(rank=4, targets=QV, **{field: {"q_proj": 2, "layers.0.self_attn.q_proj": 6}})
    adapted = trained(method, jaxpeft.rewrite(method, params, jax.random.key(0)))
    jaxpeft.save_adapter(tmp_path, method, adapted, model)
    np.testing.assert_array_equal(
        ours(model, jaxpeft.load_adapter(tmp_path, model, params)[1]), ours(model, adapted)
    )


TIED = {"targets": QV, "modules_to_save": ("embed_tokens",)}
UNTIES = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")


@UNTIES
def test_a_tied_embedding_that_is_saved_whole_stays_tied_in_peft(reference, tmp_path):
    torch_model = reference("llama", CAUSAL, tie_word_embeddings=True)
    model, params = torch_model.load()
    params = trained(LoRA(**TIED), jaxpeft.rewrite(LoRA(**TIED), params, jax.random.key(0)))
    jaxpeft.save_adapter(tmp_path, LoRA(**TIED), params, model)
    assert_same(torch_model, peft_load(torch_model.folder, CAUSAL, tmp_path), model, params)


def test_a_model_with_a_tied_head_that_was_trained_in_full_loads_again(reference, tmp_path):
    model, base = reference("llama", CAUSAL, tie_word_embeddings=True).load()
    assert "lm_head" not in base
    method = jaxpeft.Full()
    params = trained(method, jaxpeft.rewrite(method, base, jax.random.key(0)))
    jaxpeft.save_adapter(tmp_path / "a", method, params, model)
    _, again = jaxpeft.load_adapter(tmp_path / "a", model, base)
    assert ours(model, again) == pytest.approx(ours(model, params), abs=1e-6)
    assert np.abs(ours(model, again) - ours(model, base)).max() > 1e-3


def tied_in_peft(torch_model, folder, **options):
    return peft_save(
        torch_model.folder,
        CAUSAL,
        folder,
        target_modules=list(QV),
        modules_to_save=["embed_tokens"],
        **options,
    )


def test_a_tied_embedding_that_peft_saved_stays_tied(reference, tmp_path):
    torch_model = reference("llama", CAUSAL, tie_word_embeddings=True)
    adapted = tied_in_peft(torch_model, tmp_path, ensure_weight_tying=True)
    model, params = torch_model.load()
    assert_same(torch_model, adapted, model, jaxpeft.load_adapter(tmp_path, model, params)[1])


@UNTIES
def test_an_embedding_that_peft_untied_is_refused(reference, tmp_path):
    torch_model = reference("llama", CAUSAL, tie_word_embeddings=True)
    tied_in_peft(torch_model, tmp_path)
    with pytest.raises(AdapterError, match=r"tie|tying"):
        jaxpeft.load_adapter(tmp_path, *torch_model.load())


FROM_PEFT = {
    "pooler of an encoder": (
        "bert",
        ENCODER,
        {"target_modules": "all-linear"},
    ),  # hidden states do not depend on it
    "biases of an encoder": ("bert", ENCODER, {"target_modules": ["query"], "bias": "all"}),
    # modules_to_save matches any end of a name: every norm
    "modules_to_save by ending": (
        "llama",
        CAUSAL,
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    ),
    "biases of two layers of a head": (
        "roberta",
        SEQUENCE,
        {"target_modules": ["query"], "bias": "all"},
    ),
    # peft also writes lm_head.base_layer.weight, as it is in the base
    "language-model head": ("llama", CAUSAL, {"target_modules": ["q_proj", "lm_head"]}),
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize(
    ("kind", "task", "options"),
    [pytest.param(*case, id=name) for name, case in FROM_PEFT.items()],
)
def test_what_peft_saves_is_loaded(reference, tmp_path, kind, task, options):
    torch_model = reference(kind, task)
    adapted = peft_save(torch_model.folder, task, tmp_path, **options)
    model, params = torch_model.load()
    assert_same(torch_model, adapted, model, jaxpeft.load_adapter(tmp_path, model, params)[1])


@pytest.mark.parametrize(
    ("saved_as", "text"),
    [
        (
            {"rank": 2},
            "layers.0.self_attn.q_proj: lora_a is [32, 4] in the tree, the method makes [32, 2]",
        ),
        ({"alpha": 99.0}, "lora_scale is 1.5 in the tree, the method makes 24.75"),
        ({"rank": 8, "alpha": 12.0}, "lora_a is [32, 4] in the tree, the method makes [32, 8]"),
        (
            {"targets": ("q_proj", "k_proj")},
            "layers.0.self_attn.k_proj: is not adapted in the tree",
        ),
        (
            {"targets": ("q_proj",)},
            "v_proj: has lora_a in the tree, but the method does not adapt it",
        ),
    ],
)
@pytest.mark.parametrize("scan", [False, True])
def test_a_method_that_did_not_make_the_tree_is_refused_before_a_byte_is_written(
    reference, tmp_path, saved_as, text, scan
):
    model, params = reference("llama", CAUSAL).load(scan_layers=scan)
    options = {"rank": 4, "alpha": 6.0, "targets": QV}
    params = trained(LoRA(**options), jaxpeft.rewrite(LoRA(**options), params, jax.random.key(0)))
    with pytest.raises(AdapterError) as caught:
        jaxpeft.save_adapter(tmp_path / "adapter", LoRA(**options | saved_as), params, model)
    assert text in str(caught.value)
    assert "save with the method that rewrote them" in str(caught.value)
    assert not (tmp_path / "adapter").exists()


def test_the_trained_part_alone_is_refused(reference, tmp_path):
    model, params = reference("llama", CAUSAL).load()
    method = LoRA(targets=QV)
    params = jaxpeft.rewrite(method, params, jax.random.key(0))
    part, _ = jaxpeft.partition(params, jaxpeft.trainable_mask(method, params))
    with pytest.raises(
        AdapterError, match=r"leaves of the model are missing, such as .*; pass the complete tree"
    ):
        jaxpeft.save_adapter(tmp_path, method, part, model)


def test_an_adapter_loads_onto_a_sharded_base(reference, tmp_path):
    torch_model = reference("llama", CAUSAL)
    model, params = torch_model.load()
    method = LoRA(targets=QV)
    adapted = trained(method, jaxpeft.rewrite(method, params, jax.random.key(0)))
    jaxpeft.save_adapter(tmp_path, method, adapted, model)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    loaded = jaxpeft.load_adapter(tmp_path, model, jax.device_put(params, spread))[1]
    np.testing.assert_allclose(ours(model, loaded), ours(model, adapted), atol=1e-6)
    jaxpeft.merge(method, loaded)


@pytest.mark.parametrize(
    ("kind", "pooling"), [("bert", "mean"), ("llama", "mean"), ("distilbert", "mean")]
)
def test_a_pooling_that_peft_does_not_know_is_said(reference, tmp_path, caplog, kind, pooling):
    model, params = reference(kind, SEQUENCE).load(pooling=pooling)
    method = LoRA()
    params = jaxpeft.rewrite(method, params, jax.random.key(0))
    jaxpeft.save_adapter(tmp_path, method, params, model)
    assert "so its logits in peft differ" in caplog.text
    assert "pooling='mean'" in (tmp_path / "README.md").read_text()


def test_layers_of_a_backbone_alone_are_saved_by_name(reference, tmp_path):
    """peft cannot count them: no dot stands before `layers`."""
    torch_model = reference("llama", ENCODER)
    model, params = torch_model.load()
    method = LoRA(targets=QV, layers_to_transform=(1,))
    params = trained(method, jaxpeft.rewrite(method, params, jax.random.key(0)))
    jaxpeft.save_adapter(tmp_path, method, params, model)
    assert_same(torch_model, peft_load(torch_model.folder, ENCODER, tmp_path), model, params)
