"""The measures against scipy, scikit-learn, brute force, and cases small enough to work out by hand."""

import itertools
import json
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import f1_score

from mfllm_ref import metrics
from mfllm_ref.metrics import dtw, f1, kl_divergence, total_variation, wasserstein
from mfllm_ref.society import agora
from mfllm_ref.society.annotate import annotate
from mfllm_ref.society.events import DIMENSIONS

quick = settings(derandomize=True, deadline=None, max_examples=60)
weights = st.integers(1, 7).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 50), min_size=n, max_size=n).filter(any)] * 2)
)


def evaluate(rows, *arguments, **options):
    return metrics.evaluate(metrics.collect(rows), *arguments, **options)


def normalised(values):
    return np.asarray(values) / np.sum(values)


# ---- contract functions


@quick
@given(weights)
def test_kl_equals_scipy(pair):
    """KL(p || q) in nats, also where it is infinite, is scipy's relative entropy; it is never negative, 0 for p = p."""
    p, q = pair
    assert kl_divergence(p, q) == pytest.approx(max(stats.entropy(p, q), 0), abs=1e-12)
    assert kl_divergence(normalised(p), normalised(q)) >= 0
    assert kl_divergence(p, p) == 0


def test_kl_by_hand():
    assert kl_divergence([0.5, 0.5], [0.25, 0.75]) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert kl_divergence([1, 0], [0.5, 0.5]) == pytest.approx(math.log(2))
    assert kl_divergence([0.5, 0.5], [1, 0]) == math.inf


@quick
@given(weights)
def test_wasserstein_equals_scipy(pair):
    """W1 with labels at equal distances on [0, 1] is scipy's; it is symmetric and at most the total variation."""
    p, q = pair
    places = np.linspace(0, 1, len(p))
    assert wasserstein(p, q) == pytest.approx(stats.wasserstein_distance(places, places, p, q), abs=1e-12)
    assert wasserstein(p, q) == pytest.approx(wasserstein(q, p), abs=1e-15)
    assert wasserstein(p, q) <= total_variation(p, q) + 1e-12


def test_wasserstein_by_hand():
    assert wasserstein([1, 0, 0], [0, 0, 1]) == 1
    assert wasserstein([1, 0, 0], [0, 1, 0]) == 0.5
    assert wasserstein([0.25, 0.75], [0.75, 0.25]) == 0.5 == total_variation([0.25, 0.75], [0.75, 0.25])
    assert total_variation([1, 0, 0], [0, 1, 0]) == 1


@pytest.mark.parametrize("measure", [kl_divergence, wasserstein, total_variation])
@pytest.mark.parametrize(
    "p, q",
    [
        ([0.5, 0.5], [1.0]),
        ([0.5, -0.5], [0.5, 0.5]),
        ([0.5, float("nan")], [0.5, 0.5]),
        ([0.5, 0.5], [0.5, float("inf")]),
        ([0, 0], [0.5, 0.5]),
        ([0.5, 0.5], [0, 0]),
        ([], []),
        ([[0.5, 0.5]], [[0.5, 0.5]]),
        (1.0, 1.0),
        ([1e308, 1e308], [0.5, 0.5]),
        ([0.5, 0.5], ["a", "b"]),
    ],
)
def test_what_is_no_distribution_is_refused(measure, p, q):
    with pytest.raises(ValueError):
        measure(p, q)


def brute_dtw(x, y):
    """The cheapest of all warping paths, cell by cell."""
    x, y = (np.asarray(side, float).reshape(len(side), -1) for side in (x, y))
    best = {}
    for i, j in itertools.product(range(len(x)), range(len(y))):
        before = [best[cell] for cell in ((i - 1, j), (i, j - 1), (i - 1, j - 1)) if cell in best]
        best[i, j] = np.abs(x[i] - y[j]).sum() + (min(before) if before else 0)
    return best[len(x) - 1, len(y) - 1] / (len(x) + len(y))


series = st.lists(st.integers(0, 9), min_size=1, max_size=9)


@quick
@given(series, series)
def test_dtw_is_the_cheapest_path(x, y):
    """The distance is that of the best warping path; it is symmetric, and staying longer at a moment costs nothing."""
    assert dtw(x, y) == pytest.approx(brute_dtw(x, y))
    assert dtw(x, y) == pytest.approx(dtw(y, x))
    assert dtw([value for value in x for _ in range(2)], x) == 0
    columns, other = np.stack([np.array(x), np.array(x) * 2], 1), np.stack([np.array(y), np.array(y) + 1], 1)
    assert dtw(columns, other) == pytest.approx(brute_dtw(columns, other))


def test_dtw_of_a_long_event_needs_memory_linear_in_its_length():
    x = np.random.default_rng(0).random((2, 600, 3))
    tracemalloc.start()
    dtw(*x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * x.nbytes  # one 600 by 600 table would be 100 times x


def test_dtw_by_hand():
    assert dtw([0, 0, 1], [0, 1, 1]) == 0
    assert dtw([0], [1, 1]) == pytest.approx(2 / 3)
    assert dtw([[1, 0]], [[0, 1]]) == pytest.approx(2 / 2)


@pytest.mark.parametrize(
    "x, y", [([], [1]), ([1], []), ([1, math.nan], [1]), ([1], [[1]]), ([[1, 2]], [[1]]), (1, 1), ([[[1]]], [[[1]]])]
)
def test_dtw_refuses_what_is_no_pair_of_trajectories(x, y):
    with pytest.raises(ValueError):
        dtw(x, y)


@quick
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("bcde")), min_size=1, max_size=30))
def test_f1_equals_scikit_learn(pairs):
    """Macro and micro F1 are scikit-learn's, also for labels that only one side has."""
    true, pred = zip(*pairs)
    for average in ("macro", "micro"):
        theirs = f1_score(true, pred, average=average, zero_division=0)
        assert f1(true, pred, average=average) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("arguments", [([], []), (["a"], ["a", "b"]), (["a"], ["a"], "weighted")])
def test_f1_refuses(arguments):
    with pytest.raises(ValueError):
        f1(*arguments)


# ---- windows, rows, evaluate

TAILS = [(1, [1]), (30, [30]), (100, [100]), (149, [149]), (150, [100, 50]), (349, [100, 100, 149])]


@pytest.mark.parametrize("count, sizes", TAILS)
def test_a_tail_under_half_a_window_joins_the_one_before(count, sizes):
    ids = metrics.windows(count, 100)
    assert [count for _, count in sorted(Counter(ids.tolist()).items())] == sizes
    assert (np.diff(ids) >= 0).all()


def full(stance):
    """All eight labels: belief follows stance, the other dimensions are fixed."""
    fixed = {name: labels[0] for name, labels in DIMENSIONS.items()}
    return {**fixed, "stance": stance, "belief_degree": "believe" if stance == "support" else "doubt"}


def make_rows(event, method, simulated, real, seed=0, warmup=2):
    rows = []
    for index, (ours, theirs) in enumerate(zip(["neutral"] * warmup + simulated, ["neutral"] * warmup + real)):
        phase = "warmup" if index < warmup else "rollout"
        rows.append({
            "event": event, "method": method, "seed": seed, "step": index // 10, "index": index, "agent": f"a{index}",
            "phase": phase, "text": "x", "real_text": "y", "labels": full(ours), "real_labels": full(theirs),
        })  # fmt: skip
    return rows


def stances(rng, count, p):
    return rng.choice(["support", "oppose", "neutral"], size=count, p=p).tolist()


def pick(rows, event, method, seed):
    return [r for r in rows if (r["event"], r["method"], r["seed"], r["phase"]) == (event, method, seed, "rollout")]


@pytest.fixture(scope="module")
def society():
    """Three events of 260 rollout actions, two seeds, three methods: mf-llm near the truth, state far from it."""
    rng = np.random.default_rng(1)
    truth = {event: stances(rng, 260, [0.6, 0.3, 0.1]) for event in ("e1", "e2", "e3")}
    rows = []
    for method, p in {"state": [0.2, 0.2, 0.6], "recent": [0.4, 0.4, 0.2], "mf-llm": [0.6, 0.3, 0.1]}.items():
        for event, seed in itertools.product(truth, (0, 1)):
            rows += make_rows(event, method, stances(rng, 260, p), truth[event], seed)
    return rows, {"e1": "news", "e2": "news", "e3": "health"}


def test_evaluate_follows_the_definitions_word_for_word(society):
    """Each number once more, from the rows, with the public functions and plain loops."""
    rows, domains = society
    result = evaluate(rows, domains, nll={"state": 1.5})

    def counts(items, add=0.0):
        return np.array([items.count(label) + add for label in ("oppose", "neutral", "support")])

    expected = {measure: [] for measure in metrics.MEASURES}
    for event, seed in itertools.product(domains, (0, 1)):
        mine = pick(rows, event, "state", seed)
        real, ours = ([row[side]["stance"] for row in mine] for side in ("real_labels", "labels"))
        parts = [slice(0, 100), slice(100, 200), slice(200, 260)]
        paths = [[normalised(counts(side[k : k + 20])) for k in range(0, 260, 20)] for side in (real, ours)]
        expected["kl"].append(np.mean([kl_divergence(counts(real[s], 0.5), counts(ours[s], 0.5)) for s in parts]))
        expected["wasserstein"].append(np.mean([wasserstein(counts(real[s]), counts(ours[s])) for s in parts]))
        expected["dtw"].append(dtw(*paths))
        expected["macro_f1"].append(f1(real, ours, average="macro"))
        expected["micro_f1"].append(f1(real, ours, average="micro"))
    for measure, values in expected.items():
        assert result["methods"]["state"][measure]["stance"] == pytest.approx(np.mean(values), abs=1e-12)
    for entry in result["methods"].values():
        for measure in metrics.MEASURES:
            kept = [entry[measure]["stance"], entry[measure]["belief_degree"]]
            assert entry[measure]["mean"] == pytest.approx(np.mean(kept), abs=1e-12)
        assert entry["kl_ci95"][0] <= entry["kl"]["mean"] <= entry["kl_ci95"][1]
    assert set(result["excluded_dimensions"]) == set(DIMENSIONS) - {"stance", "belief_degree"}
    assert result["excluded_dimensions"]["rumor"] == 0


def test_comparisons_with_rivals_floor_and_domains(society):
    rows, domains = society
    result = evaluate(rows, domains, nll={"state": 1.5})
    kl = {method: entry["kl"]["mean"] for method, entry in result["methods"].items()}
    assert kl["mf-llm"] < kl["recent"] < kl["state"]
    assert result["reduction"] == {m: pytest.approx(1 - kl["mf-llm"] / kl[m]) for m in ("state", "recent")}
    floor = result["floor"]["mean"]
    assert result["gap_closed"]["state"] == pytest.approx((kl["state"] - kl["mf-llm"]) / (kl["state"] - floor))
    assert result["methods"]["state"]["nll"] == 1.5 and result["methods"]["recent"]["nll"] is None
    assert "nll.recent" in result["notes"] and "nll.state" not in result["notes"]
    by_event = result["kl_by_event"]["state"]
    assert result["by_domain"]["news"]["events"] == 2
    assert result["by_domain"]["news"]["methods"]["state"] == pytest.approx((by_event["e1"] + by_event["e2"]) / 2)
    json.dumps(result, allow_nan=False)


def test_a_rival_at_the_floor_leaves_no_gap_to_close(society):
    """Where the rival is not above the floor the closed fraction has no meaning: null and a note."""
    rows, domains = society
    high = {event: np.full(len(DIMENSIONS), 9.0) for event in domains}
    result = evaluate(rows, domains, floors=high)
    assert result["gap_closed"] == {"state": None, "recent": None} and "gap_closed.state" in result["notes"]
    assert result["reduction"]["state"] > 0


def test_only_the_labels_of_rollout_rows_count(society):
    """Rows of one world may come in any order; what a warm-up row holds changes nothing; rows may be read only once."""
    rows, domains = society
    first = evaluate(rows, domains)
    shuffled = [rows[k] for k in np.random.default_rng(0).permutation(len(rows))]
    mixed = sorted(shuffled, key=lambda row: (list(first["methods"]).index(row["method"]), row["event"], row["seed"]))
    assert evaluate(mixed, domains) == first
    assert evaluate([dict(row, labels={}) if row["phase"] == "warmup" else row for row in rows], domains) == first
    assert evaluate(iter(rows), domains) == first


def test_without_ours_or_a_second_event_fields_are_empty_and_say_why(society):
    rows, domains = society
    result = evaluate([row for row in rows if row["event"] == "e1" and row["method"] != "mf-llm"], domains)
    assert result["methods"]["state"]["kl_ci95"] is None and {"kl_ci95", "difference"} <= set(result["notes"])
    assert result["reduction"] == {} == result["gap_closed"] and "reduction" in result["notes"]


def test_methods_are_scored_on_the_events_they_share(society):
    """An event that one method lacks is left out for all, and noted."""
    rows, domains = society
    part = [row for row in rows if (row["event"], row["method"]) != ("e2", "recent")]
    result, whole = evaluate(part, domains), evaluate([r for r in rows if r["event"] != "e2"], domains)
    assert result["methods"] == whole["methods"] and "events" in result["notes"]
    with pytest.raises(ValueError, match="no event"):
        evaluate([row for row in rows if (row["event"] == "e1") == (row["method"] == "state")], domains)


def test_nothing_left_in_the_mean_is_null_with_a_reason():
    """When the real labels say nothing in any dimension every mean is null, and no number is invented."""
    rows = [row for event in "ab" for row in make_rows(event, "mf-llm", ["support", "oppose"] * 20, ["support"] * 40)]
    rows += [row for event in "ab" for row in make_rows(event, "state", ["oppose"] * 40, ["support"] * 40)]
    result = evaluate(rows, {"a": "news", "b": "news"})
    assert set(result["excluded_dimensions"]) == set(DIMENSIONS)
    assert result["methods"]["state"]["kl"]["mean"] is None and "mean" in result["notes"]
    assert result["methods"]["state"]["kl"]["stance"] > 0
    json.dumps(result, allow_nan=False)


def test_bad_rows_are_refused(society):
    rows, _ = society
    with pytest.raises(ValueError, match="twice"):
        metrics.collect(rows + rows[-1:])
    with pytest.raises(ValueError, match="event e3, method mf-llm.*maybe"):
        metrics.collect([dict(rows[-1], labels={**rows[-1]["labels"], "stance": "maybe"})])


# ---- floors


def test_known_floors_replace_the_split_halves(society):
    """With the true continuation given, the floor is the KL between the two, by the windows of every other KL."""
    rows, domains = society
    mine = pick(rows, "e1", "state", 0)
    real, ours = (metrics.encode(row[side] for row in mine) for side in ("real_labels", "labels"))
    between = metrics.kl_between(real, ours)
    alone = evaluate([r for r in rows if (r["event"], r["method"], r["seed"]) == ("e1", "state", 0)], domains)
    assert between.tolist() == [alone["methods"]["state"]["kl"][name] for name in metrics.LABELS]
    result = evaluate(rows, domains, floors={event: between for event in domains})
    assert [result["floor"][name] for name in metrics.LABELS] == pytest.approx(between)
    assert evaluate(rows, domains)["floor"]["stance"] < 0.05 < result["floor"]["stance"]
    with pytest.raises(ValueError):
        metrics.kl_between(real, ours[:0])


def test_split_half_floor_is_the_kl_of_sampling_alone():
    """Half the KL of two halves is, on average, the KL of two whole independent samples (it falls as 1/n).

    Both are near (labels - 1) / n for a window of n: (labels - 1) / 2 times the sum of the two sides' 1/n.
    """
    rng = np.random.default_rng(0)
    stance = list(metrics.LABELS).index("stance")
    half, whole = [], []
    for seed in range(60):
        real, other = (metrics.encode(map(full, stances(rng, 200, [0.5, 0.3, 0.2]))) for _ in range(2))
        half.append(metrics.split_half_floor(real, seed)[stance])
        whole.append(metrics.kl_between(real, other)[stance])
    assert np.mean(half) == pytest.approx(2 / 100, rel=0.2)
    assert np.mean(whole) == pytest.approx(2 / 100, rel=0.2)


def redrawn(here, stances, seed):
    """Label codes of the actions after the warm-up, each drawn again by the same agent who saw the same opinion."""
    noise = agora.generator(here.id, "redrawn", seed).random((agora.ACTIONS, agora.NOISE))
    actions = []
    for start in range(agora.WARMUP, agora.ACTIONS, agora.UPDATE):
        opinion, pending = agora.listen(here, here.first_opinion, stances[:start])
        actions += agora.proceed(here, start, opinion, pending, noise[start:], start + agora.UPDATE)
    return coded(actions)


def coded(actions):
    return metrics.encode(annotate(action.text, "en") for action in actions)


def test_the_split_half_rule_holds_on_agora():
    """Where the true probabilities of every action are known, two draws from them differ by what split halves say.

    The floor of a known process is higher, never lower: a second continuation also drifts away from the first.
    """
    half, whole, floor = [], [], []
    for index in range(14):  # each domain twice
        event, here = agora.event("dev", index), agora.world("dev", index)
        stances = [agora.STANCES.index(action.labels["stance"]) for action in event.actions]
        real = coded(event.actions[agora.WARMUP :])
        half.append(metrics.split_half_floor(real, index))
        whole += [metrics.kl_between(redrawn(here, stances, k), redrawn(here, stances, k + 1)) for k in (0, 2)]
        others = (agora.true_rollout(event, agora.WARMUP, None, seed)[agora.WARMUP :] for seed in (0, 1))
        floor += [metrics.kl_between(real, coded(other)) for other in others]
    assert np.mean(half) == pytest.approx(np.mean(whole), rel=0.15)
    assert np.mean(floor) > 1.2 * np.mean(half)


def test_an_events_floor_does_not_depend_on_the_other_events(society):
    rows, domains = society
    alone = evaluate([row for row in rows if row["event"] == "e3"], domains)
    assert evaluate(rows, domains)["by_domain"]["health"]["floor"] == alone["floor"]["mean"]
