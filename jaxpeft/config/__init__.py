"""Configs: the options of a run, how a config file and the command line set them, and how they are
checked.

A config file defines `get_config()`, which takes `defaults()`, changes what it wants and returns
it. Nothing here imports JAX, so that a bad config is refused at once.
"""

from jaxpeft.config.files import defaults as defaults
from jaxpeft.config.files import load as load
from jaxpeft.config.schema import Config as Config
