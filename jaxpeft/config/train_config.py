"""The options of training: optimizer, steps, evaluation, checkpoints and logs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxpeft.core.options import option
from jaxpeft.sharding.sizes import divisors
from jaxpeft.sharding.sizes import nearest as nearest_numbers


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
            "f1_weighted",
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
