"""What a run decided is in what is exported: the pipelines of transformers give the same labels and
kinds of scores.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import jaxpeft
from jaxpeft.errors import WeightsError
from jaxpeft.export.export import export
from jaxpeft.export.request import ExportRequest
from jaxpeft.hub.adapters.settings import Settings
from tests.hub.adapters.test_extra import flip
from tests.hub.helpers import METHOD, edit_json, trained
from tests.train.runs import WORDS, write_tokenizer

SEQUENCE, TOKENS, CAUSAL = "sequence_classification", "token_classification", "causal_lm"
LABELS = ("zebra", "ape", "monkey")
TEXTS = [" ".join(WORDS[i : i + 3]) for i in range(0, 12, 3)]


@pytest.fixture
def tokenizer(tmp_path):
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


@pytest.fixture
def exported(reference, tmp_path, tokenizer):
    """Trains, saves and exports an adapter; gives the folder and what computes our logits of a
    text.
    """

    def make(task, kind="bert", settings=None, labels=(), base=None, to="merged", **options):
        import jax

        folder = base or reference(kind, SEQUENCE if task == TOKENS else task).folder
        model, params = jaxpeft.load(folder, task=task, dtype=np.float32, **options)
        method = METHOD if kind == "bert" else jaxpeft.LoRA(targets=("q_proj",))
        params = trained(method, jaxpeft.rewrite(method, params, jax.random.key(0)))
        jaxpeft.save_adapter(
            tmp_path / "adapter",
            method,
            params,
            model,
            labels=labels,
            settings=settings,
            tokenizer=tokenizer,
        )
        export(ExportRequest(tmp_path / "adapter", to, tmp_path / "out"))

        def logits(text):
            made = tokenizer(text, return_tensors="np")
            return np.asarray(
                jaxpeft.apply(model, params, made["input_ids"], made["attention_mask"])
            )[0]

        return tmp_path / "out", logits

    return make


def pipeline(kind, folder, **options):
    from transformers import pipeline as made

    return made(kind, model=str(folder), device="cpu", **options)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize(
    ("problem", "score"),
    [
        ("single_label_classification", softmax),
        ("multi_label_classification", lambda x: 1 / (1 + np.exp(-x))),
    ],
)
@pytest.mark.representatives("multi*bert")
def test_the_pipeline_gives_the_labels_and_scores(exported, problem, score, kind):
    folder, logits = exported(
        SEQUENCE, kind, Settings(problem_type=problem, pad_token_id=0), LABELS, num_labels=3
    )
    found = pipeline("text-classification", folder, top_k=None)(TEXTS, batch_size=2)
    for text, rows in zip(TEXTS, found, strict=True):
        wanted = score(logits(text))
        assert [row["label"] for row in rows] == [LABELS[i] for i in np.argsort(-wanted)]
        np.testing.assert_allclose([row["score"] for row in rows], np.sort(wanted)[::-1], atol=1e-4)
    config = json.loads((folder / "config.json").read_text())
    assert config["problem_type"] == problem and config["label2id"] == {
        "zebra": 0,
        "ape": 1,
        "monkey": 2,
    }


@pytest.mark.slow
def test_the_pipeline_gives_the_number_of_a_regression(exported):
    folder, logits = exported(SEQUENCE, settings=Settings(problem_type="regression"), num_labels=1)
    (found,) = pipeline("text-classification", folder)(TEXTS[0])
    assert found["score"] == pytest.approx(float(logits(TEXTS[0])[0]), abs=1e-4)


def test_the_pipeline_gives_the_tag_of_each_token(exported):
    folder, logits = exported(TOKENS, labels=LABELS, num_labels=3)
    found = pipeline("token-classification", folder, ignore_labels=[])(TEXTS[0])
    wanted = logits(TEXTS[0])[1:-1]
    assert [row["entity"] for row in found] == [LABELS[i] for i in wanted.argmax(-1)]
    np.testing.assert_allclose(
        [row["score"] for row in found], [softmax(x).max() for x in wanted], atol=1e-4
    )


@pytest.mark.slow
def test_facts_of_the_base_hold_where_its_head_is_kept_and_nowhere_else(
    exported, reference, tmp_path
):
    base = shutil.copytree(reference("bert", SEQUENCE).folder, tmp_path / "base")
    names = {"0": "b", "1": "c", "2": "a"}
    edit_json(
        base / "config.json",
        lambda c: c.update(problem_type="multi_label_classification", id2label=names),
    )
    folder, _ = exported(SEQUENCE, base=base)
    config = json.loads((folder / "config.json").read_text())
    assert (config["id2label"], config["problem_type"]) == (names, "multi_label_classification")
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "adapter")
    folder, _ = exported(SEQUENCE, base=base, num_labels=2)
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"} and "problem_type" not in config


def test_templates_go_with_the_adapter_and_the_merged_model(exported, tokenizer):
    from transformers import AutoTokenizer

    tokenizer.chat_template = {"default": "{{ messages[0].content }} trained", "rag": "other"}
    for to in ("merged", "peft"):
        folder, _ = exported(CAUSAL, "llama", to=to)
        assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
        shutil.rmtree(folder)
        shutil.rmtree(folder.parent / "adapter")


@pytest.mark.parametrize(
    ("there", "wanted"),
    [({"eos_token_id": 3, "top_k": 5}, [3, 7]), ({"eos_token_id": [7, 3]}, [7, 3]), (None, [2, 7])],
)
def test_generation_ends_where_answers_ended(exported, reference, tmp_path, there, wanted):
    base = shutil.copytree(reference("llama", CAUSAL).folder, tmp_path / "base")
    edit_json(base / "config.json", lambda c: c.update(eos_token_id=2))
    (base / "generation_config.json").unlink(missing_ok=True)
    if there is not None:
        (base / "generation_config.json").write_text(json.dumps(there))
    folder, _ = exported(CAUSAL, "llama", Settings(eos_token_id=7), base=base)
    found = json.loads((folder / "generation_config.json").read_text())
    assert found == (there or {}) | {"eos_token_id": wanted}


# ------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000])
@pytest.mark.representatives("20000")
def test_a_flipped_bit_in_a_merged_model_is_refused_by_the_name_of_its_tensor(
    exported, tmp_path, shard_bytes
):
    exported(CAUSAL, "llama")
    folder = tmp_path / "again"
    export(ExportRequest(tmp_path / "adapter", "merged", folder, shard_bytes=shard_bytes))
    name = "model.layers.1.self_attn.q_proj.weight"
    file = next(
        f for f in folder.glob("*.safetensors") if name in f.read_bytes()[:4000].decode("latin1")
    )
    jaxpeft.load(folder, task=CAUSAL)
    flip(file, name)
    with pytest.raises(WeightsError) as caught:
        jaxpeft.load(folder, task=CAUSAL)
    record = folder / "jaxpeft_merge.json"
    (problem,) = caught.value.problems
    assert (
        problem == f"{file}: {name}: its SHA-256 differs from jaxpeft_merge.json; copy the model"
        f" again; if it was changed on purpose, remove 'sha256' from {record}"
    )
    edit_json(record, lambda content: content.pop("sha256"))
    jaxpeft.load(folder, task=CAUSAL)


def test_a_merged_model_in_other_shards_is_the_same(exported, tmp_path):
    from transformers import AutoModelForCausalLM

    folder, _ = exported(CAUSAL, "llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=30_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    jaxpeft.load(folder, task=CAUSAL)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '{"earlier": 3}',
        '{"earlier": [1]}',
        '{"adapter": []}',
        '{"sha256": [1]}',
        '{"sha256": {"a": 1}}',
    ],
)
def test_a_hostile_record_of_a_merge_is_refused(exported, content):
    folder, _ = exported(CAUSAL, "llama")
    (Path(folder) / "jaxpeft_merge.json").write_text(content)
    with pytest.raises(WeightsError, match=r"jaxpeft_merge\.json"):
        jaxpeft.load(folder, task=CAUSAL)
