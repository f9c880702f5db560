"""Numbers about label distributions and label trajectories (DESIGN section 6). numpy only; knows no language model.

Notable: the four contract functions come first and check what they are given; `evaluate` uses the same arithmetic on
counts. Rows are read once and kept as one byte a label, so the memory of a long run is that of its codes, not its
texts. Every measure is taken per event, seed and dimension, then averaged over dimensions, seeds and events in that
order; the interval resamples events, the unit that is independent, and the same draws serve every method.
"""

import zlib
from array import array
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from mfllm_ref.society.events import DIMENSIONS

OURS = "mf-llm"  # the method that `reduction` and `gap_closed` compare with each rival
WINDOW, SHARE_WINDOW = 100, 20  # actions: windows of KL and W1, windows of a share trajectory (DTW, pictures)
SMOOTHING = 0.5  # added to every label's count, on both sides
MIN_ENTROPY = 0.05  # nats; a dimension whose real labels have less says nothing and leaves the means
MEASURES = ("kl", "wasserstein", "dtw", "macro_f1", "micro_f1")

_ORDERED = {"sentiment_tendency": ("negative", "neutral", "positive"), "stance": ("oppose", "neutral", "support")}
LABELS: dict[str, tuple[str, ...]] = {name: _ORDERED.get(name, labels) for name, labels in DIMENSIONS.items()}
_CODES = {name: {label: code for code, label in enumerate(labels)} for name, labels in LABELS.items()}


# ---- the contract functions ----------------------------------------------------------------------------------------


def kl_divergence(p: ArrayLike, q: ArrayLike) -> float:
    """KL(p || q) in nats of two distributions over the same labels, each [labels] and normalised here.

    0 log 0 = 0; infinite where q is 0 and p is not (nothing is smoothed here: `evaluate` smooths counts).
    ValueError for a negative or non-finite entry, unequal lengths, or a sum that is zero.
    """
    return float(_kl(*_pair(p, q)))


def wasserstein(p: ArrayLike, q: ArrayLike) -> float:
    """W1 of two distributions, each [labels], whose labels lie at equal distances on [0, 1] (3 labels: 0, 0.5, 1).

    For unordered labels see `total_variation`; for two labels the two agree. Errors as in `kl_divergence`.
    """
    return float(_w1(*_pair(p, q)))


def total_variation(p: ArrayLike, q: ArrayLike) -> float:
    """Half the L1 distance of two distributions, each [labels]. Errors as in `kl_divergence`."""
    return float(_tv(*_pair(p, q)))


def dtw(x: ArrayLike, y: ArrayLike) -> float:
    """Dynamic time warping distance of two trajectories, each [time] or [time, labels]; lengths may differ.

    L1 cost, steps (1,0), (0,1), (1,1), the total divided by len(x) + len(y). ValueError for an empty trajectory, a
    non-finite entry, or shapes that do not belong together.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim not in (1, 2) or x.ndim != y.ndim or x.shape[1:] != y.shape[1:]:
        raise ValueError(f"dtw needs two trajectories [time] or [time, labels], not shapes {x.shape} and {y.shape}")
    if not len(x) or not len(y):
        raise ValueError("dtw of an empty trajectory")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("dtw of a trajectory that holds NaN or infinity")
    return float(_dtw(_cost(x.reshape(len(x), -1), y.reshape(len(y), -1))))


def f1(true: Sequence[Hashable], pred: Sequence[Hashable], average: str = "macro") -> float:
    """F1 of predicted against true labels, each [items]; the labels are those that occur in either.

    "macro": mean of the labels' F1 (a label never predicted, or never true, has 0); "micro": F1 of the pooled counts,
    here the accuracy. ValueError for no items, unequal lengths or another average.
    """
    true, pred = list(true), list(pred)
    if len(true) != len(pred) or not true:
        raise ValueError(f"f1 needs as many predicted as true labels, at least one: got {len(pred)} and {len(true)}")
    if average not in ("macro", "micro"):
        raise ValueError(f"f1 average must be 'macro' or 'micro', not {average!r}")
    codes = {label: code for code, label in enumerate(dict.fromkeys(true + pred))}
    confusion = np.zeros((len(codes), len(codes)), dtype=np.int64)
    np.add.at(confusion, ([codes[label] for label in true], [codes[label] for label in pred]), 1)
    return _f1(confusion, average)


def _pair(p: ArrayLike, q: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    pair = []
    for name, values in (("p", p), ("q", q)):
        values = np.asarray(values, dtype=np.float64)
        if values.ndim != 1:
            raise ValueError(f"{name} must have one axis (labels), not shape {values.shape}")
        if not np.isfinite(values).all() or (values < 0).any():
            raise ValueError(f"{name} holds a negative or non-finite entry")
        with np.errstate(over="ignore"):
            total = values.sum()
        if not 0 < total < np.inf:
            raise ValueError(f"{name} sums to {total}: not a distribution")
        pair.append(values / total)
    if pair[0].shape != pair[1].shape:
        raise ValueError(f"p has {len(pair[0])} labels and q {len(pair[1])}")
    return pair[0], pair[1]


# ---- the same arithmetic on many distributions at once; labels are the last axis -----------------------------------


def _kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0)
    return np.maximum(terms.sum(-1), 0.0)  # rounding may leave -1e-17


def _w1(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.abs(np.cumsum(p - q, -1)[..., :-1]).sum(-1) / max(p.shape[-1] - 1, 1)


def _tv(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.abs(p - q).sum(-1) / 2


def _cost(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """L1 distance [len(x), len(y)] between the moments of two trajectories [time, labels]."""
    return sum(np.abs(x[:, None, label] - y[None, :, label]) for label in range(x.shape[1]))


def _dtw(cost: np.ndarray) -> np.ndarray:
    """Distance [...] of pairs of trajectories given by their costs [..., rows, columns]."""
    rows, columns = cost.shape[-2:]
    total = np.full((*cost.shape[:-2], rows + 1, columns + 1), np.inf)
    total[..., 0, 0] = 0.0
    for diagonal in range(rows + columns - 1):  # the cells of one anti-diagonal do not depend on each other
        i = np.arange(max(0, diagonal - columns + 1), min(rows, diagonal + 1))
        j = diagonal - i
        before = np.minimum(np.minimum(total[..., i, j + 1], total[..., i + 1, j]), total[..., i, j])
        total[..., i + 1, j + 1] = cost[..., i, j] + before
    return total[..., rows, columns] / (rows + columns)


def _f1(confusion: np.ndarray, average: str) -> float:
    hits, items = np.diagonal(confusion), confusion.sum(0) + confusion.sum(1)  # 2 tp + fp + fn = true + predicted
    if average == "micro":
        return float(2 * hits.sum() / items.sum())
    return float((2 * hits[items > 0] / items[items > 0]).mean())


# ---- from trajectory rows to counts --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trajectory:
    """Labels of one world's rollout actions in order: int8 [actions, dimensions], codes into LABELS."""

    simulated: np.ndarray
    real: np.ndarray


Worlds = dict[tuple[str, str, int], Trajectory]  # (event, method, seed)


def collect(rows: Iterable[Mapping]) -> Worlds:
    """The rollout labels of trajectory rows (DESIGN section 3); ValueError for a label or an order that cannot be."""
    found: dict[tuple[str, str, int], tuple[array, bytearray, bytearray]] = {}
    for row in rows:
        if row["phase"] != "rollout":
            continue
        key = (row["event"], row["method"], row["seed"])
        index, simulated, real = found.setdefault(key, (array("q"), bytearray(), bytearray()))
        try:
            codes = [bytes(_CODES[name][row[side][name]] for name in LABELS) for side in ("labels", "real_labels")]
        except KeyError as error:
            raise ValueError(f"event {key[0]}, method {key[1]}, action {row['index']}: no label {error}") from None
        index.append(row["index"])
        simulated += codes[0]
        real += codes[1]
    worlds = {}
    for key, (index, simulated, real) in found.items():
        order = np.argsort(np.frombuffer(index, dtype=np.int64), kind="stable")
        if (np.diff(np.frombuffer(index, dtype=np.int64)[order]) == 0).any():
            raise ValueError(f"event {key[0]}, method {key[1]}, seed {key[2]}: an action appears twice")
        sides = [np.frombuffer(side, dtype=np.int8).reshape(-1, len(LABELS))[order] for side in (simulated, real)]
        worlds[key] = Trajectory(*sides)
    return worlds


def windows(count: int, size: int) -> np.ndarray:
    """Window number of each of `count` actions, int64 [count]: windows of `size`, no overlap; a tail under half a
    window joins the window before it, if there is one."""
    ids = np.arange(count) // size
    return np.minimum(ids, count // size - 1) if count >= size and 2 * (count % size) < size else ids


def _shares(codes: np.ndarray) -> list[np.ndarray]:
    """Label shares [labels] of each dimension of codes [actions, dimensions], actions > 0."""
    return [np.bincount(codes[:, k], minlength=len(names)) / len(codes) for k, names in enumerate(LABELS.values())]


def _counts(codes: np.ndarray, labels: int, ids: np.ndarray) -> np.ndarray:
    """Label counts [windows, labels] of codes [actions] whose windows are ids [actions]."""
    size = int(ids[-1]) + 1 if len(ids) else 0
    return np.bincount(ids * labels + codes, minlength=size * labels).reshape(size, labels)


def _smoothed(counts: np.ndarray) -> np.ndarray:
    return (counts + SMOOTHING) / (counts.sum(-1, keepdims=True) + SMOOTHING * counts.shape[-1])


def _scores(trajectory: Trajectory) -> np.ndarray:
    """All MEASURES of one world, float64 [measures, dimensions], each the mean over its windows."""
    scores = {measure: np.empty(len(LABELS)) for measure in MEASURES}
    long, short = (windows(len(trajectory.real), size) for size in (WINDOW, SHARE_WINDOW))
    costs = []
    for column, (name, labels) in enumerate(LABELS.items()):
        real, simulated = trajectory.real[:, column], trajectory.simulated[:, column]
        size, confusion = len(labels), np.zeros((len(labels), len(labels)), dtype=np.int64)
        counts = [_counts(side, size, long) for side in (real, simulated)]
        distance = _w1 if size == 2 or name in _ORDERED else _tv
        scores["kl"][column] = _kl(*map(_smoothed, counts)).mean()
        scores["wasserstein"][column] = distance(*(side / side.sum(-1, keepdims=True) for side in counts)).mean()
        paths = [_counts(side, size, short) for side in (real, simulated)]
        costs.append(_cost(*(path / path.sum(-1, keepdims=True) for path in paths)))
        np.add.at(confusion, (real, simulated), 1)
        scores["macro_f1"][column], scores["micro_f1"][column] = _f1(confusion, "macro"), _f1(confusion, "micro")
    scores["dtw"] = _dtw(np.stack(costs))
    return np.stack(list(scores.values()))


def encode(labels: Sequence[Mapping[str, str]]) -> np.ndarray:
    """Codes int8 [actions, dimensions] of a sequence of labels."""
    return np.array([[_CODES[name][item[name]] for name in LABELS] for item in labels], dtype=np.int8)


def kl_between(real: Sequence[Mapping[str, str]], other: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """KL(real || other) in nats per dimension of two label sequences of equal length, as `evaluate` takes it.

    With another continuation of the true process as `other` this is the event's floor. ValueError for unequal lengths.
    """
    if len(real) != len(other) or not real:
        raise ValueError(f"kl_between needs two label sequences of one length, not {len(real)} and {len(other)}")
    scores = _scores(Trajectory(simulated=encode(other), real=encode(real)))
    return dict(zip(LABELS, scores[0].tolist()))


def split_half_floor(real: np.ndarray, seed: int | Sequence[int] = 0, splits: int = 20) -> np.ndarray:
    """The floor where the true process is unknown, [dimensions]: half the KL between two random halves of each real
    window (sampling KL falls as 1/n), mean over windows and `splits`. real: codes [actions, dimensions]."""
    rng, ids = np.random.default_rng(seed), windows(len(real), WINDOW)
    total = np.zeros(len(LABELS))
    for _ in range(splits):
        half = np.empty(len(real), dtype=np.int64)
        for window in range(ids[-1] + 1):
            members = rng.permutation(np.flatnonzero(ids == window))
            half[members] = 2 * window + (np.arange(len(members)) >= len(members) // 2)
        for column, labels in enumerate(LABELS.values()):
            counts = np.bincount(half * len(labels) + real[:, column], minlength=2 * (ids[-1] + 1) * len(labels))
            halves = _smoothed(counts.reshape(-1, 2, len(labels)))
            total[column] += _kl(halves[:, 0], halves[:, 1]).mean() / 2
    return total / splits


# ---- metrics.json --------------------------------------------------------------------------------------------------


def _resampled(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means over resampled events, [resamples, ...], of values [..., events]; one draw serves all leading axes."""
    rng, events = np.random.default_rng(seed), values.shape[-1]
    return np.stack([values[..., rng.integers(events, size=events)].mean(-1) for _ in range(resamples)])


def paired_bootstrap(a: Mapping[str, float], b: Mapping[str, float], resamples: int = 2000, seed: int = 0) -> dict:
    """Mean of a - b over the events both hold (values by event id), with its 95% interval over resampled events:
    {"difference", "ci95": [lo, hi] or None for under two events, "events"}. ValueError where they share no event."""
    shared = [event for event in a if event in b]
    if not shared:
        raise ValueError("paired_bootstrap: no event in common")
    gap = np.array([a[event] - b[event] for event in shared])
    interval = np.percentile(_resampled(gap, resamples, seed), (2.5, 97.5)).tolist() if len(gap) > 1 else None
    return {"difference": float(gap.mean()), "ci95": interval, "events": len(gap)}


def evaluate(
    rows: Iterable[Mapping] | Worlds,
    domains: Mapping[str, str],
    floors: Mapping[str, Mapping[str, float]] | None = None,
    nll: Mapping[str, float | None] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict:
    """What metrics.json holds (DESIGN section 3), from trajectory rows or from what `collect` made of them.

    domains: event id -> domain. floors: event id -> dimension -> KL, where the true process is known (`kl_between`);
    other events get the split-half floor. nll: method -> nats per token, or None. Every method is scored on the events
    that all of them have. The entropy that excludes a dimension is that of its real labels pooled over the rollout
    actions of these events, each action once; its values are still given, but no mean holds them. "by_domain" is
    {DOMAIN: {"events": n, "floor": x, "methods": {METHOD: mean KL}}}; beyond the contract, "kl_by_event" {METHOD:
    {EVENT: mean KL}} is for paired comparisons and "notes" says why a field is null. ValueError for nothing to score.
    """
    worlds: Worlds = rows if isinstance(rows, dict) else collect(rows)
    methods = list(dict.fromkeys(method for _, method, _ in worlds))
    runs: dict[tuple[str, str], list[Trajectory]] = {}
    for (event, method, _), trajectory in worlds.items():
        runs.setdefault((event, method), []).append(trajectory)
    every = list(dict.fromkeys(event for event, _ in runs))
    events = [event for event in every if all((event, method) in runs for method in methods)]
    if not events:
        raise ValueError("nothing to evaluate: no event has rollout actions under every method")
    notes: dict[str, str] = {}
    if len(events) < len(every):
        notes["events"] = f"{len(every) - len(events)} of {len(every)} events left out: not every method has them"

    # scores [methods, events, measures, dimensions], floor [events, dimensions]
    scores = np.array([[np.mean([_scores(run) for run in runs[e, m]], axis=0) for e in events] for m in methods])
    reals = [runs[event, methods[0]][0].real for event in events]
    floor = np.empty((len(events), len(LABELS)))
    for row, (event, real) in enumerate(zip(events, reals)):
        known = (floors or {}).get(event)
        # seeded by the event's own name, so that its floor does not depend on which other events are there
        by_name = (seed, zlib.crc32(event.encode("utf-8", "surrogatepass")))
        floor[row] = [known[name] for name in LABELS] if known else split_half_floor(real, by_name)

    entropy = [float(-sum(x * np.log(x) for x in share if x > 0)) for share in _shares(np.concatenate(reals))]
    excluded = {name: max(value, 0.0) for name, value in zip(LABELS, entropy) if value < MIN_ENTROPY}
    kept = np.array([name not in excluded for name in LABELS])
    if not kept.any():
        notes["mean"] = f"null: the real labels of every dimension have under {MIN_ENTROPY} nats of entropy"

    def mean(values: np.ndarray) -> float | None:  # [..., dimensions], over the kept ones
        return float(values[..., kept].mean()) if kept.any() else None

    def by_dimension(values: np.ndarray) -> dict[str, float | None]:  # [events, dimensions]
        return {"mean": mean(values), **dict(zip(LABELS, values.mean(0).tolist()))}

    kl = scores[:, :, MEASURES.index("kl")]
    intervals: list[list[float] | None] = [None] * len(methods)
    if len(events) > 1 and kept.any():
        draws = _resampled(kl[:, :, kept].mean(-1), resamples, seed)
        intervals = np.percentile(draws, (2.5, 97.5), axis=0).T.tolist()
    else:
        notes["kl_ci95"] = "null: an interval over events needs two events and one dimension in the mean"
    table: dict[str, dict] = {}
    for row, method in enumerate(methods):
        measures = {measure: by_dimension(scores[row, :, column]) for column, measure in enumerate(MEASURES)}
        given = (nll or {}).get(method)
        if given is None:
            notes[f"nll.{method}"] = "null: the method has no language model, or none was scored"
        table[method] = {"kl": measures.pop("kl"), "kl_ci95": intervals[row], **measures, "nll": given}

    bottom, reduction, gap_closed = mean(floor), {}, {}
    if OURS in methods and kept.any():
        ours = table[OURS]["kl"]["mean"]
        for rival in (method for method in methods if method != OURS):
            theirs = table[rival]["kl"]["mean"]
            reduction[rival] = 1 - ours / theirs if theirs > 0 else None
            gap_closed[rival] = (theirs - ours) / (theirs - bottom) if theirs > bottom else None
            if theirs <= bottom:
                notes[f"gap_closed.{rival}"] = "null: the rival's KL is not above the floor: no gap to close"
    else:
        notes["reduction"] = notes["gap_closed"] = f"empty: {OURS} was not run, or no dimension is in the mean"
    by_domain = {}
    for domain in sorted({domains[event] for event in events}):
        inside = np.array([domains[event] == domain for event in events])
        means = {method: mean(kl[row, inside]) for row, method in enumerate(methods)}
        by_domain[domain] = {"events": int(inside.sum()), "floor": mean(floor[inside]), "methods": means}
    by_event = {m: {event: mean(kl[i, k]) for k, event in enumerate(events)} for i, m in enumerate(methods)}
    return {
        "methods": table, "reduction": reduction, "gap_closed": gap_closed, "floor": by_dimension(floor),
        "by_domain": by_domain, "excluded_dimensions": excluded, "kl_by_event": by_event, "notes": notes,
    }  # fmt: skip


def intervention_effect(with_it: Iterable[Mapping], without: Iterable[Mapping], from_step: int = 0) -> dict:
    """Difference of label shares, with minus without, over the rollout actions from `from_step` on.

    Both are trajectory rows, of the same seeds; inserted actions must not be among them. Worlds (event, method, seed)
    are paired and weigh the same: {METHOD: {DIMENSION: {LABEL: difference}}}. ValueError where no world is in both.
    """
    sides = [collect(row for row in rows if row["step"] >= from_step) for rows in (with_it, without)]
    effect: dict[str, list[np.ndarray]] = {}
    for key in (key for key in sides[0] if key in sides[1]):
        pair = [np.concatenate(_shares(side[key].simulated)) for side in sides]
        effect.setdefault(key[1], []).append(pair[0] - pair[1])
    if not effect:
        raise ValueError("intervention_effect: no world is in both runs")
    out: dict[str, dict[str, dict[str, float]]] = {}
    for method, worlds in effect.items():
        values = iter(np.mean(worlds, axis=0).tolist())  # all dimensions' labels, one after another
        out[method] = {name: {label: next(values) for label in labels} for name, labels in LABELS.items()}
    return out
