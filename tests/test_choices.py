"""What may be chosen by name is what there is a table entry for."""

from __future__ import annotations

from typing import get_args

from jaxpeft import choices
from jaxpeft.export.export_targets import TARGETS
from jaxpeft.kernels import QUANTIZED
from jaxpeft.models.attention import KERNELS


def test_the_names_are_those_of_the_tables() -> None:
    assert get_args(choices.QuantForm) == tuple(QUANTIZED)
    assert get_args(choices.Attention) == tuple(KERNELS)
    assert get_args(choices.ExportTarget) == tuple(TARGETS)
    assert {*choices.TASKS} == {*get_args(choices.TrainedTask), "encoder"}
