"""The old name of `jaxpeft.data.chat.templates`, accepted until 0.3."""

import warnings

from jaxpeft.data.chat.templates import *  # noqa: F403

warnings.warn(
    "jaxpeft.data.templates is called jaxpeft.data.chat.templates now",
    DeprecationWarning,
    stacklevel=2,
)
