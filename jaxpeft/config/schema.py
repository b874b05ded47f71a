"""The config of a run: its sections, and what must agree across them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from jaxpeft.config.candidates import CandidateConfig, CompareConfig
from jaxpeft.config.data_config import DataConfig
from jaxpeft.config.model_config import ModelConfig
from jaxpeft.config.train_config import (
    CheckpointConfig,
    EvaluationConfig,
    LogConfig,
    OptimizerConfig,
    TrainConfig,
)
from jaxpeft.core.method import Method
from jaxpeft.core.options import option
from jaxpeft.core.training_hooks import trains_head_alone
from jaxpeft.methods import read
from jaxpeft.methods.lora import LoRA
from jaxpeft.sharding.mesh_config import MeshConfig, batch_problems, known_rows


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
