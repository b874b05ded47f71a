"""The old name of `jaxpeft.data.rows.columns`, accepted until 0.3."""

import warnings

from jaxpeft.data.rows.columns import *  # noqa: F403

warnings.warn(
    "jaxpeft.data.columns is called jaxpeft.data.rows.columns now", DeprecationWarning, stacklevel=2
)
