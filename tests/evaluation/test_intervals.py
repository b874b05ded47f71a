"""Bootstrap intervals: those of scipy, the same for the same seed, and in pairs."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from jaxpeft.errors import ConfigError, DataError
from jaxpeft.evaluation.intervals import Bootstrap, Estimate, contrast, estimate, mean_of


@pytest.mark.parametrize(("kind", "method"), [("percentile", "percentile"), ("bca", "BCa")])
def test_an_interval_is_that_of_scipy(kind, method):
    scores = np.random.default_rng(0).exponential(size=40)
    found = estimate(mean_of({"score": scores}), 40, Bootstrap(500, 0.9, 3, kind))["score"]
    theirs = bootstrap(
        (scores,),
        np.mean,
        n_resamples=500,
        confidence_level=0.9,
        method=method,
        batch=64,
        rng=np.random.default_rng(3),
    ).confidence_interval
    assert found.value == pytest.approx(scores.mean())
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_the_same_seed_gives_the_same_intervals_and_another_others():
    statistic = mean_of({"score": np.random.default_rng(0).normal(size=30)})
    first, again, other = (estimate(statistic, 30, Bootstrap(seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_intervals_cover_the_mean_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        scores = rng.normal(size=50)
        one = estimate(mean_of({"x": scores}), 50, Bootstrap(200, 0.9))["x"]
        hits += one.low <= 0 <= one.high
    assert 0.8 < hits / 200 < 0.97


def test_a_difference_is_resampled_in_pairs():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=100)
    own, other = scores + 0.1 + 0.01 * rng.normal(size=100), scores
    one = contrast(mean_of({"x": own}), mean_of({"x": other}), 100, Bootstrap())["x"]
    assert one.difference.value == pytest.approx(one.own.value - one.other.value)
    # the rows vary by 1, their differences by 0.01
    assert one.difference.high - one.difference.low < 0.01 < one.own.high - one.own.low
    assert one.p == pytest.approx(2 / 1001)
    alike = contrast(mean_of({"x": own}), mean_of({"x": own}), 100, Bootstrap())["x"]
    assert alike.difference == Estimate(0.0, 0.0, 0.0)
    assert alike.p == 1.0


def test_metrics_of_both_models_alone_are_compared():
    scores = np.arange(5.0)
    found = contrast(mean_of({"a": scores, "b": scores}), mean_of({"b": scores}), 5, Bootstrap(10))
    assert list(found) == ["b"]


def test_a_constant_metric_has_an_interval_of_one_point_in_bca_too():
    statistic = mean_of({"one": np.ones(9), "x": np.arange(9.0)})
    found = estimate(statistic, 9, Bootstrap(kind="bca"))
    assert found["one"] == Estimate(1.0, 1.0, 1.0)
    assert found["x"].low < 4 < found["x"].high


def test_a_single_row_has_no_interval_and_no_rows_are_refused():
    statistic = mean_of({"x": np.array([2.0])})
    assert estimate(statistic, 1, Bootstrap()) == {"x": Estimate(2.0, None, None)}
    assert contrast(statistic, statistic, 1, Bootstrap())["x"].p is None
    with pytest.raises(DataError, match="there are no rows to evaluate"):
        estimate(statistic, 0, Bootstrap())


def test_options_out_of_range_are_listed():
    with pytest.raises(ConfigError) as error:
        Bootstrap(0, 1.0, -1)
    assert error.value.problems == (
        "resamples: must be at least 1, is 0",
        "level: must be above 0 and below 1, is 1.0",
        "seed: must be at least 0, is -1",
    )
