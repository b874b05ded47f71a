"""The old name of `jaxpeft.data.chat.dialogs`, accepted until 0.3."""

import warnings

from jaxpeft.data.chat.dialogs import *  # noqa: F403

warnings.warn(
    "jaxpeft.data.dialogs is called jaxpeft.data.chat.dialogs now", DeprecationWarning, stacklevel=2
)
