"""Several processes on one piece of work: the same bytes as one, one line for whatever goes wrong, and going on afterwards."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed

from mfllm_ref import ranks
from mfllm_ref.society import agora
from mfllm_ref.society.readers import write_events
from tests.test_crashes import CASES, contents

ROOT = Path(__file__).resolve().parents[1]
# 320 agents a step with a model, which are two chunks; a mean field, and a method without a model
SIMULATE = ["simulate.py", "--events", "2", "--seeds", "4", "--agents", "50", "--warmup", "10", "--batch", "20", "--threads", "1",
            "--method", "recent,persistence,mf-llm-no-ib", "--action-tokens", "4", "--summary-tokens", "6"]  # fmt: skip
MEAN_FIELD = ["--stage", "mean-field", "--method", "mf-llm"]
CHANGED = ("started", "ended", "wall_time", "actions_per_second", "processes")


DIES = f"""
import os, signal, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
import simulate
from mfllm_ref import doors

def die():
    rows = os.path.join(sys.argv[-1], "mean_field.jsonl")
    while not os.path.exists(rows) or not os.path.getsize(rows):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

if os.environ["RANK"] == "1":
    threading.Thread(target=die, daemon=True).start()
sys.exit(doors.run_door("simulate.py", simulate.main))
"""  # simulate.py, whose second process dies once there is a mean field on the disk


@pytest.fixture(scope="module")
def cases(shallow_folder, tmp_path_factory):
    """test_crashes' doors with their arguments, by name."""
    folder = tmp_path_factory.mktemp("ranks")
    events = [agora.event("train", index) for index in range(6)]
    write_events([replace(event, actions=event.actions[:70], posts=()) for event in events], folder / "events.jsonl")
    places = {"backbone": shallow_folder, "data": folder / "events.jsonl", "sft": folder}
    return {name: [word.format(**places) for word in words] for name, words in CASES.items()}


@pytest.fixture
def start(server):
    """Starts a door in two processes, as torchrun would, with options for each: the numbers to `end` them by."""
    stores = []

    def run(arguments, *how):
        store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        stores.append(store)
        common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port),
                  "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
        each = zip(("0", "1"), how or ({}, {}), strict=True)
        own = [(options, {**common, "RANK": r, "LOCAL_RANK": r, **options.get("env", {})}) for r, options in each]
        return [server.start(*arguments, **{**options, "env": env}) for options, env in own]

    return run


@pytest.fixture
def run(server, start):
    return lambda arguments, *how: [server.ask(end=number) for number in start(arguments, *how)]


def alike(a, b):
    """Every file of two runs has the same bytes, but for the times and the number of processes in run.json."""
    found, expected = contents(a), contents(b)
    for files in (found, expected):
        files["run.json"] = [item for item in files["run.json"][0] if item[0] not in CHANGED]
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)


def test_torchrun_and_a_single_process_write_the_same_bytes(shallow_folder, tmp_path):
    """A job by torchrun; and one whose second process is killed on its way, which ends with one line within a minute, and
    which a single process then ends."""
    arguments = [*SIMULATE[1:], "--backbone", shallow_folder, "--out"]
    (tmp_path / "dies.py").write_text(DIES)
    job = torchrun(tmp_path / "dies.py", *arguments, tmp_path / "cut")
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 1 and [line for line in errors.splitlines() if line.startswith("simulate.py:")] == [
        f"simulate.py: another process of this job has ended; --out {tmp_path / 'cut'} --resume goes on from what is on disk"
    ]
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["status"] == "interrupted"
    whole = torchrun("simulate.py", *arguments, tmp_path / "whole")
    one = [sys.executable, "simulate.py", *map(str, arguments), tmp_path / "cut", "--resume"]
    one = subprocess.run(one, cwd=ROOT, capture_output=True, text=True)
    said, errors = whole.communicate(timeout=120)
    assert whole.returncode == one.returncode == 0, errors + one.stderr
    assert one.stdout.splitlines()[:-1] == said.splitlines()[:-1], "one process says it all, once"
    alike(tmp_path / "whole", tmp_path / "cut")
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["processes"] == 2


@pytest.mark.parametrize("name", ["simulate", "tune"])
def test_two_go_on_to_the_bytes_of_one(server, run, cases, tmp_path, name):
    """Two processes write what one does, also where they resume what one began, or one resumes what two began."""
    arguments = cases[name] + MEAN_FIELD * (name == "tune")
    whole = server.run(*arguments, "--out", tmp_path / "one")
    assert whole["code"] == 0, whole
    die_at = whole["operations"] // 2
    assert server.run(*arguments, "--out", tmp_path / "a", die_at=die_at)["code"] == -signal.SIGKILL
    first, second = run([*arguments, "--out", tmp_path / "b"], {"die_at": die_at}, {})
    assert first["code"] == -signal.SIGKILL and second["code"] == 1
    assert "another process of this job has ended" in second["stderr"] and len(second["stderr"].splitlines()) == 1
    last = [*run([*arguments, "--out", tmp_path / "a", "--resume"]), server.run(*arguments, "--out", tmp_path / "b", "--resume")]
    assert [(result["code"], result["stderr"]) for result in last] == [(0, "")] * 3, last
    for out in "ab":
        alike(tmp_path / out, tmp_path / "one")


def test_all_processes_hold_the_adapter_of_one(server, run, cases, tmp_path):
    """To the last bit, after every update of either kind."""
    for stage in (MEAN_FIELD, ["--stage", "sft", "--method", "sft"]):
        arguments = [*cases["tune"], *stage, "--out"]
        one = server.run(*arguments, tmp_path / f"{stage[1]} one", env={"SAY_ADAPTERS": "1"})
        two = run([*arguments, tmp_path / f"{stage[1]} two"], *[{"env": {"SAY_ADAPTERS": "1"}}] * 2)
        assert len(set(one["stderr"].splitlines())) > 1 and [result["stderr"] for result in two] == [one["stderr"]] * 2, (one, two)


def test_a_backbone_spread_over_processes_computes_the_same(server, run, cases, tmp_path):
    """FSDP2: without adapters the same bytes; a tuning in float64, where nothing depends on a fold of the adapter into the
    weights, the same losses and gradients."""
    assert server.run(*cases["simulate"], "--out", tmp_path / "one")["code"] == 0
    results = run([*cases["simulate"], "--shard", "--out", tmp_path / "two"])
    assert [(result["code"], result["stderr"]) for result in results] == [(0, "")] * 2, results
    for name in ("trajectory.jsonl", "mean_field.jsonl", "likelihood.jsonl", "metrics.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    tune = [*cases["tune"], *MEAN_FIELD, "--dtype", "float64"]
    assert server.run(*tune, "--out", tmp_path / "tuned")["code"] == 0
    results = run([*tune, "--shard", "--out", tmp_path / "spread"])
    assert [(result["code"], result["stderr"]) for result in results] == [(0, "")] * 2, results
    one, two = ([json.loads(line) for line in open(tmp_path / out / "log.jsonl")] for out in ("tuned", "spread"))
    assert len(one) == len(two) == 3
    for rows in zip(one, two, strict=True):
        for name in rows[0].keys() & {"loss", "kl", "reward", "dev_loss", "gradient_norm"}:
            assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-9), (name, rows)


def test_pretraining_shares_its_rows(server, run, cases, tmp_path):
    """Losses are those of one process up to rounding, which bfloat16 makes large (without dropout, whose noise each draws alone)."""
    arguments = [*cases["pretrain"], "--dropout", "0"]
    assert server.run(*arguments, "--out", tmp_path / "one")["code"] == 0
    results = run([*arguments, "--out", tmp_path / "two"])
    assert [(result["code"], result["stderr"]) for result in results] == [(0, "")] * 2, results
    logs = ([json.loads(line) for line in open(tmp_path / out / "log.jsonl")] for out in ("one", "two"))
    one, two = ([row["loss"] for row in log if "loss" in row] for log in logs)
    assert one == pytest.approx(two, rel=1e-3) and len(one) == 5


def test_bad_input_is_one_line_of_one_process(run, cases, tmp_path):
    """What all find (before and after torch is there), and what rank 0 alone does: a full disk."""
    out = tmp_path / "out"
    for arguments, how, about in (
        ([*cases["simulate"], "--agents", "x"], (), "--agents"), ([*cases["simulate"], "--warmup", "40"], (), "--warmup 40"),
        ([*cases["tune"], "--samples", "1"], (), "--samples 1"), ([*cases["pretrain"], "--rows", "1"], (), "--rows 1"),
        (cases["simulate"], ({"file_bytes": 3000}, {}), str(out)),
    ):  # fmt: skip
        results = run([*arguments, "--out", out], *how)
        assert results[0]["code"] == 2 and results[1]["code"] in (1, 2), results
        said = "".join(result["stderr"] for result in results)
        assert about in said and len(said.splitlines()) == 1, said


def test_ctrl_c_ends_both_and_can_be_resumed(server, start, run, cases, tmp_path):
    arguments, rows = [*cases["simulate"], "--out", tmp_path / "two"], tmp_path / "two" / "trajectory.jsonl"
    numbers = start(arguments)  # process ids
    while not rows.exists() or not rows.stat().st_size:
        time.sleep(0.005)
    for number in numbers:
        os.kill(number, signal.SIGINT)
    results = [server.ask(end=number) for number in numbers]
    assert [result["code"] for result in results] == [130, 130], results
    said = "".join(result["stderr"] for result in results)
    assert "--resume" in said and len(said.splitlines()) == 1
    assert [result["code"] for result in run([*arguments, "--resume"])] == [0, 0]
    assert server.run(*cases["simulate"], "--out", tmp_path / "one")["code"] == 0
    alike(tmp_path / "two", tmp_path / "one")


def test_shares_cover_all_parts_and_are_even(monkeypatch):
    monkeypatch.setattr(ranks, "_size", 3)
    owners = ranks.owners([5.0, 1.0, 1.0, 1.0, 4.0, 1.0])
    assert sorted(owners) == [0, 1, 2, 2, 2, 2] and ranks.owners([]) == []
