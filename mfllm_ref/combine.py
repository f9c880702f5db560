"""Several simulations as one table: python -m mfllm_ref.combine RUN RUN [...]

Each RUN is a finished folder of simulate.py. Runs of the same events are, as a rule, of adapters that were trained with different
seeds: a method's rollouts of one event, whichever runs they are in, are averaged before anything else, so intervals are over
events; methods that nothing was trained for need only be in one of the runs. Runs without a common event, as in leaving
one event out after another, add their events. The table is Markdown.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mfllm_ref import metrics, report, simulation
from mfllm_ref.doors import Parser, run_door, say
from mfllm_ref.errors import InputError
from mfllm_ref.fields import an_object, parse_json, read_json
from mfllm_ref.metrics import OURS
from mfllm_ref.runs import RUN_FILE

# Settings that runs which are compared may differ in.
OTHER = ("events", "methods", "seed", "seeds", "threads", "device", "dtype", "shard")


def combine(folders: Sequence[Path]) -> tuple[dict, dict[str, list[float | None]]]:
    """(`metrics.evaluate` of all runs' rollouts together; each method's mean KL by run, over the dimensions that are in the mean of
    all, even those that the run alone excludes). Raises InputError for a folder that holds no finished simulation, is damaged or
    is given twice, for runs of other settings (but OTHER), another backbone or intervention, and for one that shares some of its
    events with another but not all, or whose events are others of the same name."""
    records = [_finished(folder) for folder in folders]
    for number, (folder, own) in enumerate(zip(folders, records, strict=True)):
        for other, theirs in zip(folders[:number], records[:number], strict=True):
            _check_comparable(folder, own, other, theirs)
    parts = [_part(folder, own) for folder, own in zip(folders, records, strict=True)]
    worlds: metrics.Worlds = {}
    floors: dict[str, np.ndarray] = {}
    for number, part in enumerate(parts):
        worlds |= {(event, method, seed * len(parts) + number): w for (event, method, seed), w in part.worlds.items()}
        # The floor is the real events' own, so runs of the same events agree on it. Its mean is all that the table needs of it.
        floors |= dict.fromkeys(part.events, part.floor)
    methods = {method for _, method, _ in worlds}
    done = {(event, method) for event, method, _ in worlds}
    shared = {event for event in floors if all((event, method) in done for method in methods)}  # which `evaluate` keeps
    nll = simulation.nll(row for part in parts for row in part.likelihood if row["event"] in shared)
    whole = metrics.evaluate(worlds, dict.fromkeys(floors, ""), floors, nll)
    kept = [dimension for dimension in metrics.LABELS if dimension not in whole["excluded_dimensions"]]
    by_run: dict[str, list[float | None]] = {}
    for part in parts:
        for method, kl in part.kl.items() if shared & set(part.events) else ():
            by_run.setdefault(method, []).append(float(np.mean([kl[dimension] for dimension in kept])) if kept else None)
    return whole, by_run


@dataclass(frozen=True)
class _Part:
    """What one run adds: its events, rollouts, rows of likelihood.jsonl, floor [dimensions], and KL by method and dimension."""

    events: list[str]
    worlds: metrics.Worlds
    likelihood: list[dict]
    floor: np.ndarray
    kl: dict[str, dict[str, float]]


def _part(folder: Path, record: Mapping) -> _Part:
    """InputError naming the folder where its files do not hold what a finished run's do."""
    try:
        own, settings = read_json(folder / "metrics.json"), record["settings"]
        worlds = metrics.collect(_rows(folder / "trajectory.jsonl"))
        counts = {event: {len(w.real) for (name, _, _), w in worlds.items() if name == event} for event in settings["events"]}
        whole = {(event, method) for event in settings["events"] for method in settings["methods"]}
        if {key[:2] for key in worlds} != whole or any(len(count) != 1 for count in counts.values()):
            raise ValueError("trajectory.jsonl lacks rows")
        if not all(type(seed) is int for _, _, seed in worlds):
            raise ValueError("a seed of trajectory.jsonl is not a whole number")
        likelihood = list(_rows(folder / "likelihood.jsonl"))
        scored = simulation.nll(likelihood)
        if not scored.keys() >= {method for method, entry in own["methods"].items() if entry["nll"] is not None}:
            raise ValueError("likelihood.jsonl lacks rows")
        if not all(row["event"] in counts for row in likelihood):
            raise ValueError("likelihood.jsonl has rows of other events")
        floor = np.array([own["floor"][dimension] for dimension in metrics.LABELS], dtype=float)
        kl = {method: {d: float(entry["kl"][d]) for d in metrics.LABELS} for method, entry in own["methods"].items()}
        return _Part(list(counts), worlds, likelihood, floor, kl)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{folder}: damaged, not what a finished run holds ({type(error).__name__}: {error})") from None


def _check_comparable(folder: Path, own: Mapping, other: Path, theirs: Mapping) -> None:
    if folder.resolve() == other.resolve():
        raise InputError(f"{folder}: given twice")
    mine, yours = ({k: v for k, v in record["settings"].items() if k not in OTHER} for record in (own, theirs))
    for key in sorted(mine.keys() | yours.keys()):
        if mine.get(key) != yours.get(key):
            raise InputError(f"{folder}: its {key} is not that of {other}")
    events, others = set(own["settings"]["events"]), set(theirs["settings"]["events"])
    if 0 < len(events & others) < len(events | others):
        raise InputError(f"{folder}: shares some of its events with {other}, not all")
    for key in sorted(own["sha256"].keys() | theirs["sha256"].keys()):
        same = key.startswith(("weights/", "intervention")) or (key == "events" and bool(events & others))
        if same and own["sha256"].get(key) != theirs["sha256"].get(key):
            raise InputError(f"{folder}: its {key} is not that of {other} (by sha256)")


def _finished(folder: Path) -> dict:
    """The record of a finished simulation."""
    record = read_json(folder / RUN_FILE)
    if not isinstance(record, dict) or record.get("status") != "finished":
        raise InputError(f"{folder}: not a finished run")
    settings, digests = record.get("settings"), record.get("sha256")
    if not isinstance(settings, dict) or settings.get("command") != "simulate.py":
        raise InputError(f"{folder}: not a run of simulate.py")
    names = [settings.get("events"), settings.get("methods")]
    if not isinstance(digests, dict) or not all(isinstance(some, list) and all(isinstance(n, str) for n in some) for some in names):
        raise InputError(f"{folder / RUN_FILE}: damaged")
    return record


def _rows(path: Path) -> Iterator[dict]:
    """Rows of a finished run's file: a line that is damaged is no torn end, but an InputError."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            yield an_object(parse_json(line, f"{path}:{number}"), f"{path}:{number}", "a row")


def table(whole: Mapping, by_run: Mapping[str, Sequence[float | None]]) -> str:
    """The README's table: measures by method, and each method's KL minus mf-llm's with its 95% interval."""
    several = max(map(len, by_run.values())) > 1
    head = ["method", "KL", "95% interval", *["by run"] * several, "W1", "DTW", "macro-F1", "micro-F1", "nll"]
    rows = [[*head, f"KL minus {OURS}'s, 95% interval"]]
    for method, entry in whole["methods"].items():
        values = [entry["kl"]["mean"], *(entry[name]["mean"] for name in metrics.MEASURES[1:]), entry["nll"]]
        kl, *others = map(_number, values)
        runs = [" ".join(map(_number, by_run[method]))] * several
        against = whole["difference"].get(method)
        apart = "" if against is None else f"{against['difference']:.3f} {_interval(against['ci95'])}"
        rows.append([f"`{method}`", kl, _interval(entry["kl_ci95"]), *runs, *others, apart])
    rows.append(["floor", _number(whole["floor"]["mean"]), *[""] * (len(rows[0]) - 2)])
    return report.markdown(rows)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _interval(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f"({ends[0]:.3f} to {ends[1]:.3f})"


def headline(whole: Mapping) -> str:
    """How far mf-llm is below the mean of the rivals that the paper compares it with, and how much of each gap it closes."""
    found = {name: entry["kl"]["mean"] for name, entry in whole["methods"].items()}
    lines = [whole["notes"]["events"]] if "events" in whole["notes"] else []
    for rivals in (("state", "recent", "popular"), ("state", "recent", "popular", "sft")):
        if all(found.get(name) is not None for name in (OURS, *rivals)):
            below = 1 - found[OURS] / np.mean([found[name] for name in rivals])
            lines.append(f"{OURS} is {below:.0%} below the mean of {', '.join(rivals)}")
    lines += [f"gap closed to {name}: {share:.2f}" for name, share in whole["gap_closed"].items() if share is not None]
    return "\n".join(lines)


def main() -> None:
    parser = Parser(prog="python -m mfllm_ref.combine", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a finished folder of simulate.py")
    whole, by_run = combine(parser.parse_args().runs)
    say(table(whole, by_run))
    say("\n" + headline(whole))


if __name__ == "__main__":
    sys.exit(run_door("combine", main))
