"""The fixtures of the hub's tests, whose adapters are exported."""

from tests.hub.conftest import no_unpickling, one_torch_thread, reference, save

__all__ = ["no_unpickling", "one_torch_thread", "reference", "save"]
