"""The templates of pages. Every value is escaped; a missing one is an error."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from jinja2 import PackageLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

import jaxpeft
from jaxpeft.evaluation.wording import p_clause
from jaxpeft.report.svg_charts import label


def render(template: str, **values: Any) -> str:
    """Return a page.

    Args:
        template: file name of its template.
        **values: values of the template.
    """
    environment = ImmutableSandboxedEnvironment(
        loader=PackageLoader("jaxpeft.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "short": label,
        "percent": percent,
        "duration": duration,
        "size": size,
        "share": share,
        "p": p_clause,
        "dedent": textwrap.dedent,
    }
    return environment.get_template(template).render(version=jaxpeft.__version__, **values)


def number(value: float | None, signed: bool = False) -> str:
    """Format a metric with four decimals, fewer if it is large, or as a power of ten if it is very
    large; a dash for None.

    Args:
        value: the metric.
        signed: whether a positive value has a plus sign, as a difference has.
    """
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "not finite"
    sign = "+" if signed else ""
    size = abs(value)
    return f"{value:{sign}{'.4f' if size < 1e3 else ',.1f' if size < 1e12 else '.4g'}}"


def percent(share: float) -> str:
    """Format a share: `2.876 %`."""
    return f"{share:.3%}".replace("%", "\u202f%")


def share(part: float) -> str:
    """Format a share of answers: `98 %`."""
    return f"{part:.0%}".replace("%", "\u202f%")


def duration(seconds: float) -> str:
    """Format a time: `57.7 s`, `12 min`, `3.4 h`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Format a number of bytes in MB or kB."""
    return f"{count / 1e6:.2f} MB" if count >= 1e4 else f"{count / 1e3:.1f} kB"
