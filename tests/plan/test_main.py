"""The command: what it refuses before anything is compiled, its table, its JSON, its picture, and
that it needs no accelerator.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxpeft.plan import __main__ as plan
from jaxpeft.sharding.sizes import STRATEGIES
from tests.conftest import ROOT
from tests.plan.tiny import NARROW, write

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install 'jaxpeft[plan]'",
)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "2 problems:\n--config: is not given"),
        (
            ["--config", "FILE"],
            (
                "--topology: is not given; try v5e:4x4, v5p:4x4x4, v6e:16x16, h100:8, h200:1 or cpu:8"
            ),
        ),
        (["--config", "FILE", "--topology", "v5:2"], "--topology: 'v5' is not a known chip"),
        (
            ["--config", "FILE", "--topology", "cpu:8", "--strategies", "fsdq"],
            "--strategies: unknown strategy 'fsdq'; did you mean 'fsdp'",
        ),
        (
            ["--config", "FILE", "--topology", "cpu:8", "--strategies", ""],
            "--strategies: is empty; omit it, or give some of all, rep",
        ),
        (
            ["--config", "FILE", "--topology", "cpu:8", "--config.train.steps=0"],
            "config.train.steps: must be at least 1, is 0",
        ),
        (
            ["--config", "FILE", "--topology", "cpu:8", "--json", "no/such/x.json"],
            "--json no/such/x.json: ",
        ),
        (
            ["--config", "FILE", "--topology", "cpu:8", "--json", "tests"],
            "--json tests: is a folder; give the name of a file",
        ),
        (
            ["--config", "FILE", "--topology", "cpu:8", "--json", "/proc/x-model-config.json"],
            "/proc/x-model-config.json: cannot be written",
        ),
        (
            ["--config", "FILE", "--topology", "cpu:8", "--plot", "x.foo"],
            "--plot: x.foo: must end in .png",
        ),
        (
            ["--config", "FILE", "--topology", "cpu:8", "--hbm", "nan"],
            "--hbm: must be a number or None, is 'nan'",
        ),
        (["--config", "FILE", "--topology", "cpu:8", "more"], "'more': not an option; see --help"),
        (
            ["--config", "FILE", "--topology", "cpu:8", "--hbm", "0"],
            "--hbm: must be at least 0.01, is 0",
        ),
        (
            ["--config", "FILE", "--topology", "cpu:8", "--model-config", "llama3_80b"],
            (
                "--model-config: 'llama3_80b' is neither a file nor a known shape; did you mean"
                " 'llama3_8b'"
            ),
        ),
        (
            ["--config", "FILE", "--topology", "cpu:8"],
            "config.model.path: 'no/such-model': its config.json is not available",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(words, message, tmp_path, capsys):
    file, _ = write(tmp_path)
    assert plan.main([str(file) if word == "FILE" else word for word in words]) == 2
    assert message in capsys.readouterr().err


def test_help(capsys):
    assert plan.main(["--help"]) == 0
    assert (
        "--model-config: str | None = None\n      config.json to plan for"
        in capsys.readouterr().out
    )


def planned(
    tmp_path: Path, *words: str, code: int = 0, **changed: Any
) -> tuple[dict[str, Any], str]:
    """Run the command, for the small model with so much of its config.json changed:
    `(JSON, what it printed)`.
    """
    file, described = write(tmp_path, **changed)
    asked = [
        "--config",
        str(file),
        "--model-config",
        str(described),
        "--json",
        str(tmp_path / "plan.json"),
        *words,
    ]
    command = [sys.executable, "-m", "jaxpeft.plan", *asked]
    # as a user's would be, the devices are the command's own affair; programs for a CPU compile
    # fast, as everywhere in the tests
    tpu = words[words.index("--topology") + 1].startswith("v")
    own = ("JAX_PLATFORMS", "XLA_FLAGS") if tpu else ("JAX_PLATFORMS",)
    environ = {key: value for key, value in os.environ.items() if key not in own}
    environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    )
    done = subprocess.run(
        command, capture_output=True, text=True, env=environ, check=False, timeout=600
    )
    assert done.returncode == code, done.stderr
    return json.loads((tmp_path / "plan.json").read_text()), done.stdout


MEMORY = {"base", "adapters", "optimizer", "activations", "temporaries", "total", "limit"}
ROW = {
    "strategy",
    "change",
    "mesh",
    "batch_size",
    "accumulation",
    "remat",
    "quant",
    "attention",
    "fits",
    "verdict",
    "memory",
    "collectives",
    "flops",
    "model_flops",
    "traffic",
    "roofline",
    "seconds",
    "notes",
    "nearest",
    "tried",
}
PLAN = {
    "version",
    "config",
    "model",
    "method",
    "parameters",
    "trained",
    "topology",
    "devices",
    "chip",
    "length",
    "layers",
    "programs",
    "seconds",
    "cpu_seconds",
    "versions",
    "rows",
    "best",
}


@pytest.mark.slow
def test_every_strategy_on_a_cpu(tmp_path):
    found, printed = planned(
        tmp_path,
        "--topology",
        "cpu:8",
        "--hbm",
        "1",
        "--strategies",
        "all",
        "--plot",
        str(tmp_path / "plan.png"),
    )
    assert found.keys() == PLAN
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"
    assert [row["strategy"] for row in found["rows"]] == list(STRATEGIES)
    for row in found["rows"]:
        assert row.keys() == ROW
        assert row["memory"].keys() == MEMORY
        assert row["fits"] is True, row["verdict"]
        parts = MEMORY - {"total", "limit"}
        assert sum(row["memory"][part] for part in parts) == row["memory"]["total"]
        assert row["roofline"] is None
        assert row["flops"] > 0
    rows = {row["strategy"]: row for row in found["rows"]}
    base = rows["replicated"]["memory"]["base"]
    # the norms are whole on each device
    assert base / 8 <= rows["fsdp"]["memory"]["base"] < base / 7.5
    assert rows["fsdp"]["memory"]["adapters"] == rows["replicated"]["memory"]["adapters"]
    assert rows["tensor"]["memory"]["adapters"] < rows["replicated"]["memory"]["adapters"]
    assert {one["axes"] for one in rows["fsdp"]["collectives"]} == {"fsdp"}
    assert {one["axes"] for one in rows["tensor"]["collectives"]} == {"tensor"}
    assert any(one["kind"] == "all-gather" for one in rows["fsdp"]["collectives"])
    # of replicated, the gradients of the adapters and little else
    talk = [one for one in rows["replicated"]["collectives"] if one["kind"] == "all-reduce"]
    assert sum(one["nbytes"] for one in talk) == pytest.approx(4 * found["trained"], rel=0.1)
    assert "best: " in printed
    assert "memory in GiB per device" in printed


@pytest.mark.slow
def test_a_gpu_that_is_not_there_is_planned_by_arithmetic(tmp_path):
    found, printed = planned(tmp_path, "--topology", "h100:8", "--strategies", "fsdp", **NARROW)
    (row,) = found["rows"]
    assert "no GPU is used: memory is estimated" in printed
    assert (row["attention"], row["traffic"], row["roofline"]["memory"]) == ("cudnn", None, None)
    assert row["memory"]["limit"] == 60_000_000_000
    assert row["fits"] is True


@pytest.mark.slow
def test_attention_that_a_run_would_refuse_is_refused(tmp_path):
    words = "--topology", "h100:8", "--strategies", "fsdp,sequence", "--tries", "0"
    found, _ = planned(tmp_path, *words, "--config.model.attention=cudnn")
    fsdp, sequence = found["rows"]
    assert (fsdp["attention"], fsdp["fits"]) == ("cudnn", True)
    said = (
        "refused: model.attention: cudnn needs unsharded rows, but mesh.sequence shards them over 8"
        " devices; set it to auto"
    )
    assert sequence["verdict"].startswith(said) and sequence["fits"] is False
    found, _ = planned(tmp_path, *words, "--config.model.attention=chunked")
    assert [(row["attention"], row["fits"]) for row in found["rows"]] == [("chunked", True)] * 2


def test_where_every_strategy_is_refused_the_reasons_are_the_answer(tmp_path, capsys):
    file, described = write(tmp_path)
    asked = [
        "--config",
        str(file),
        "--model-config",
        str(described),
        "--topology",
        "cpu:8",
        "--tries",
        "1",
    ]
    assert (
        plan.main([*asked, "--strategies", "fsdp,sequence", "--config.model.attention=splash"]) == 2
    )
    said = "jaxpeft: model.attention: splash runs on tpu, but the devices are cpu; set it to auto\n"
    assert capsys.readouterr().err.endswith(said)


@pytest.mark.slow
def test_nothing_fits(tmp_path, capsys):
    file, described = write(tmp_path, **NARROW)
    files = ["--config", str(file), "--model-config", str(described)]
    words = ["--topology", "cpu:8", "--hbm", "0.01", "--strategies", "fsdp", "--tries", "0"]
    out = tmp_path / "plan.json"
    assert plan.main([*files, *words, "--json", str(out)]) == plan.NONE_FITS
    found, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert found["best"] is None
    assert found["rows"][0]["verdict"].startswith("does not fit, by 0.")
    assert "best: none (no strategy fits)" in printed


@needs_libtpu
@pytest.mark.slow
@pytest.mark.alternatives("v5e:2x4", "v5p:2x2x2", "v6e:2x4")
@pytest.mark.parametrize("where", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4"])
# as even parts for two processes
@pytest.mark.parametrize("strategies", [tuple(STRATEGIES)[:3], tuple(STRATEGIES)[3:]])
def test_the_grid_compiles_for_tpus(where, strategies, tmp_path):
    words = (
        "--topology",
        where,
        "--strategies",
        ",".join(strategies),
        "--config.data.max_length=128",
    )
    found, _ = planned(tmp_path, *words, **NARROW)
    assert (found["devices"], len(found["rows"])) == (8, 3)
    for row in found["rows"]:
        assert row["fits"] is True, row["verdict"]
        assert row["roofline"]["seconds"] > 0
        assert row["traffic"] > 0
        assert row["attention"] == ("chunked" if row["strategy"] == "sequence" else "splash")
        # every product once forward and once backward at least, on each device its share
        assert row["flops"] * 8 > 0.9 * row["model_flops"]


EXPERTS = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "decoder_sparse_step": 2,  # which are scanned in pairs
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "quantization_config": {"quant_method": "mxfp4"},
}
LATENT = {
    "model_type": "deepseek_v3",
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
}


GEMMA4 = {
    "model_type": "gemma4_text",
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "num_kv_shared_layers": 1,
    "global_head_dim": 128,
    "vocab_size_per_layer_input": 512,
    "hidden_size_per_layer_input": 32,
}


DELTA_NETS = {
    "model_type": "qwen3_5_text",
    "full_attention_interval": 2,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}


@pytest.mark.slow
def test_delta_nets_compile_on_a_cpu(tmp_path):
    words = "--topology", "cpu:8", "--hbm", "1", "--strategies", "fsdp_tensor,sequence"
    found, _ = planned(tmp_path, *words, "--tries", "0", **NARROW, **DELTA_NETS)
    for row in found["rows"]:
        assert row["fits"] is True, row["verdict"]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "strategies"),
    [
        (EXPERTS, "fsdp_tensor,sequence"),
        (GPT_OSS, "fsdp_tensor,sequence"),
        (GEMMA4, "fsdp_tensor"),  # unrolled layers are slower
        (LATENT, "fsdp_tensor"),
    ],
    ids=["experts", "mxfp4", "unequal-layers", "latent"],
)
def test_other_families_compile_for_tpus(tmp_path, family, strategies):
    words = "--topology", "v5e:2x4", "--strategies", strategies, "--tries", "0"
    found, _ = planned(tmp_path, *words, "--config.data.max_length=128", **{**NARROW, **family})
    for row in found["rows"]:
        assert row["fits"] is True, row["verdict"]
        assert row["model_flops"] > 0
        assert row["attention"] == ("chunked" if row["strategy"] == "sequence" else "splash")


@needs_libtpu
@pytest.mark.slow
def test_two_slices_are_joined_by_their_network(tmp_path):
    found, _ = planned(
        tmp_path,
        "--topology",
        "v5e:2x2",
        "--slices",
        "2",
        "--strategies",
        "hybrid_fsdp",
        "--tries",
        "0",
        **NARROW,
    )
    (row,) = found["rows"]
    assert (row["mesh"]["data"], row["mesh"]["fsdp"]) == (2, 4)
    assert {one["axes"] for one in row["collectives"]} >= {"data", "fsdp"}


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_a_tpu_is_said_with_what_does(tmp_path):
    found, printed = planned(
        tmp_path,
        "--topology",
        "v5e:2x2",
        "--hbm",
        "0.1",
        "--strategies",
        "fsdp",
        "--config.train.batch_size=256",
        "--config.model.remat=products",
        code=plan.NONE_FITS,
        **NARROW,
    )
    (row,) = found["rows"]
    assert row["fits"] is False
    assert row["nearest"]["fits"] is True
    assert row["nearest"]["memory"]["total"] <= 0.1 * 2**30
    assert row["collectives"]  # of a program that does not fit, too
    assert row["nearest"]["change"] in printed
