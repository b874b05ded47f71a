"""One subject a row, model and way to run the layers: what its properties are read off is computed
once.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft
from jaxpeft.core import paths, training_hooks
from jaxpeft.core.tree import combine
from jaxpeft.hub.adapters import tensors
from jaxpeft.methods import METHODS
from jaxpeft.train.losses import loss_for
from jaxpeft.train.step import init_state, make_train_step
from tests.conformance.rows import DECODER, ROWS, Row
from tests.core.helpers import BATCH, QUICK, load, run
from tests.models import conftest as models
from tests.representatives import FULL, case
from tests.representatives import METHODS as REPRESENTATIVES

reference = models.reference  # a fixture, of tiny torch models


@dataclass(frozen=True)
class Subject:
    """A method on a model.

    Attributes:
        row: of the table.
        kind: of the model.
        scan: whether its layers are scanned.
    """

    row: Row
    kind: str
    scan: bool

    @property
    def method(self) -> Any:
        return self.row.method

    @functools.cached_property
    def loaded(self) -> Any:
        return load(self.kind, scan_layers=self.scan)

    @property
    def model(self) -> Any:
        return self.loaded[0]

    @property
    def base(self) -> Any:
        return self.loaded[1]

    @functools.cached_property
    def fresh(self) -> Any:
        """The rewritten tree."""
        return jaxpeft.rewrite(self.method, self.base, jax.random.key(0))

    @functools.cached_property
    def moved(self) -> Any:
        """The rewritten tree with every trained leaf moved, as training would."""
        return moved(self.method, self.fresh, size=self.row.moved)

    @functools.cached_property
    def mask(self) -> Any:
        return jaxpeft.trainable_mask(self.method, self.fresh)

    def logits(self, params: Any, **options: Any) -> np.ndarray[Any, Any]:
        """Return the logits of the real tokens."""
        out = np.asarray(run(self.model, params, **options))
        return out[BATCH.mask.astype(bool)] if out.ndim == 3 else out

    def batch(self) -> dict[str, Any]:
        """Return a training batch."""
        labels = (
            np.where(BATCH.mask, BATCH.ids, -100)
            if self.kind == "llama"
            else np.array([0, 1, 2], np.int32)
        )
        return {
            "input_ids": BATCH.ids,
            "attention_mask": BATCH.mask,
            "labels": labels.astype(np.int32),
            "weights": np.ones(3, np.float32),
        }

    @functools.cached_property
    def optimizer(self) -> Any:
        return training_hooks.wrap_optimizer(self.method, optax.adamw(1e-2), 3)

    @functools.cached_property
    def begun(self) -> Any:
        """The state before the first step, and the frozen part."""
        trainable, frozen = jaxpeft.partition(self.fresh, self.mask)
        return init_state(jax.tree.map(jnp.copy, trainable), self.optimizer, 0), frozen

    @functools.cached_property
    def _step(self) -> Any:
        task = self.model.options.task
        loss = loss_for(task, "single_label" if task == "sequence_classification" else None)
        return jax.jit(
            make_train_step(
                self.model, loss, self.optimizer, 1, partial(training_hooks.penalty, self.method)
            ),
            compiler_options=QUICK,
        )

    def step(self, state: Any, frozen: Any) -> Any:
        """Train one step; return the state and the figures."""
        return self._step(state, frozen, self.batch())

    @functools.cached_property
    def trained(self) -> Any:
        """Three steps: `(state, frozen, number of compiled programs)`."""
        state, frozen = self.begun
        metrics: Any = {}
        for _ in range(3):
            state, metrics = self.step(state, frozen)
        assert np.isfinite(float(metrics["loss"]))
        return state, frozen, self._step._cache_size()

    @functools.cached_property
    def after(self) -> Any:
        """The tree after three steps."""
        state, frozen, _ = self.trained
        return combine(state.trainable, frozen)


def moved(method: Any, params: Any, *, size: float = 0.2, seed: int = 0) -> Any:
    """Add noise to every trained leaf, to that part of a stacked one that its method made: padding
    stays zero.
    """
    rng = np.random.default_rng(seed)
    host: dict[Any, Any] = {}

    def add(path: Any, region: Any) -> None:
        leaf = host.setdefault(path, np.array(paths.get(params, path)))
        leaf[region] += size * rng.standard_normal(leaf[region].shape).astype(leaf.dtype)

    inside = {name for part in method.parts() for name in (*part.leaves.names, *part.leaves.root)}
    mask = dict(paths.walk(jaxpeft.trainable_mask(method, params)))
    for path, flag in mask.items():
        if flag and path[-1] not in inside:
            add(path, ...)
    for entry in tensors.find_adapted(method, params):
        for key, like in entry.fresh.items():
            path = (*entry.site.path, key)
            if mask[path]:
                add(path, (*(entry.index or ()), *(slice(0, n) for n in like.shape)))
    return paths.map_with_path(
        lambda path, leaf: jnp.asarray(host[path]) if path in host else leaf, params
    )


@functools.lru_cache(maxsize=8)
def subject_of(name: str, kind: str, scan: bool) -> Subject:
    return Subject(ROWS[name], kind, scan)


MAIN = {f"{name} {kind}" for name, kind in (("adapter", "houlsby"),)}
SUBJECTS = [
    pytest.param(name, kind, scan, id=f"{name}-{kind}-{'scanned' if scan else 'unrolled'}")
    for name, row in ROWS.items()
    # a variant of a method, "lora pissa", is tried on one model: what the models differ in was
    # tried with the method itself
    for kind in (row.models if name in METHODS or name in MAIN else row.models[:1])
    for scan in ((False, True) if row.scanned and (name in METHODS or name in MAIN) else (False,))
    # by default a decoder that is scanned and an encoder that is not; all four with
    # JAXPEFT_TESTS=full
    if FULL
    or len(row.models) == 1
    or not row.scanned
    or scan == (kind == DECODER)
    or name not in METHODS
]


# so that the tests of one subject run one after the other, and share what it has computed
@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest) -> Generator[Subject]:
    """One subject, whose tests run one after the other, and share what it has computed."""
    yield subject_of(*request.param)
    if not next(_COUNT) % 8:  # hundreds of compiled programs would fill gigabytes
        subject_of.cache_clear()
        jax.clear_caches()


_COUNT = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of one subject one after the other, whatever else they are parametrized by."""

    def subject_of_item(item: pytest.Item) -> tuple[int, str]:
        values = getattr(item, "callspec", None)
        given = values.params.get("subject") if values is not None else None
        return (0, "") if given is None else (1, str(given))

    here = str(Path(__file__).parent)
    places = [i for i, item in enumerate(items) if str(item.path).startswith(here)]
    for i, item in zip(
        places, sorted((items[i] for i in places), key=subject_of_item), strict=True
    ):
        items[i] = item


def every_subject(test: Any) -> Any:
    """Run a test on every method, model, and way to run the layers; `make test` on one of each kind
    of computation.
    """

    def quick(name: str, kind: str, scan: bool) -> bool:
        return REPRESENTATIVES.get(name) == kind and scan == (kind == DECODER)

    chosen = [case(str(p.id), p.values, quick=quick(*p.values)) for p in SUBJECTS]
    return pytest.mark.parametrize("subject", chosen, indirect=True)(test)


def subjects_in_turn(test: Any) -> Any:
    """Run a test on every method, in turn on the scanned decoder or the unrolled encoder."""
    turn = pytest.mark.alternatives("llama-scanned", "bert-unrolled", together=True)
    return turn(every_subject(test))


def every_method(*, scan: bool | None = None, kind: str | None = None) -> Any:
    """Run a test on every method, on one model and one way to run the layers; with
    JAXPEFT_TESTS=full on all, and on variants.

    Each needs programs of its own, whose compilation is most of the time of these tests.

    Args:
        scan: whether the layers are scanned; None for either.
        kind: of the model; None for either. A method that is not for it is tried on what it is for.
    """

    def wanted(values: Any) -> bool:
        name, of, scanned = values
        row = ROWS[name]
        tried = [p.values for p in SUBJECTS if p.values[0] == name]
        kinds = {kind} if kind in {v[1] for v in tried} else {v[1] for v in tried}
        scans = {scan} if scan in {v[2] for v in tried} else {v[2] for v in tried}
        if FULL:
            return True
        return (name in METHODS or name in MAIN) and (
            (of in kinds and scanned in scans) or not row.scanned
        )

    chosen = [
        case(str(p.id), p.values, quick=p.values[0] in REPRESENTATIVES)
        for p in SUBJECTS
        if wanted(p.values)
    ]
    return pytest.mark.parametrize("subject", chosen, indirect=True)
