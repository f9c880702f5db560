"""Comparisons of runs: paired differences over events, and what an intervention changed."""

import numpy as np
import pytest

from mfllm_ref import metrics
from mfllm_ref.society.events import DIMENSIONS


def full(stance):
    """All eight labels: belief follows stance, the other dimensions are fixed."""
    fixed = {name: labels[0] for name, labels in DIMENSIONS.items()}
    return {**fixed, "stance": stance, "belief_degree": "believe" if stance == "support" else "doubt"}


def test_paired_bootstrap_finds_a_shift_under_common_noise():
    """What both sides share cancels: the interval is that of the differences, over the events both have."""
    rng = np.random.default_rng(0)
    common = {f"e{k}": value for k, value in enumerate(rng.normal(0, 10, 50))}
    a = {event: value + 0.5 + noise for (event, value), noise in zip(common.items(), rng.normal(0, 0.1, 50))}
    result = metrics.paired_bootstrap({**a, "alone": 99.0}, common)
    assert result["events"] == 50 and result["difference"] == pytest.approx(0.5, abs=0.05)
    assert result["ci95"][0] < result["difference"] < result["ci95"][1]
    assert 0.035 < result["ci95"][1] - result["ci95"][0] < 0.08  # 2 * 1.96 * 0.1 / sqrt(50) = 0.055
    assert metrics.paired_bootstrap(a, common) == metrics.paired_bootstrap(a, common)
    assert metrics.paired_bootstrap({"e0": 1.0}, common)["ci95"] is None
    with pytest.raises(ValueError):
        metrics.paired_bootstrap({}, common)


def test_share_changes_are_differences_of_shares_that_worlds_weigh_alike():
    """Each world's difference counts once, whatever its length; where nothing changed every difference is zero."""
    actions = (["support"] * 30, ["support"] * 15 + ["oppose"] * 15, ["oppose"] * 10)
    all_for, half, against = (metrics.encode(map(full, labels)) for labels in actions)
    changes = metrics.share_changes([("state", all_for, half), ("recent", half, half)])
    assert changes["state"]["stance"] == {"oppose": -0.5, "neutral": 0, "support": 0.5}
    assert set(changes["state"]) == set(DIMENSIONS)
    assert all(value == 0 for shares in changes["recent"].values() for value in shares.values())
    both = metrics.share_changes([("state", all_for, half), ("state", against, against)])
    assert both["state"]["stance"] == {"oppose": -0.25, "neutral": 0, "support": 0.25}
    assert metrics.share_changes([]) == {}
