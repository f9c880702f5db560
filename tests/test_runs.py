"""Run folders: what is written is whole, one writer at a time, and an interrupted run goes on where it was."""

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mfllm_ref import runs
from mfllm_ref.errors import InputError
from mfllm_ref.runs import JsonLines, open_run, read_json_lines, sha256, write_json

RECORD = {"settings": {"seed": 0, "methods": ["state"], "data": None}, "sha256": {"weights": "ab"}, "threads": 2}
ROOT = Path(__file__).resolve().parents[1]


def one_line(raised, *words):
    text = str(raised.value)
    assert "\n" not in text and all(word in text for word in words), text


def in_a_process(code, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


# ---- files


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"text": "中文", "x": 1.5, "name": "\udcff"})
    assert "中文" in path.read_text("utf-8")
    assert json.loads(path.read_bytes()) == {"text": "中文", "x": 1.5, "name": "\udcff"}
    before = path.read_bytes()
    with pytest.raises(ValueError):
        write_json(path, {"x": float("nan")})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.json"]


def test_where_nothing_can_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError) as raised:
        write_json(tmp_path / "file" / "a.json", {})
    one_line(raised, "a.json", "Not a directory")
    with pytest.raises(InputError) as raised:
        JsonLines(tmp_path / "nowhere" / "a.jsonl")
    one_line(raised, "a.jsonl")


def test_a_disk_that_refuses_is_one_line_and_leaves_no_half_file(tmp_path):
    """A limit on file size stands for the full disk: the old file stays whole, nothing is left beside it."""
    write_json(tmp_path / "a.json", {"old": True})
    lines = JsonLines(tmp_path / "rows.jsonl")
    lines.append([{"n": 1}])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(InputError) as raised:
            write_json(tmp_path / "a.json", {"new": "x" * 10000})
        one_line(raised, "a.json", "too large")
        with pytest.raises(InputError) as raised:
            lines.append([{"n": 2, "text": "x" * 10000}])
        one_line(raised, "rows.jsonl", "too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    lines.close()
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": True}
    assert sorted(os.listdir(tmp_path)) == ["a.json", "rows.jsonl"]
    again = JsonLines(tmp_path / "rows.jsonl")  # what the refused write left is cut off
    assert list(again) == [{"n": 1}]
    again.close()


TORN = [b'{"n": 2', b'{"n": 2}', b"\xff\xfe\n", b"[1]\n", b'{"n": }\n{"n": 3}\n', b"[" * 10000 + b"\n"]


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_end_is_cut_and_the_file_goes_on(tmp_path, torn):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"n": 0, "t": "好"}\n{"n": 1}\n'.encode() + torn)
    assert [row["n"] for row in read_json_lines(path)] == [0, 1]
    lines = JsonLines(path)
    assert lines.count == 2
    lines.append([{"n": 2, "t": "\x00\n"}, {"n": 3}])
    assert lines.count == 4 and [row["n"] for row in lines] == [0, 1, 2, 3]
    lines.keep(3)
    lines.append([{"n": 9}])
    lines.close()
    assert path.read_bytes() == '{"n": 0, "t": "好"}\n{"n": 1}\n{"n": 2, "t": "\\u0000\\n"}\n{"n": 9}\n'.encode()
    assert list(read_json_lines(tmp_path / "absent.jsonl")) == []


# ---- the folder


def test_a_run_is_recorded_from_start_to_end(tmp_path):
    out = tmp_path / "a" / "b"
    with open_run(out, RECORD) as run:
        early = json.loads((out / "run.json").read_text())
        assert early["status"] == "running" and early["settings"] == RECORD["settings"]
        run.lines("rows.jsonl").append([{"n": 1}])
        run.complete(actions_per_second=3.5)
    late = json.loads((out / "run.json").read_text())
    assert late["status"] == "finished" and late["threads"] == 2 and late["actions_per_second"] == 3.5
    assert late["wall_time"] >= 0
    with open_run(out, RECORD, resume=True) as run:
        assert run.finished
    assert json.loads((out / "run.json").read_text()) == late


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path):
    """Apart from the time fields run.json is the same, in the same order; rows go on behind those that were there."""
    with pytest.raises(KeyboardInterrupt):
        with open_run(tmp_path / "a", RECORD, resume=True) as run:
            run.lines("rows.jsonl").append([{"n": 1}])
            raise KeyboardInterrupt
    assert json.loads((tmp_path / "a" / "run.json").read_text())["status"] == "interrupted"
    with open_run(tmp_path / "a", RECORD, resume=True) as run:
        assert not run.finished
        lines = run.lines("rows.jsonl")
        assert lines.count == 1
        lines.append([{"n": 2}])
        run.complete(table=[1], actions_per_second=1.0)
    with open_run(tmp_path / "b", RECORD) as run:
        run.lines("rows.jsonl").append([{"n": 1}, {"n": 2}])
        run.complete(table=[1], actions_per_second=2.0)
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in "ab"]
    assert records[0].keys() - records[1].keys() == set()
    bare = [json.dumps({k: v for k, v in record.items() if k not in runs.TIME_FIELDS}) for record in records]
    assert bare[0] == bare[1]
    assert (tmp_path / "a" / "rows.jsonl").read_bytes() == (tmp_path / "b" / "rows.jsonl").read_bytes()


def test_what_is_in_the_way_is_refused_and_left_alone(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("x")
    cases = (("full", False, "not empty"), ("full", True, "not a run"), ("file", False, "not a folder"))
    for out, resume, word in cases:
        with pytest.raises(InputError) as raised, open_run(tmp_path / out, RECORD, resume):
            pass
        one_line(raised, out, word)
    with pytest.raises(InputError) as raised, open_run(tmp_path / "file" / "below", RECORD):
        pass
    one_line(raised, "below")
    assert os.listdir(tmp_path / "full") == ["thesis.txt"]


def test_resuming_with_other_settings_names_the_setting(tmp_path):
    out = tmp_path / "a"
    with open_run(out, RECORD):
        pass
    changes = (
        ({"settings": {**RECORD["settings"], "seed": 7}}, ("seed", "0", "7")),
        ({"settings": {**RECORD["settings"], "new": True}}, ("new", "None", "True")),
        ({"sha256": {"weights": "cd"}}, ("sha256.weights", "ab", "cd")),
    )
    before = (out / "run.json").read_bytes()
    for change, words in changes:
        with pytest.raises(InputError) as raised, open_run(out, {**RECORD, **change}, resume=True):
            pass
        one_line(raised, *words)
    assert (out / "run.json").read_bytes() == before
    with pytest.raises(InputError) as raised, open_run(out, RECORD):
        pass
    one_line(raised, "not empty")


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}", b'{"settings": 3, "sha256": {}}', b"\xff",
                                    b'{"settings": {}, "sha256": {}, "wall_time": "x"}'])  # fmt: skip
def test_a_damaged_record_is_refused(tmp_path, damage):
    (tmp_path / "run.json").write_bytes(damage)
    with pytest.raises(InputError) as raised, open_run(tmp_path, RECORD, resume=True):
        pass
    one_line(raised, "run.json", "damaged")


HOLD = """
    import json, sys, time
    from pathlib import Path
    from mfllm_ref.runs import open_run
    with open_run(Path(sys.argv[1]), json.loads(sys.argv[2])) as run:
        run.lines("rows.jsonl").append([{"n": 1}])
        print("held", flush=True)
        time.sleep(60)
"""


def test_one_writer_at_a_time_and_none_after_a_kill(tmp_path):
    """A second process is refused while the first lives; when that one is killed the run can be resumed at once."""
    out = tmp_path / "a"
    first = in_a_process(HOLD, out, json.dumps(RECORD))
    try:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(InputError) as raised, open_run(out, RECORD, resume=True):
            pass
        one_line(raised, "another run")
    finally:
        first.kill()
        first.communicate()
    with open_run(out, RECORD, resume=True) as run:
        assert list(run.lines("rows.jsonl")) == [{"n": 1}]


def test_a_kill_before_the_record_leaves_an_empty_folder(tmp_path):
    """Nothing but the lock and a half-written record: that is still a new run."""
    (tmp_path / ".lock").touch()
    (tmp_path / ".run.json.part").write_text("{")
    with open_run(tmp_path, RECORD) as run:
        assert run.record["status"] == "running" and run.record["settings"] == RECORD["settings"]


def test_default_out_is_a_new_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = [runs.default_out() for _ in range(3)]  # none of them made yet, as when runs begin together
    assert len(set(places)) == 3 and all(place.parts[0] == "runs" and not place.exists() for place in places)


# ---- provenance


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"hello")
    assert sha256(tmp_path / "a") == "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    with pytest.raises(InputError) as raised:
        sha256(tmp_path / "absent")
    one_line(raised, "absent")


def test_provenance_says_what_ran(tmp_path):
    (tmp_path / "w").write_bytes(b"x")
    record = runs.provenance({"weights": tmp_path / "w"})
    assert record["sha256"] == {"weights": sha256(tmp_path / "w")}
    assert record["versions"]["numpy"] and record["versions"]["python"]
    assert json.loads(json.dumps(record)) == record


def test_the_revision_is_that_of_the_codes_own_checkout(tmp_path):
    """None under another project's repository (an installed copy); in its own, the revision and any changes."""
    (tmp_path / "mfllm_ref").mkdir()
    for name in ("__init__.py", "errors.py", "ranks.py", "runs.py"):
        (tmp_path / "mfllm_ref" / name).write_bytes((ROOT / "mfllm_ref" / name).read_bytes())

    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(["git", *who, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def reported():
        code = "import json; from mfllm_ref import runs; print(json.dumps(runs._git()))"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    git("init", "-q", ".")
    assert reported() is None
    git("add", ".")
    git("commit", "-q", "-m", "x")
    assert reported() == {"revision": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "mfllm_ref" / "errors.py").open("a").write("# changed\n")
    assert reported() == {"revision": git("rev-parse", "HEAD"), "dirty": True}
