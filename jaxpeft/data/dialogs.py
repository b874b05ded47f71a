"""The old name of `jaxpeft.data.chat.dialogs`, which versions before 0.3 accept."""

import warnings

from jaxpeft.data.chat.dialogs import *  # noqa: F403

warnings.warn(
    "jaxpeft.data.dialogs is called jaxpeft.data.chat.dialogs now", DeprecationWarning, stacklevel=2
)
