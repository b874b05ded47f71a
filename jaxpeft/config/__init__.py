"""Configs: the options of a run, config files, command-line overrides, and checks.

A config file defines `get_config()`, which changes and returns `defaults()`. This package does not
import JAX, so that a bad config is rejected immediately.
"""

from jaxpeft.config.files import defaults as defaults
from jaxpeft.config.files import load as load
from jaxpeft.config.schema import Config as Config
