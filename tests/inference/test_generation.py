"""Generation: the tokens of transformers, for every decoder, batch and mesh."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft.errors import ConfigError, DataError
from jaxpeft.inference.generation import complete, ends_of
from jaxpeft.inference.sampling import Sampling
from tests.conformance.conftest import moved
from tests.core.helpers import load
from tests.models.conftest import PAD, VOCAB, Reference, forward
from tests.models.test_decoder_parity import CASES
from tests.representatives import both_stacks

PROMPTS = [[7, 9, 11, 40, 12], [30], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52]]
MOST = 12


def theirs(model: Any, prompts: Sequence[Sequence[int]], most: int = MOST) -> list[list[int]]:
    """Return what transformers generates from a batch that is padded on the left."""
    import torch

    model.generation_config.eos_token_id = None
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=most,
        do_sample=False,
        pad_token_id=PAD,
    )
    return out[:, longest:].tolist()


@pytest.mark.parametrize(
    ("model_type", "name", "switches"), CASES, ids=[f"{kind}-{name}" for kind, name, _ in CASES]
)
@pytest.mark.representatives("llama-plain", "mistral-window")
def test_greedy_tokens_are_those_of_transformers(
    reference: Callable[..., Reference], model_type: str, name: str, switches: dict[str, Any]
) -> None:
    made = reference(model_type, "causal_lm", **switches)
    wanted = theirs(made.model, PROMPTS)
    for scan in (False, True):
        model, params = made.load(scan_layers=scan)
        assert jaxpeft.generate(model, params, PROMPTS, max_new_tokens=MOST, eos=()) == wanted


def choose_by_full_passes(
    model: Any, params: Any, prompt: Sequence[int], most: int, **options: Any
) -> list[int]:
    """Return the greedy tokens, each by a pass over the whole text."""
    ids = np.zeros((1, len(prompt) + most), np.int32)
    ids[0, : len(prompt)] = prompt
    run = jax.jit(lambda ids: jaxpeft.apply(model, params, ids, **options))
    for at in range(len(prompt), ids.shape[1]):
        ids[0, at] = np.asarray(run(ids))[0, at - 1].argmax()
    return ids[0, len(prompt) :].tolist()


def test_a_text_ends_with_the_token_that_ends_it() -> None:
    model, params = load("llama")
    every = jaxpeft.generate(model, params, PROMPTS, max_new_tokens=MOST, eos=())
    ends = {every[0][3], every[1][5]}
    found = complete(model, params, PROMPTS, max_new_tokens=MOST, eos=ends)
    for text, full in zip(found, every, strict=True):
        at = next((i for i, token in enumerate(full) if token in ends), None)
        assert list(text.tokens) == full[: MOST if at is None else at + 1]
        assert text.ending == ("length" if at is None else "end")
    assert {"end"} <= {text.ending for text in found}


def test_the_ends_are_those_of_the_files(reference: Callable[..., Reference]) -> None:
    made = reference("llama", "causal_lm")
    model, params = made.load()
    assert ends_of(model, None) == {3}  # of config.json
    free = jaxpeft.generate(model, params, PROMPTS, max_new_tokens=MOST, eos=())
    assert ends_of(model, free[0][2]) == {free[0][2]}
    assert ends_of(load("llama")[0], None) == frozenset()


@pytest.mark.slow
def test_every_row_of_a_batch_uses_its_own_adapter() -> None:
    model, base = load("llama")
    methods = [jaxpeft.LoRA(rank=r, targets=("q_proj", "v_proj")) for r in (2, 4)]
    trees = [
        moved(method, jaxpeft.rewrite(method, base, jax.random.key(i)), seed=i)
        for i, method in enumerate(methods)
    ]
    bank = jaxpeft.bank(list(zip(methods, trees, strict=True)))
    which = [1, 0, 1]
    found = jaxpeft.generate(model, bank, PROMPTS, max_new_tokens=MOST, eos=(), adapter=which)
    for prompt, i, text in zip(PROMPTS, which, found, strict=True):
        alone = jaxpeft.generate(model, trees[i], [prompt], max_new_tokens=MOST, eos=())
        assert [text] == alone
    whole = jaxpeft.generate(model, bank, PROMPTS, max_new_tokens=MOST, eos=(), adapter=1)
    assert [whole[0], whole[2]] == [found[0], found[2]]
    assert whole[1] != found[1]
    with pytest.raises(DataError, match=r"adapter: has shape \[2\], but there are 3 prompts"):
        jaxpeft.generate(model, bank, PROMPTS, max_new_tokens=1, adapter=[0, 1])
    with pytest.raises(DataError, match="adapter: 2 is outside the stack of 2 adapters"):
        jaxpeft.generate(model, bank, PROMPTS, max_new_tokens=1, adapter=2)
    with pytest.raises(ConfigError, match="adapter: the parameters are an adapter stack"):
        jaxpeft.generate(model, bank, PROMPTS, max_new_tokens=1)


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap])
def test_a_traced_call_is_refused(transform: Any) -> None:
    model, params = load("llama")
    with pytest.raises(ConfigError, match="generate: cannot be traced by jax"):
        transform(lambda ids: jaxpeft.generate(model, params, [ids], max_new_tokens=1))(
            jnp.ones((2, 3), jnp.int32)
        )
    with pytest.raises(ConfigError, match="generate: cannot be traced"):
        jax.jit(lambda: jaxpeft.generate(model, params, [[1]], max_new_tokens=1))()


@pytest.mark.parametrize("strategy", ["replicated", "fsdp", "tensor", "fsdp_tensor"])
@both_stacks
@pytest.mark.representatives("scanned-fsdp_tensor")
def test_on_a_mesh_the_tokens_are_the_same(
    reference: Callable[..., Reference], strategy: str, scan: bool
) -> None:
    made = reference("llama", "causal_lm")
    alone = jaxpeft.generate(*made.load(), PROMPTS, max_new_tokens=MOST, eos=())
    config = jaxpeft.MeshConfig(
        strategy=strategy,
        **({"tensor": 2} if "tensor" in strategy else {"data": 2}),
        **({"fsdp": 4} if "fsdp" in strategy else {}),
    )
    mesh = jaxpeft.create_device_mesh(config)
    model, params = made.load(scan_layers=scan, mesh=mesh, rules=jaxpeft.sharding_rules(config))
    assert jaxpeft.generate(model, params, PROMPTS, max_new_tokens=MOST, eos=()) == alone


@pytest.mark.parametrize(("sizes", "positions"), [((18,), 20), ((17, 5), 16), ((33,), 16)])
@pytest.mark.representatives("sizes1-16")
def test_dynamic_rope_depends_on_the_tokens_and_not_on_their_padding(
    reference: Callable[..., Reference], sizes: tuple[int, ...], positions: int
) -> None:
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    made = reference(
        "llama", "causal_lm", rope_parameters=dynamic, max_position_embeddings=positions
    )
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, VOCAB, size).tolist() for size in sizes]
    model, params = made.load()
    found = jaxpeft.generate(model, params, prompts, max_new_tokens=MOST, eos=())
    assert found == theirs(made.model, prompts)


def test_numbers_of_numpy_and_jax_are_taken() -> None:
    model, params = load("llama")
    wanted = jaxpeft.generate(model, params, PROMPTS, max_new_tokens=3, eos=5)
    prompts = [np.asarray(PROMPTS[0]), jnp.asarray(PROMPTS[1]), tuple(PROMPTS[2])]
    for eos in (np.int64(5), jnp.int32(5), np.array(5), {5}, [np.int32(5)]):
        options = {"temperature": jnp.float32(0), "max_new_tokens": np.int32(3), "eos": eos}
        assert jaxpeft.generate(model, params, prompts, **options) == wanted


def test_parameters_that_have_diverged_are_told() -> None:
    model, params = load("llama")
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    with pytest.raises(DataError, match="the logits are not finite: the parameters have diverged"):
        jaxpeft.generate(model, broken, PROMPTS, max_new_tokens=2)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["nf4", "int8", "fp8"])
def test_a_quantized_base_decodes_from_its_codes(form: Any) -> None:
    model, params = load("llama")
    codes = jaxpeft.quantize(params, form)
    found = jaxpeft.generate(model, codes, PROMPTS, max_new_tokens=4, eos=())
    assert found == [choose_by_full_passes(model, codes, p, 4) for p in PROMPTS]


def test_samples_depend_on_the_seed_and_the_index_of_the_prompt_alone() -> None:
    model, params = load("llama")

    def sample(prompts: Any, seed: int = 0, **options: Any) -> list[list[int]]:
        return jaxpeft.generate(
            model,
            params,
            prompts,
            max_new_tokens=MOST,
            temperature=1.0,
            seed=seed,
            eos=(),
            **options,
        )

    one = sample(PROMPTS)
    assert one == sample(PROMPTS) == sample(PROMPTS, batch_size=2) == sample(PROMPTS, batch_size=1)
    assert one != sample(PROMPTS, seed=1)
    assert sample([PROMPTS[0], PROMPTS[0]])[0] != sample([PROMPTS[0], PROMPTS[0]])[1]
    assert sample(PROMPTS[:1]) == one[:1]
    later = complete(
        model, params, PROMPTS[1:], max_new_tokens=MOST, sampling=Sampling(1.0), eos=(), first=1
    )
    assert [list(each.tokens) for each in later] == one[1:]


def test_log_probabilities_are_those_of_a_pass_over_the_text() -> None:
    model, params = load("llama")
    found = complete(
        model, params, PROMPTS, max_new_tokens=MOST, sampling=Sampling(0.7, top_k=5), eos=()
    )
    for prompt, text in zip(PROMPTS, found, strict=True):
        ids = jnp.asarray([[*prompt, *text.tokens]], jnp.int32)
        logits = forward(model, params, ids, jnp.ones_like(ids))[0, len(prompt) - 1 : -1]
        wanted = jax.nn.log_softmax(logits)[jnp.arange(MOST), jnp.asarray(text.tokens)]
        np.testing.assert_allclose(text.log_probs, wanted, atol=1e-4)


def test_a_repetition_penalty_counts_the_prompt_without_its_padding(
    reference: Callable[..., Reference],
) -> None:
    import torch

    made = reference("llama", "causal_lm")
    model, params = made.load()
    made.model.generation_config.eos_token_id = None
    found = jaxpeft.generate(
        model, params, PROMPTS, max_new_tokens=MOST, repetition_penalty=1.8, eos=()
    )
    for prompt, text in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        wanted = made.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=MOST,
            do_sample=False,
            pad_token_id=PAD,
            repetition_penalty=1.8,
        )
        assert text == wanted[0, len(prompt) :].tolist()


def test_tokens_are_streamed_as_they_come_and_the_caller_can_stop_a_text() -> None:
    model, params = load("llama")
    every = jaxpeft.generate(model, params, PROMPTS, max_new_tokens=40, eos=())
    shown: dict[int, list[int]] = {}
    calls = list[int]()

    def stream(row: int, tokens: Sequence[int]) -> None:
        calls.append(row)
        shown.setdefault(row, []).extend(tokens)

    found = complete(model, params, PROMPTS, max_new_tokens=40, eos=(), stream=stream)
    assert [list(each.tokens) for each in found] == every == [shown[i] for i in range(3)]
    assert len(calls) > 60
    target = every[1][20]
    found = complete(
        model, params, PROMPTS[1:2], max_new_tokens=40, eos=(), stops=lambda text: target in text
    )
    assert found[0].ending == "stop"
    assert list(found[0].tokens) == every[1][: len(found[0].tokens)]
    assert found[0].tokens[-1] == target  # the token that stopped it
    assert target not in found[0].tokens[:-1]
    assert len(found[0].log_probs) == len(found[0].tokens)


def test_a_few_padded_sizes_share_their_programs() -> None:
    from jaxpeft.inference.decoding import programs

    model, params = load("llama")
    prefill, decode = programs(None)
    jaxpeft.generate(model, params, [[5]], max_new_tokens=7, eos=(), temperature=1.0, top_p=0.5)
    before = prefill._cache_size(), decode._cache_size()
    for length in range(1, 17):
        options = {"max_new_tokens": length, "temperature": 0.1 * length, "top_p": 0.05 * length}
        jaxpeft.generate(model, params, [[5] * length], eos=(), seed=length, **options)
    assert (prefill._cache_size(), decode._cache_size()) == before


def test_wrong_input_is_told() -> None:
    model, params = load("llama")

    def fails(*prompts: Any, **options: Any) -> str:
        with pytest.raises((ConfigError, DataError)) as error:
            jaxpeft.generate(model, params, prompts, **{"max_new_tokens": 2, **options})
        return str(error.value)

    assert fails([]) == "prompts[0]: is empty; a prompt is a list of token ids"
    assert (
        fails([1], "a")
        == "prompts[1]: is a text; tokenize it first; a prompt is a list of token ids"
    )
    assert fails([1, VOCAB]).startswith(f"prompts[0]: {VOCAB} is outside the vocabulary of {VOCAB}")
    assert fails([1, -1]).startswith("prompts[0]: -1 is outside the vocabulary")
    assert fails([1.5]).startswith("prompts[0]: must be a list of token ids")
    assert fails(1, 2).startswith("prompts[0]: must be a list of token ids, is 1")
    assert fails([1, [2]]).startswith("prompts[0]: must be a list of token ids")
    assert fails([1], max_new_tokens=0) == "max_new_tokens: must be an integer of at least 1, is 0"
    assert fails([1], max_new_tokens=True).startswith("max_new_tokens: must be an integer")
    assert fails([1], batch_size=1.5) == "batch_size: must be an integer of at least 1, is 1.5"
    assert fails([1], seed=2**64).startswith("seed: must be an integer of at least 0")
    assert fails([1], top_k=2.5, temperature=1).startswith("top_k: must be an integer")
    for eos in (["a"], 2.0, [[1]], 2**40):
        assert fails([1], eos=eos).startswith("eos: must be token ids, are")
    classifier = load("bert")
    with pytest.raises(ConfigError, match="got a model with task 'sequence_classification'"):
        jaxpeft.generate(*classifier, [[1]], max_new_tokens=2)
    with pytest.raises(ConfigError, match=r"needs a language model, .* got a dict"):
        jaxpeft.generate({}, params, [[1]], max_new_tokens=2)
    assert jaxpeft.generate(model, params, [], max_new_tokens=2) == []


def test_more_positions_than_the_model_was_trained_with_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, params = load("llama")
    jaxpeft.generate(model, params, [[5] * 60], max_new_tokens=8, eos=())
    assert "up to 68 tokens, but the model was trained with positions up to 64" in caplog.text


def test_the_package_is_called_like_its_function() -> None:
    assert list(inspect.signature(jaxpeft.generate).parameters)[:3] == [
        "model",
        "params",
        "prompts",
    ]
    assert "generate" in dir(jaxpeft)
