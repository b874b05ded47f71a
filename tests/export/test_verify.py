"""What a server serves: the adapter, the base, or something else, computed by torch and peft."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import jaxpeft
from jaxpeft.errors import ConfigError, ExportError
from jaxpeft.export import __main__ as command
from jaxpeft.export.completions import Server
from jaxpeft.export.request import VerifyRequest
from jaxpeft.export.verify import decide, verify
from tests.export.making import CAUSAL, LORA, SEQUENCE
from tests.export.serving import Served, log_probs, serve
from tests.hub.helpers import peft_load, torch_base
from tests.train.runs import write_tokenizer


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def tuned(make, reference, tmp_path):
    """An adapter on a base with a tokenizer."""
    base = shutil.copytree(reference("llama", CAUSAL).folder, tmp_path / "base")
    write_tokenizer(base)
    return make(LORA, "llama", CAUSAL, base=base)


def torch_models(made, other):
    """Return torch models: the adapter on its base, the base alone, and another adapter on it."""
    return {
        "the adapter": peft_load(made.base, CAUSAL, made.folder),
        "the base": torch_base(made.base, CAUSAL),
        "something else": peft_load(made.base, CAUSAL, other),
    }


@pytest.fixture
def other(tuned, tmp_path):
    """Another adapter on the same base."""
    method = jaxpeft.LoRA(rank=4, targets=("q_proj", "v_proj", "up_proj"))
    params = jaxpeft.rewrite(method, jaxpeft.load(tuned.base, task=CAUSAL)[1], jax_key())
    from tests.hub.helpers import trained

    jaxpeft.save_adapter(tmp_path / "other", method, trained(method, params, seed=3), tuned.model)
    return tmp_path / "other"


def jax_key():
    import jax

    return jax.random.key(1)


STATES = ("the adapter", "the base", "something else")


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.representatives("the adapter-bfloat16", "the base-float32", "something else-bfloat16")
def test_the_server_s_state_is_told(tuned, other, state, half):
    import torch

    model = torch_models(tuned, other)[state].to(torch.bfloat16 if half else torch.float32)
    with serve(Served(log_probs(model))) as url:
        verdict = verify(VerifyRequest(tuned.folder), Server(url, "tuned", 30.0))
    assert verdict.state == state and verdict.serves_adapter == (state == "the adapter")
    assert verdict.apart > 0.1 and verdict.tokens > 50
    if state != "something else":
        near = verdict.to_adapter if state == "the adapter" else verdict.to_base
        assert near < (0.05 if half else 1e-4)
        assert half == (near > 1e-4)  # what bfloat16 rounds is seen, and does not matter


@pytest.mark.parametrize("form", ["echo", "echo of text", "llama.cpp", "mlx"])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.representatives("the adapter-llama.cpp", "the base-mlx", "something else-echo*text")
def test_every_form_tells_it(tuned, other, state, form):
    model = torch_models(tuned, other)[state]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tuned.base)
    with serve(Served(log_probs(model), form, tokenizer)) as url:
        verdict = verify(VerifyRequest(tuned.folder), Server(url, "tuned", 30.0))
    assert verdict.state == state


@pytest.mark.parametrize("state", STATES)
def test_the_exit_code_is_0_for_the_adapter_alone(tuned, other, state, capsys):
    model = torch_models(tuned, other)[state]
    with serve(Served(log_probs(model))) as url:
        arguments = ["--adapter", str(tuned.folder), "--verify", url, "--model", "tuned"]
        assert command.main(arguments) == (0 if state == "the adapter" else 1)
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"serves {state}"
    assert second.startswith("mean difference of log-probabilities: ")
    assert "from the adapter" in second and "from prompt_logprobs)" in second


def test_a_merged_model_serves_the_adapter(tuned, tmp_path):
    tuned.export(tmp_path / "merged")
    with serve(Served(log_probs(torch_base(tmp_path / "merged", CAUSAL)))) as url:
        verdict = verify(VerifyRequest(tuned.folder), Server(url, "tuned", 30.0))
    assert verdict.serves_adapter


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--verify=http://h"], ["--adapter: is required with --verify", "--model: is required"]),
        (
            ["--verify=http://h", "--adapter=a", "--model=m", "--to=peft", "--out=b"],
            ["--to: cannot be used with --verify", "--output: cannot be used with --verify"],
        ),
        (
            ["--adapter=a", "--to=peft", "--out=b", "--base=m", "--model=m"],
            ["--model: is the base, as --base is; give only one of them"],
        ),
        (["--verify=h:1", "--adapter=a", "--model=m"], ["--verify: must be the address"]),
        (["--verify=http://h", "--timeout=0"], ["--timeout: must be above 0"]),
    ],
)
def test_bad_arguments_are_named(arguments, texts, capsys):
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert all(text in error for text in texts), error


def test_no_server_is_exit_code_1_and_no_model_2(tuned, capsys):
    adapter = ["--adapter", str(tuned.folder), "--timeout=5"]
    with serve(Served(lambda ids: np.zeros((len(ids), 99)))) as url:
        assert command.main([*adapter, "--verify", url, "--model", "other"]) == 2
        assert "has no model 'other'; it has tuned, base" in capsys.readouterr().err
    assert command.main([*adapter, "--verify", url, "--model", "tuned"]) == 1
    assert "cannot be reached" in capsys.readouterr().err


def test_a_classifier_has_nothing_to_compare(make):
    made = make(LORA, "bert", SEQUENCE)
    with pytest.raises(ConfigError, match="was trained for sequence_classification, but only lang"):
        verify(VerifyRequest(made.folder), Server("http://localhost:1", "m", 1.0))


def test_tokens_that_the_model_does_not_have_are_refused(tuned):
    for token in (10**6, 10**250):
        row = {"content": [{"top_logprobs": [{"id": token, "logprob": -1.0}]}]}
        answer = (200, {"choices": [{"logprobs": row}]})
        served = Served(lambda ids: np.zeros((1, 1)), answer=lambda *_, answer=answer: answer)
        with (
            serve(served) as url,
            pytest.raises(ExportError, match=r"gives token 1000.* another model"),
        ):
            verify(VerifyRequest(tuned.folder), Server(url, "tuned", 30.0))


# ---------------------------------------------------------------------------------------- the rule

RNG = np.random.default_rng(0)
BASE = -3 * RNG.random(400)
CHANGE = RNG.standard_normal(400)


def decided(apart, at, noise):
    """Return the decision on a server that is `at` (0: base, 1: adapter) between two models that
    are `apart`, with noise.
    """
    change = CHANGE * apart / np.abs(CHANGE).mean()
    own = RNG.standard_normal(400)
    theirs = BASE + at * change + noise * own / np.abs(own).mean()
    return decide(theirs, BASE + change, BASE, "test")


@pytest.mark.parametrize(
    ("apart", "at", "noise", "wanted"),
    [
        (1.0, 1, 0.02, "the adapter"),
        (1.0, 0, 0.02, "the base"),
        (0.1, 1, 0.02, "the adapter"),
        (0.1, 0, 0.02, "the base"),
        (0.01, 1, 1e-4, "the adapter"),  # a small change, seen by an exact server
        (0.01, 0, 1e-4, "the base"),
        (1.0, 0.5, 0.0, "something else"),  # such as an earlier checkpoint
        (1.0, 2, 0.0, "something else"),  # such as a wrong scale
        (5.0, 0.9, 0.0, "something else"),  # near the adapter, but not the same
        (0.01, 1, 1.0, "something else"),
    ],
)
def test_the_nearer_one_is_served_where_the_margin_is_clear(apart, at, noise, wanted):
    verdict = decided(apart, at, noise)
    assert verdict.state == wanted
    assert verdict.apart == pytest.approx(apart)


@pytest.mark.parametrize("at", [0, 1])
def test_a_change_below_rounding_cannot_be_told(at):
    with pytest.raises(ExportError, match=r"changes the log-probabilities .* by 0.01 on average"):
        decided(0.01, at, 0.01)


@pytest.mark.parametrize("which", ["the adapter", "the base"])
def test_log_probabilities_of_our_own_that_are_none_are_an_error(which):
    bad = np.array([-1.0, np.nan])
    ours, plain = (bad, bad[:1].repeat(2)) if which == "the adapter" else (bad, bad)
    with pytest.raises(
        ExportError, match=f"{which} itself gives log-probabilities that are not fi"
    ):
        decide(np.array([-1.0, -1.0]), ours, plain, "test")
