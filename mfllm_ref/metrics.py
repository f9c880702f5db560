"""Numbers about label distributions and label trajectories (README, What it measures). numpy only; knows no language model.

Notable: the contract functions come first and check what they are given; everything after them works on counts of all
dimensions at once, the label axis padded to the longest dimension (padding counts nothing, and no smoothing reaches
it). Every measure is taken per event, seed and dimension, then averaged over dimensions, seeds and events, in that
order; the interval resamples events, the unit that is independent, and the same draws serve every method.
"""

import zlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from mfllm_ref.society.events import DIMENSIONS

OURS = "mf-llm"  # the method that `reduction` and `gap_closed` compare with each rival
WINDOW, SHARE_WINDOW = 100, 20  # actions: windows of KL and W1, windows of a share trajectory (DTW, pictures)
SMOOTHING = 0.5  # added to every label's count, on both sides
MIN_ENTROPY = 0.05  # nats; a dimension whose real labels have less says nothing and leaves the means
RESAMPLES = 2000  # of the bootstrap
MEASURES = ("kl", "wasserstein", "dtw", "macro_f1", "micro_f1")

_THREE = {"sentiment_tendency": ("negative", "neutral", "positive"), "stance": ("oppose", "neutral", "support")}
LABELS: dict[str, tuple[str, ...]] = {name: _THREE.get(name, labels) for name, labels in DIMENSIONS.items()}
_CODES = {name: {label: code for code, label in enumerate(labels)} for name, labels in LABELS.items()}
_SIZES = np.array([len(labels) for labels in LABELS.values()])
_IS_LABEL = np.arange(_SIZES.max()) < _SIZES[:, None]  # [dimensions, labels]: False is padding
_ORDERED = np.array([name in _THREE or len(labels) == 2 for name, labels in LABELS.items()])


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
    p, q = _pair(p, q)
    return float(_w1(p, q, max(len(p) - 1, 1)))


def total_variation(p: ArrayLike, q: ArrayLike) -> float:
    """Half the L1 distance of two distributions, each [labels]. Errors as in `kl_divergence`."""
    return float(_tv(*_pair(p, q)))


def dtw(x: ArrayLike, y: ArrayLike) -> float:
    """Dynamic time warping distance of two trajectories, each [time] or [time, labels]; lengths may differ.

    L1 cost, steps (1,0), (0,1), (1,1), the total divided by len(x) + len(y). ValueError for an empty trajectory, a
    non-finite entry, or shapes that do not belong together.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim not in (1, 2) or x.ndim != y.ndim or x.shape[1:] != y.shape[1:] or not len(x) or not len(y):
        raise ValueError(f"dtw needs two trajectories [time] or [time, labels], not shapes {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("dtw of a trajectory that holds NaN or infinity")
    return float(_dtw(x.reshape(len(x), 1, -1), y.reshape(len(y), 1, -1))[0])


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
    return float(_f1(confusion)[("macro", "micro").index(average)])


def _pair(p: ArrayLike, q: ArrayLike) -> list[np.ndarray]:
    pair = []
    for name, values in (("p", p), ("q", q)):
        values = np.asarray(values, dtype=np.float64)
        with np.errstate(over="ignore"):
            total = values.sum()
        if values.ndim != 1 or not (values >= 0).all() or not 0 < total < np.inf:  # NaN is not >= 0
            raise ValueError(f"{name} must be finite, non-negative weights [labels] with a positive sum")
        pair.append(values / total)
    if len(pair[0]) != len(pair[1]):
        raise ValueError(f"p has {len(pair[0])} labels and q {len(pair[1])}")
    return pair


# ---- the same arithmetic on many distributions at once; labels are the last axis -----------------------------------


def _kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0)
    return np.maximum(terms.sum(-1), 0.0)  # rounding may leave -1e-17


def _w1(p: np.ndarray, q: np.ndarray, steps: ArrayLike) -> np.ndarray:
    """W1 on [0, 1] of labels that are `steps` equal steps apart in all (how many labels there are, less one)."""
    return np.abs(np.cumsum(p - q, -1)[..., :-1]).sum(-1) / steps


def _tv(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.abs(p - q).sum(-1) / 2


def _dtw(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """DTW distance [dimensions] of two trajectories [time, dimensions, labels]."""
    rows, columns = len(x), len(y)
    # Anti-diagonals, whose cells do not depend on each other; three of them are held, so memory is linear in time. Row 0 lies
    # outside: a path starts from the one 0 in it.
    before, last = (np.full((rows + 1, x.shape[1]), np.inf) for _ in range(2))
    before[0] = 0.0
    for diagonal in range(rows + columns - 1):
        start, stop = max(0, diagonal - columns + 1), min(rows, diagonal + 1)
        cost = np.abs(x[start:stop] - y[diagonal - stop + 1 : diagonal - start + 1][::-1]).sum(-1)
        new = np.full_like(last, np.inf)
        new[start + 1 : stop + 1] = cost + np.minimum(
            np.minimum(last[start:stop], last[start + 1 : stop + 1]), before[start:stop]
        )
        before, last = last, new
    return last[rows] / (rows + columns)


def _f1(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Macro and micro F1 [...] of confusion counts [..., labels, labels]."""
    hits, items = np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(-1) + confusion.sum(-2)
    scores = 2 * hits / np.maximum(items, 1)  # 2 tp / (2 tp + fp + fn)
    return scores.sum(-1) / (items > 0).sum(-1), 2 * hits.sum(-1) / items.sum(-1)


# ---- from labels to counts -----------------------------------------------------------------------------------------


class Trajectory(NamedTuple):
    """Labels of one world's rollout actions in order: int8 [actions, dimensions], codes into LABELS."""

    simulated: np.ndarray
    real: np.ndarray


Worlds = dict[tuple[str, str, int], Trajectory]  # (event, method, seed)


def _coded(labels: Mapping[str, str]) -> bytes:
    return bytes(codes[labels[name]] for name, codes in _CODES.items())


def _decoded(rows: Iterable[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(rows), dtype=np.int8).reshape(-1, len(LABELS))


def encode(labels: Iterable[Mapping[str, str]]) -> np.ndarray:
    """Codes int8 [actions, dimensions] of the labels of some actions."""
    return _decoded(map(_coded, labels))


def collect(rows: Iterable[Mapping]) -> Worlds:
    """The rollout labels of trajectory rows, which are read once and may come in any order.

    ValueError for a label that does not exist or an action that occurs twice.
    """
    found: dict[tuple[str, str, int], dict[int, tuple[bytes, bytes]]] = {}
    for row in rows:
        if row["phase"] == "rollout":
            key, index = (row["event"], row["method"], row["seed"]), row["index"]
            actions = found.setdefault(key, {})
            if index in actions:
                raise ValueError(f"event {key[0]}, method {key[1]}, seed {key[2]}: action {index} occurs twice")
            try:
                actions[index] = _coded(row["labels"]), _coded(row["real_labels"])
            except KeyError as error:
                raise ValueError(f"event {key[0]}, method {key[1]}, action {index}: no label {error}") from None
    return {
        key: Trajectory(*(_decoded(actions[index][side] for index in sorted(actions)) for side in (0, 1)))
        for key, actions in found.items()
    }


def windows(count: int, size: int) -> np.ndarray:
    """Window number of each of `count` actions, int64 [count]: windows of `size`, no overlap; a tail under half a
    window joins the window before it, if there is one."""
    ids = np.arange(count) // size
    return np.minimum(ids, count // size - 1) if count >= size and 2 * (count % size) < size else ids


def label_shares(codes: np.ndarray, ids: ArrayLike = 0, smoothing: float = 0.0) -> np.ndarray:
    """Label shares [windows, dimensions, labels] of codes [actions, dimensions], with `smoothing` added to each label's
    count. ids: the actions' window numbers, ascending (0: one window of all)."""
    ids = np.broadcast_to(ids, len(codes))
    counts = np.zeros((ids[-1] + 1, *_IS_LABEL.shape))
    np.add.at(counts, (ids[:, None], np.arange(len(LABELS)), codes), 1)
    counts += smoothing * _IS_LABEL
    return counts / counts.sum(-1, keepdims=True)


def _scores(world: Trajectory) -> np.ndarray:
    """All MEASURES of one world, float64 [measures, dimensions], each the mean over its windows."""
    real, simulated = world.real, world.simulated
    p, q = (label_shares(side, windows(len(side), WINDOW)) for side in (real, simulated))
    distance = np.where(_ORDERED, _w1(p, q, _SIZES - 1), _tv(p, q))
    paths = [label_shares(side, windows(len(side), SHARE_WINDOW)) for side in (real, simulated)]
    confusion = np.zeros((*_IS_LABEL.shape, _SIZES.max()), dtype=np.int64)
    np.add.at(confusion, (np.arange(len(LABELS)), real, simulated), 1)
    return np.stack([kl_between(real, simulated), distance.mean(0), _dtw(*paths), *_f1(confusion)])


# ---- floors --------------------------------------------------------------------------------------------------------


def kl_between(real: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(real || other) in nats [dimensions] of two label sequences of equal length (see `encode`), as `evaluate` takes
    it: with another continuation of the true process as `other`, the event's floor. ValueError for unequal lengths."""
    if len(real) != len(other) or not len(real):
        raise ValueError(f"kl_between needs two label sequences of one length, not {len(real)} and {len(other)}")
    ids = windows(len(real), WINDOW)
    return _kl(*(label_shares(codes, ids, SMOOTHING) for codes in (real, other))).mean(0)


def split_half_floor(real: np.ndarray, seed: int | Sequence[int] = 0, splits: int = 20) -> np.ndarray:
    """The floor where the true process is unknown, [dimensions]: half the KL between two random halves of each real
    window (sampling KL falls as 1/n), mean over windows and `splits`. real: codes [actions, dimensions]."""
    rng, ids = np.random.default_rng(seed), windows(len(real), WINDOW)
    sizes = np.bincount(ids)
    second = np.arange(len(real)) - (np.cumsum(sizes) - sizes)[ids] >= sizes[ids] // 2  # places in a window's 2nd half
    total = np.zeros(len(LABELS))
    for _ in range(splits):
        shuffled = real[np.lexsort((rng.random(len(real)), ids))]  # each window within itself
        halves = label_shares(shuffled, 2 * ids + second, SMOOTHING)
        total += _kl(halves[::2], halves[1::2]).mean(0) / 2
    return total / splits


# ---- metrics.json --------------------------------------------------------------------------------------------------


def _interval(values: np.ndarray) -> np.ndarray:
    """95% intervals [..., 2] of the mean over events of values [..., events]; one draw of events serves all."""
    rng, events = np.random.default_rng(0), values.shape[-1]
    means = [values[..., rng.integers(events, size=events)].mean(-1) for _ in range(RESAMPLES)]
    return np.moveaxis(np.percentile(means, (2.5, 97.5), axis=0), 0, -1)


def paired_bootstrap(a: Mapping[str, float], b: Mapping[str, float]) -> dict:
    """Mean of a - b over the events both hold (values by event id), with its 95% interval over resampled events:
    {"difference", "ci95": [lo, hi] or None for under two events, "events"}. ValueError where they share no event."""
    gap = np.array([a[event] - b[event] for event in a if event in b])
    if not len(gap):
        raise ValueError("paired_bootstrap: no event in common")
    interval = _interval(gap).tolist() if len(gap) > 1 else None
    return {"difference": float(gap.mean()), "ci95": interval, "events": len(gap)}


def evaluate(
    worlds: Worlds,
    domains: Mapping[str, str],
    floors: Mapping[str, np.ndarray] = {},
    nll: Mapping[str, float] = {},
) -> dict:
    """What metrics.json holds, from what `collect` made of trajectory rows.

    domains: event id -> domain. floors: event id -> KL [dimensions] where the true process is known (`kl_between`);
    other events get the split-half floor. nll: method -> nats per token. Every method is scored on the events that all
    of them have. The entropy that excludes a dimension is that of its real labels pooled over the rollout actions of
    these events, each action once; its values are still given, but no mean holds them. "by_domain" is {DOMAIN:
    {"events": n, "floor": x, "methods": {METHOD: mean KL}}}; beyond the contract, "kl_by_event" is {METHOD: {EVENT: mean
    KL}}, "difference" {RIVAL: `paired_bootstrap` of its KL minus mf-llm's} and "notes" says why a field is null. ValueError for
    nothing to score.
    """
    methods = list(dict.fromkeys(method for _, method, _ in worlds))
    runs: dict[str, dict[str, list[Trajectory]]] = {}
    for (event, method, _), world in worlds.items():
        runs.setdefault(event, {}).setdefault(method, []).append(world)
    events = [event for event, found in runs.items() if len(found) == len(methods)]
    if not events:
        raise ValueError("nothing to evaluate: no event has rollout actions under every method")
    notes: dict[str, str] = {}
    if len(events) < len(runs):
        notes["events"] = f"{len(runs) - len(events)} of {len(runs)} events left out: not every method has them"

    # scores [methods, events, measures, dimensions], floor [events, dimensions]
    scores = np.array([[np.mean([_scores(run) for run in runs[e][m]], axis=0) for e in events] for m in methods])
    reals = {event: runs[event][methods[0]][0].real for event in events}
    floor = np.empty((len(events), len(LABELS)))
    for row, (event, real) in enumerate(reals.items()):
        # seeded by the event's own name, so that its floor does not depend on which other events are there
        by_name = zlib.crc32(event.encode("utf-8", "surrogatepass"))
        floor[row] = floors[event] if event in floors else split_half_floor(real, (0, by_name))

    pooled = label_shares(np.concatenate(list(reals.values())))[0]
    entropy = np.log(_SIZES) - _kl(pooled, _IS_LABEL / _SIZES[:, None])  # log(labels) less the distance from uniform
    kept = entropy >= MIN_ENTROPY
    excluded = {name: max(float(nats), 0.0) for name, nats in zip(LABELS, entropy) if nats < MIN_ENTROPY}
    if not kept.any():
        notes["mean"] = f"null: the real labels of every dimension have under {MIN_ENTROPY} nats of entropy"

    def mean(values: np.ndarray) -> float | None:  # [..., dimensions], over the kept ones
        return float(values[..., kept].mean()) if kept.any() else None

    def by_dimension(values: np.ndarray) -> dict[str, float | None]:  # [events, dimensions]
        return {"mean": mean(values), **dict(zip(LABELS, values.mean(0).tolist()))}

    kl = scores[:, :, MEASURES.index("kl")]
    intervals: list[list[float] | None] = [None] * len(methods)
    if len(events) > 1 and kept.any():
        intervals = _interval(kl[:, :, kept].mean(-1)).tolist()
    else:
        notes["kl_ci95"] = notes["difference.ci95"] = "null: an interval over events needs two events and one dimension in the mean"
    table: dict[str, dict] = {}
    for row, method in enumerate(methods):
        values = {measure: by_dimension(scores[row, :, column]) for column, measure in enumerate(MEASURES)}
        table[method] = {"kl": values.pop("kl"), "kl_ci95": intervals[row], **values, "nll": nll.get(method)}
        if table[method]["nll"] is None:
            notes[f"nll.{method}"] = "null: the method has no language model, or none was scored"

    bottom, reduction, gap_closed = mean(floor), {}, {}
    if OURS in methods and kept.any():
        ours = table[OURS]["kl"]["mean"]
        for rival in (method for method in methods if method != OURS):
            theirs = table[rival]["kl"]["mean"]
            reduction[rival] = 1 - ours / theirs if theirs > 0 else None
            gap_closed[rival] = (theirs - ours) / (theirs - bottom) if theirs > bottom else None
            if theirs <= bottom:
                notes[f"gap_closed.{rival}"] = "null: the rival's KL is not above the floor: no gap to close"
            if theirs <= 0:
                notes[f"reduction.{rival}"] = "null: the rival's KL is zero"
    else:
        missing = f"empty: {OURS} was not run, or no dimension is in the mean"
        notes |= dict.fromkeys(("reduction", "gap_closed", "difference"), missing)
    by_domain = {}
    for domain in sorted({domains[event] for event in events}):
        inside = np.array([domains[event] == domain for event in events])
        means = {method: mean(kl[row, inside]) for row, method in enumerate(methods)}
        by_domain[domain] = {"events": int(inside.sum()), "floor": mean(floor[inside]), "methods": means}
    by_event: dict[str, Any] = {m: {event: mean(kl[i, k]) for k, event in enumerate(events)} for i, m in enumerate(methods)}
    apart = {m: paired_bootstrap(by_event[m], by_event[OURS]) for m in reduction}
    return {
        "methods": table, "reduction": reduction, "gap_closed": gap_closed, "difference": apart, "floor": by_dimension(floor),
        "by_domain": by_domain, "excluded_dimensions": excluded, "kl_by_event": by_event, "notes": notes,
    }  # fmt: skip


def share_changes(worlds: Iterable[tuple[str, np.ndarray, np.ndarray]]) -> dict:
    """How label shares differ between two runs of some worlds, each given as (method, codes with, codes without).

    {METHOD: {DIMENSION: {LABEL: with minus without}}}, every world weighing the same. codes: [actions, dimensions].
    """
    changes: dict[str, list[np.ndarray]] = {}
    for method, with_it, without in worlds:
        changes.setdefault(method, []).append(label_shares(with_it)[0] - label_shares(without)[0])
    return {
        method: {name: dict(zip(LABELS[name], row.tolist())) for name, row in zip(LABELS, np.mean(found, axis=0))}
        for method, found in changes.items()
    }
