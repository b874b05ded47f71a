"""Sources of items for the tests of `ahead`: here, not in a test, since a worker process has to
import them.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

from jaxpeft.errors import DataError


@dataclass(frozen=True)
class Fails:
    """Gives `i * i`, of `size` bytes and more, until item `at`, with which something happens.

    Attributes:
        how: `no`, `told` (a DataError), `other` (an OSError), `timeout` (a TimeoutError), `exits`,
            `killed` or `hangs`.
        at: the item.
        length: how many items there are.
        size: bytes of ballast of each item.
    """

    how: str = "no"
    at: int = 3
    length: int = 7
    size: int = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> tuple[int, bytes]:
        if i == self.at:
            self._fail()
        return i * i, bytes(self.size)

    def _fail(self) -> None:
        if self.how == "told":
            raise DataError(["rows.jsonl:3:1: broken; fix it", "rows.jsonl:4:1: broken; fix it"])
        if self.how == "other":
            raise FileNotFoundError(2, "gone", "rows.jsonl")
        if self.how == "timeout":
            raise TimeoutError("the disk is slow")
        if self.how == "exits":
            os._exit(9)
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "hangs":
            time.sleep(1000)
