"""The old name of `jaxpeft.data.rows.columns`, which versions before 0.3 accept."""

import warnings

from jaxpeft.data.rows.columns import *  # noqa: F403

warnings.warn(
    "jaxpeft.data.columns is called jaxpeft.data.rows.columns now", DeprecationWarning, stacklevel=2
)
