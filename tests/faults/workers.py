"""Batches whose making fails in a worker process, which imports them by name."""

from __future__ import annotations

import os
import time

from jaxpeft.data.batches.training import Batch, Batches, Own

AT = 3


class Raising(Batches):
    """Raises."""

    def batch(self, step: int, own: Own = None) -> Batch:
        """Make a batch."""
        if step == AT:
            raise ZeroDivisionError("three is too many")
        return super().batch(step, own)


class Ending(Batches):
    """Ends its process."""

    def batch(self, step: int, own: Own = None) -> Batch:
        """Make a batch."""
        if step == AT:
            os._exit(9)
        return super().batch(step, own)


class Hanging(Batches):
    """Hangs."""

    def batch(self, step: int, own: Own = None) -> Batch:
        """Make a batch."""
        if step == AT:
            time.sleep(1000)
        return super().batch(step, own)
