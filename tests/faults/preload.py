"""What the forkserver of the fault tests has imported before a run is forked from it: importing it
takes most of a run's time.

No JAX backend is started here: a fork would not take its threads along.
"""

from __future__ import annotations

import sklearn.metrics  # noqa: F401
from transformers import AutoTokenizer  # noqa: F401

import tests.faults.entry  # noqa: F401
