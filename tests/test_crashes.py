"""What the doors leave on disk when they are killed, interrupted, out of space or started twice, and what --resume makes
of it. Each door is run in processes of its own, on tiny models."""

import json
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mfllm_ref import doors
from mfllm_ref.lm import LanguageModel
from mfllm_ref.runs import LOCK_FILE, TIME_FIELDS
from mfllm_ref.society import agora
from mfllm_ref.society.readers import write_events

# A door and what it is run with; further stages of training go here.
CASES = {
    "simulate": ["simulate.py", "--backbone", "{backbone}", "--events", "1", "--agents", "40", "--warmup", "10", "--batch", "5",
                 "--method", "recent,persistence,mf-llm-no-ib", "--action-tokens", "4", "--summary-tokens", "6"],
    "pretrain": ["train.py", "--stage", "pretrain", "--data", "{data}", "--shape", "tiny", "--steps", "5", "--rows", "2",
                 "--save-every", "2"],
    "tune": ["train.py", "--backbone", "{backbone}", "--data", "{data}", "--steps", "2", "--rows", "2", "--micro", "1",
             "--samples", "2", "--rank", "2", "--summary-tokens", "8", "--save-every", "1", "--method", "mf-llm,sft"],
    "plane": ["train.py", "--backbone", "{backbone}", "--data", "{data}", "--steps", "1", "--rows", "2", "--micro", "1",
              "--samples", "2", "--rank", "2", "--summary-tokens", "8", "--save-every", "1", "--stage", "mean-field",
              "--beta", "1,5", "--sft-adapter", "{sft}"],
}  # fmt: skip
ROWS = {"simulate.py": "trajectory.jsonl", "train.py": "log.jsonl"}
# Of tuning several mean fields only what it leaves on disk is its own, and dying within disk operations shows that: how it meets
# Ctrl-C, a full disk or a second run is that of tuning one.
WITHOUT_PLANE = pytest.mark.parametrize("case", [name for name in CASES if name != "plane"], indirect=True)
KILLS = 4  # a case, at random times; and as many in the middle of an operation on the disk


@pytest.fixture(scope="module", params=CASES)
def case(request, server, shallow_folder, tmp_path_factory):
    """(arguments, what an uninterrupted run leaves, its result)."""
    folder = tmp_path_factory.mktemp(request.param)
    events = [agora.event("train", index) for index in range(6)]
    write_events([replace(event, actions=event.actions[:70], posts=()) for event in events], folder / "events.jsonl")
    lm = LanguageModel.load(shallow_folder)
    lm.add_adapter("sft", rank=2)
    lm.save_adapter("sft", folder / "sft")
    places = {"backbone": shallow_folder, "data": folder / "events.jsonl", "sft": folder / "sft"}
    arguments = [word.format(**places) for word in CASES[request.param]]
    whole = server.run(*arguments, "--out", folder / "whole")
    assert whole["code"] == 0 and whole["stderr"] == "", whole
    return arguments, contents(folder / "whole"), whole


def contents(out: Path) -> dict[str, object]:
    """Every file of a run by name; run.json and log.jsonl without their time fields. The lock has no content."""
    found: dict[str, object] = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(path.relative_to(out))
        if name in ("run.json", "log.jsonl"):
            text = path.read_text("utf-8")
            rows = [json.loads(line) for line in text.splitlines()] if name == "log.jsonl" else [json.loads(text)]
            found[name] = [list({k: v for k, v in row.items() if k not in TIME_FIELDS}.items()) for row in rows]
        elif name != LOCK_FILE:
            found[name] = path.read_bytes()
    return found


def resumed(server, arguments: list[str], expected: dict[str, object], *outs: Path) -> None:
    """--resume ends, and what is there is what an uninterrupted run leaves."""
    for out, result in zip(outs, server.together([*arguments, "--resume"], list(outs), [{}] * len(outs)), strict=True):
        assert result["code"] == 0 and result["stderr"] == "", result
        found = contents(out)
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == []


@WITHOUT_PLANE
def test_killed_at_any_moment_and_resumed_it_ends_at_the_same_bytes(server, case, tmp_path):
    """SIGKILL at random moments, of the run and of the runs that resume it; then one that is left alone."""
    arguments, expected, whole = case
    rng, duration = random.Random(0), whole["seconds"]
    kills = rounds = 0
    while kills < KILLS:
        outs = [tmp_path / f"{rounds}-{k}" for k in range(2)]
        for _ in range(2):
            moments = sorted(rng.uniform(0, duration) for _ in outs)
            started = [server.start(*arguments, "--out", out, "--resume") for out in outs]
            for run, after in zip(started, (moments[0], moments[1] - moments[0]), strict=True):
                killed = server.ask(end=run, signal=signal.SIGKILL, after=after)
                assert killed["code"] in (-signal.SIGKILL, 0), killed
                kills += killed["code"] != 0
                # It came too late: other work had made the first run slow.
                duration = duration if killed["code"] else min(duration, moments[1])
        resumed(server, arguments, expected, *outs)
        rounds += 1


def test_killed_in_the_middle_of_a_disk_operation_it_ends_at_the_same_bytes(server, case, tmp_path):
    """SIGKILL within a write, before a rename, a flush, a cut or a removal: half a line, half a file."""
    arguments, expected, whole = case
    assert whole["operations"] > 3 * KILLS
    moments = range(3, whole["operations"], whole["operations"] // KILLS + 1)
    for some in (moments[k : k + 2] for k in range(0, len(moments), 2)):
        outs = [tmp_path / str(die_at) for die_at in some]
        killed = server.together(arguments, outs, [{"die_at": die_at} for die_at in some])
        assert [result["code"] for result in killed] == [-signal.SIGKILL] * len(some)
        resumed(server, arguments, expected, *outs)


@WITHOUT_PLANE
def test_ctrl_c_ends_at_once_and_can_be_resumed(server, case, tmp_path):
    """Exit 130 within 2 s, one line that says what to do, where, and --resume ends at the same bytes."""
    arguments, expected, _ = case
    started = server.start(*arguments, "--out", tmp_path / "a")
    rows = tmp_path / "a" / ROWS[arguments[0]]
    while not rows.exists() or not rows.stat().st_size:
        time.sleep(0.005)
    ended = server.ask(end=started, signal=signal.SIGINT, after=0)
    assert ended["code"] == 130 and ended["after_signal"] < 2, ended
    assert len(ended["stderr"].splitlines()) == 1 and f"--out {tmp_path / 'a'} --resume" in ended["stderr"]
    assert json.loads((tmp_path / "a" / "run.json").read_text())["status"] == "interrupted"
    resumed(server, arguments, expected, tmp_path / "a")


@WITHOUT_PLANE
def test_a_full_disk_is_one_line_and_can_be_resumed(server, case, tmp_path):
    """Wherever space runs out: exit 2, one line that names the file, and with space again the same bytes."""
    arguments, expected, _ = case
    sizes = sorted(len(content) for content in expected.values() if isinstance(content, bytes))
    outs = [tmp_path / "early", tmp_path / "late"]
    for out, full in zip(outs, server.together(arguments, outs, [{"file_bytes": n} for n in (3000, sizes[-1] - 1)]), strict=True):
        assert full["code"] == 2 and len(full["stderr"].splitlines()) == 1 and str(out) in full["stderr"], full
    resumed(server, arguments, expected, *outs)


@WITHOUT_PLANE
@pytest.mark.parametrize("out", ["/dev/full", "/proc/nowhere/run", "{file}/below", "{file}"])
def test_where_nothing_can_be_written_is_one_line(server, case, tmp_path, out):
    (tmp_path / "file").write_text("mine")
    out = out.format(file=tmp_path / "file")
    result = server.run(*case[0], "--out", out)
    assert result["code"] == 2 and len(result["stderr"].splitlines()) == 1 and out in result["stderr"], result
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@WITHOUT_PLANE
def test_a_second_run_on_one_out_is_refused(server, case, tmp_path):
    """While the first lives the second is refused, with --resume too, and the first ends as if it had been alone."""
    arguments, expected, _ = case
    first = server.start(*arguments, "--out", tmp_path / "a")
    while not (tmp_path / "a" / "run.json").exists():
        time.sleep(0.01)
    second = server.run(*arguments, "--out", tmp_path / "a", "--resume")
    assert second["code"] == 2 and "another run is writing there" in second["stderr"], second
    assert server.ask(end=first)["code"] == 0
    assert contents(tmp_path / "a") == expected


OTHER = {
    "simulate.py": {"--seed": "3", "--agents": "39", "--batch": "4", "--warmup": "9", "--action-tokens": "5", "--method": "recent",
                    "--events": "2", "--dtype": "float64"},
    "train.py": {"--seed": "3", "--steps": "7", "--lr": "0.001", "--batch": "5"},
}  # fmt: skip


@WITHOUT_PLANE
def test_resuming_with_other_settings_is_refused_by_name(server, case, tmp_path):
    """The line names the setting that differs; the folder stays as it is."""
    arguments, expected, whole = case
    out = tmp_path / "a"
    assert server.run(*arguments, "--out", out, die_at=whole["operations"] // 2)["code"] == -signal.SIGKILL
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for option, value in OTHER[arguments[0]].items():
        refused = server.run(*arguments, option, value, "--out", out, "--resume")
        name = {"--method": "methods"}.get(option, option.strip("-").replace("-", "_"))
        assert refused["code"] == 2 and f" {name} was " in refused["stderr"], refused
        assert len(refused["stderr"].splitlines()) == 1
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    resumed(server, arguments, expected, out)


def test_numbers_that_overflow_are_one_line(capsys):
    """NaN or infinite logits end a run as bad input does: weights that cannot be computed with, not a fault of ours."""

    def main():
        raise FloatingPointError("the model's logits are not finite")

    assert doors.run_door("simulate.py", main) == 2
    said = capsys.readouterr().err
    assert "logits are not finite" in said and "--dtype" in said and len(said.splitlines()) == 1
