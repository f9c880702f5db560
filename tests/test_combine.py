"""Several runs in one table: means over runs within an event, intervals over events, added events, and no runs that cannot be
compared."""

import json
import sys

import numpy as np
import pytest

from mfllm_ref import combine, doors, metrics
from mfllm_ref.errors import InputError
from mfllm_ref.society.events import DIMENSIONS

EVENTS = ("a", "b", "c")


def make_run(folder, seed, methods=("state", "mf-llm"), events=EVENTS, same=None, **settings):
    """A finished run's folder with labels drawn from `seed`, and what its metrics.json says; real labels are always the same, and
    those of a dimension `same` all one."""
    rng, real = np.random.default_rng(seed), np.random.default_rng(0)
    rows = []
    for event in events:
        truth = [{name: labels[real.integers(len(labels))] for name, labels in DIMENSIONS.items()} for _ in range(60)]
        truth = [labels | ({same: DIMENSIONS[same][0]} if same else {}) for labels in truth]
        for method in methods:
            for index, labels in enumerate(truth):
                drawn = {name: labels[rng.integers(len(labels))] for name, labels in DIMENSIONS.items()}
                if method == "mf-llm" and rng.random() < 0.6:
                    drawn = labels
                rows.append({"event": event, "method": method, "seed": 0, "index": index, "phase": "rollout",
                             "labels": drawn, "real_labels": labels})  # fmt: skip
    likelihood = [{"event": event, "method": method, "nll": 2.0 + seed, "tokens": 1} for method in methods for event in events]
    own = metrics.evaluate(metrics.collect(rows), dict.fromkeys(events, "news"))
    folder.mkdir()
    for name, lines in (("trajectory", rows), ("likelihood", likelihood)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (folder / "metrics.json").write_text(json.dumps(own))
    known = {"command": "simulate.py", "events": events, "methods": methods, "agents": 60, "batch": 10, "warmup": 0, **settings}
    digests = {"events": str(events), "weights/model.safetensors": "5e"}
    (folder / "run.json").write_text(json.dumps({"status": "finished", "settings": known, "sha256": digests}))
    return folder, own


def test_one_run_alone_says_what_its_metrics_say(tmp_path):
    folder, own = make_run(tmp_path / "one", 1)
    whole, by_run = combine.combine([folder])
    for method, entry in own["methods"].items():
        assert whole["methods"][method]["kl"] == entry["kl"] and by_run[method] == pytest.approx([entry["kl"]["mean"]])
        assert whole["methods"][method]["kl_ci95"] == entry["kl_ci95"]
    assert whole["difference"] == own["difference"]
    assert whole["gap_closed"]["state"] == pytest.approx(own["gap_closed"]["state"])


def test_runs_are_averaged_within_an_event(tmp_path):
    """Every event's KL is the mean of its KL in each run; a method of one run alone keeps that run's."""
    made = [make_run(tmp_path / "0", 1, ("state", "recent", "mf-llm")), make_run(tmp_path / "1", 2)]
    whole, by_run = combine.combine([folder for folder, _ in made])
    for event in EVENTS:
        kl = [own["kl_by_event"]["mf-llm"][event] for _, own in made]
        assert kl[0] != kl[1] and whole["kl_by_event"]["mf-llm"][event] == pytest.approx(np.mean(kl))
        assert whole["kl_by_event"]["recent"][event] == made[0][1]["kl_by_event"]["recent"][event]
    assert [len(by_run[name]) for name in ("state", "recent", "mf-llm")] == [2, 1, 2]
    assert whole["methods"]["mf-llm"]["nll"] == 3.5 and whole["methods"]["recent"]["nll"] == 3.0
    assert whole["floor"]["mean"] == pytest.approx(made[0][1]["floor"]["mean"])
    lines = combine.table(whole, by_run).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and "by run" in lines[0]
    assert " ".join(f"{kl:.3f}" for kl in by_run["mf-llm"]) in lines[-2]
    below = 1 - np.mean(by_run["mf-llm"]) / np.mean([np.mean(by_run["state"]), by_run["recent"][0], 9.0])
    whole["methods"]["popular"] = {"kl": {"mean": 9.0}}
    assert combine.headline(whole).startswith(f"mf-llm is {below:.0%} below the mean of state, recent, popular\n")


def test_runs_without_a_common_event_add_their_events(tmp_path):
    """An event's KL is what its own run says; the floor's mean is over all events; a method that a run lacks costs its events."""
    made = [make_run(tmp_path / "0", 1, events=("a", "b")), make_run(tmp_path / "1", 2, events=("c",))]
    whole, by_run = combine.combine([folder for folder, _ in made])
    for method in ("state", "mf-llm"):
        apart = {event: kl for _, own in made for event, kl in own["kl_by_event"][method].items()}
        assert whole["kl_by_event"][method] == pytest.approx(apart) and len(by_run[method]) == 2
    floors = [own["floor"]["mean"] for _, own in made]
    assert whole["floor"]["mean"] == pytest.approx((2 * floors[0] + floors[1]) / 3)
    still, alone = make_run(tmp_path / "3", 4, events=("e", "f"), same="stance")
    whole, by_run = combine.combine([made[0][0], still])
    assert set(alone["excluded_dimensions"]) == {"stance"} and not whole["excluded_dimensions"]
    for method in ("state", "mf-llm"):  # by run as in the mean of all, of which a dimension that varies in one run is part
        assert np.mean(by_run[method]) == pytest.approx(whole["methods"][method]["kl"]["mean"])
        assert by_run[method][1] != pytest.approx(alone["methods"][method]["kl"]["mean"])
    more, _ = make_run(tmp_path / "2", 3, ("state", "recent", "mf-llm"), events=("d",))
    whole, _ = combine.combine([made[0][0], more])
    assert list(whole["kl_by_event"]["mf-llm"]) == ["d"]
    assert combine.headline(whole).splitlines()[0] == "2 of 3 events left out: not every method has them"


def test_a_damaged_line_of_a_finished_run_is_named(tmp_path):
    """A line that was cut is the end of an interrupted run; a finished one must not lose what stands behind it."""
    folder, _ = make_run(tmp_path / "one", 1)
    lines = (folder / "trajectory.jsonl").read_text().splitlines()
    (folder / "trajectory.jsonl").write_text("\n".join([*lines[:9], lines[9][:-1], *lines[10:]]) + "\n")
    with pytest.raises(InputError, match="trajectory.jsonl:10: "):
        combine.combine([folder])


def test_a_table_without_a_mean_has_dashes(tmp_path):
    """Where no dimension varies there is no mean: no number, and no error."""
    folder, own = make_run(tmp_path / "one", 1)
    rows = [json.loads(line) for line in (folder / "trajectory.jsonl").read_text().splitlines()]
    alike = {name: labels[0] for name, labels in DIMENSIONS.items()}
    rows = [row | {"labels": alike, "real_labels": alike} for row in rows]
    (folder / "trajectory.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = metrics.evaluate(metrics.collect(rows), dict.fromkeys(EVENTS, "news"))
    (folder / "metrics.json").write_text(json.dumps(own))
    whole, by_run = combine.combine([folder])
    assert own["methods"]["mf-llm"]["kl"]["mean"] is None
    assert "| `mf-llm` | – |" in combine.table(whole, by_run) and "below" not in combine.headline(whole)


SETTINGS = {"command": "simulate.py", "events": EVENTS, "methods": ("state", "mf-llm"), "agents": 60, "batch": 10, "warmup": 0}
DIGESTS = {"events": str(EVENTS), "weights/model.safetensors": "5e"}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"status": "interrupted"}, "not a finished run"),
        ({"settings": {"command": "train.py"}}, "not a run of simulate.py"),
        ({"settings": None}, "not a run of simulate.py"),
        ({"settings": SETTINGS | {"events": ["a"]}}, "shares some of its events with"),
        ({"settings": SETTINGS | {"agents": 61}}, "its agents is not that of"),
        ({"settings": SETTINGS | {"half_life": 5}}, "its half_life is not that of"),
        ({"sha256": DIGESTS | {"events": "of the same names"}}, "its events is not that of"),
        ({"sha256": DIGESTS | {"weights/model.safetensors": "another"}}, "its weights/model.safetensors is not that of"),
        ({"sha256": DIGESTS | {"intervention": "a file"}}, "its intervention is not that of"),
    ],
)
def test_what_cannot_be_compared_is_one_line(damage, said, tmp_path, monkeypatch, capsys):
    good, bad = (make_run(tmp_path / name, 1)[0] for name in ("good", "bad"))
    (bad / "run.json").write_text(json.dumps(json.loads((bad / "run.json").read_text()) | damage))
    monkeypatch.setattr(sys, "argv", ["combine", str(good), str(bad)])
    assert doors.run_door("combine", combine.main) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"combine: {bad}: ") and said in error


def test_a_run_given_twice_is_not_two_runs(tmp_path):
    folder, _ = make_run(tmp_path / "one", 1)
    with pytest.raises(InputError, match="one/../one: given twice"):
        combine.combine([folder, folder / ".." / "one"])


def test_all_columns_are_of_the_same_events(tmp_path):
    """Where a run's events are left out, its likelihoods and its own KL are, too."""
    made = [make_run(tmp_path / "0", 1, ("state", "mf-llm")), make_run(tmp_path / "1", 2, ("state",), events=("d", "e"))]
    whole, by_run = combine.combine([folder for folder, _ in made])
    assert list(whole["kl_by_event"]["state"]) == list(EVENTS) and len(by_run["state"]) == 1
    assert whole["methods"]["state"]["nll"] == 3.0  # of the first run's seed


def _edit(name, change):
    def damage(folder):
        lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in change(lines)))

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        _edit("trajectory.jsonl", lambda rows: rows[:-3]),
        _edit("trajectory.jsonl", lambda rows: []),
        _edit("trajectory.jsonl", lambda rows: [*rows, 3]),
        _edit("trajectory.jsonl", lambda rows: [*rows, rows[0]]),
        _edit("trajectory.jsonl", lambda rows: [{k: v for k, v in rows[0].items() if k != "labels"}, *rows[1:]]),
        _edit("trajectory.jsonl", lambda rows: [row | {"seed": "0"} for row in rows]),
        _edit("trajectory.jsonl", lambda rows: [row | {"method": "mean-field"} for row in rows]),
        _edit("likelihood.jsonl", lambda rows: [{}, *rows]),
        _edit("likelihood.jsonl", lambda rows: [rows[0] | {"nll": "2"}, *rows[1:]]),
        _edit("metrics.json", lambda own: [[own]]),
        _edit("metrics.json", lambda own: [own[0] | {"floor": None}]),
        _edit("metrics.json", lambda own: [own[0] | {"methods": {"state": {"kl": None}}}]),
    ],
)
def test_a_damaged_run_is_one_line(damage, tmp_path):
    folder, _ = make_run(tmp_path / "one", 1)
    damage(folder)
    with pytest.raises(InputError, match=f"{folder}"):
        combine.combine([folder])
