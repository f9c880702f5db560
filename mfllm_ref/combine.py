"""Several simulations as one table: python -m mfllm_ref.combine RUN RUN [...]

Each RUN is a finished folder of simulate.py. Runs of the same events are, as a rule, of adapters that were trained with different
seeds: a method's rollouts of one event, whichever runs they are in, are averaged before anything else, so intervals are over
events; methods that nothing was trained for need only be in one of the runs. Runs without a common event, as in leaving
one event out after another, add their events. The table is Markdown.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mfllm_ref import metrics, report, simulation
from mfllm_ref.doors import Parser, run_door
from mfllm_ref.errors import InputError
from mfllm_ref.fields import parse_json, read_json
from mfllm_ref.metrics import OURS
from mfllm_ref.runs import RUN_FILE

SAME = ("agents", "batch", "warmup", "annotator", "intervene")  # settings without which runs cannot be compared


def combine(folders: Sequence[Path]) -> tuple[dict, dict[str, list[float | None]]]:
    """(`metrics.evaluate` of all runs' rollouts together; each method's mean KL by run, over the dimensions that are in the mean of
    all, even those that the run alone excludes). Raises InputError for a folder that holds no finished simulation, or one of other
    settings (SAME), or that shares some of its events with another but not all."""
    settings = [_finished(folder) for folder in folders]
    for number, (folder, own) in enumerate(zip(folders, settings, strict=True)):
        for key in SAME:
            if own.get(key) != settings[0].get(key):
                raise InputError(f"{folder}: its {key} is not that of {folders[0]}")
        for other, theirs in zip(folders[:number], settings[:number], strict=True):
            if 0 < len({*own["events"]} & {*theirs["events"]}) < len({*own["events"], *theirs["events"]}):
                raise InputError(f"{folder}: shares some of its events with {other}, not all")
    worlds: metrics.Worlds = {}
    by_run: dict[str, list[dict[str, float]]] = {}
    rows: list[dict] = []
    floors: dict[str, np.ndarray] = {}
    for number, (folder, known) in enumerate(zip(folders, settings, strict=True)):
        own = read_json(folder / "metrics.json")
        for method, entry in own["methods"].items():
            by_run.setdefault(method, []).append(entry["kl"])
        for (event, method, seed), world in metrics.collect(_rows(folder / "trajectory.jsonl")).items():
            worlds[event, method, seed * len(folders) + number] = world
        rows += _rows(folder / "likelihood.jsonl")
        # The floor is the real events' own, so runs of the same events agree on it. Its mean is all that the table needs of it.
        floors |= dict.fromkeys(known["events"], np.array([own["floor"][dimension] for dimension in metrics.LABELS]))
    whole = metrics.evaluate(worlds, dict.fromkeys(floors, ""), floors, simulation.nll(rows))
    kept = [dimension for dimension in metrics.LABELS if dimension not in whole["excluded_dimensions"]]

    def mean(kl: Mapping[str, float]) -> float | None:
        return float(np.mean([kl[dimension] for dimension in kept])) if kept else None

    return whole, {method: [mean(kl) for kl in found] for method, found in by_run.items()}


def _finished(folder: Path) -> dict:
    """The settings of a finished simulation."""
    record = read_json(folder / RUN_FILE)
    if not isinstance(record, dict) or record.get("status") != "finished":
        raise InputError(f"{folder}: not a finished run")
    if record.get("settings", {}).get("command") != "simulate.py":
        raise InputError(f"{folder}: not a run of simulate.py")
    return record["settings"]


def _rows(path: Path) -> Iterator[dict]:
    """Rows of a finished run's file: a line that is damaged is no torn end, but an InputError."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            yield parse_json(line, f"{path}:{number}")


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
    parser = Parser(prog="python -m mfllm_ref.combine", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a finished folder of simulate.py")
    whole, by_run = combine(parser.parse_args().runs)
    print(table(whole, by_run))
    print("\n" + headline(whole))


if __name__ == "__main__":
    sys.exit(run_door("combine", main))
