"""The old name of `jaxpeft.data.chat.supervise`, accepted until 0.3."""

import warnings

from jaxpeft.data.chat.supervise import *  # noqa: F403

warnings.warn(
    "jaxpeft.data.supervise is called jaxpeft.data.chat.supervise now",
    DeprecationWarning,
    stacklevel=2,
)
