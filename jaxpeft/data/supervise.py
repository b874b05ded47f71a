"""The old name of `jaxpeft.data.chat.supervise`, which versions before 0.3 accept."""

import warnings

from jaxpeft.data.chat.supervise import *  # noqa: F403

warnings.warn(
    "jaxpeft.data.supervise is called jaxpeft.data.chat.supervise now",
    DeprecationWarning,
    stacklevel=2,
)
