"""The door, end to end, on a random backbone of a few thousand weights: contracts of files, exit codes and resuming.

What the numbers are is tested where they are computed; here, that every file is there, agrees with the others, is the
same bytes again, and that no wrong input gets further than one line.
"""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import simulate
from mfllm_ref import doors, metrics, pretrain, runs, simulation
from mfllm_ref.errors import Notice
from mfllm_ref.lm import LanguageModel
from mfllm_ref.lm.backbone import Backbone
from mfllm_ref.lm.checkpoint import save_backbone
from mfllm_ref.society import agora
from mfllm_ref.society.events import DIMENSIONS
from mfllm_ref.society.readers import write_events

ROOT = Path(__file__).resolve().parents[1]
KEYS = ["event", "method", "seed", "step", "index", "agent", "phase", "text", "real_text", "labels", "real_labels"]
SHORT = ("--agents", "40", "--warmup", "14", "--summary-tokens", "12", "--action-tokens", "6", "--threads", "1")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A qwen2 folder with random weights and a byte-level vocabulary, and a policy adapter for it."""
    folder = tmp_path_factory.mktemp("models") / "random"
    folder.mkdir()
    tokenizer = pretrain.train_tokenizer(["a b c", "share it", "I doubt that"] * 5, 280)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    for name, content in pretrain.tokenizer_files().items():
        (folder / name).write_text(json.dumps(content))
    shape = pretrain.Shape(dim=16, layers=2, heads=2, kv_heads=1, intermediate=24, vocab=280)
    model = Backbone(pretrain.config_for("qwen2", shape, tokenizer.get_vocab_size()))
    pretrain.initialise(model, torch.Generator().manual_seed(0))
    save_backbone(model, folder)
    lm = LanguageModel.load(folder)
    for name in ("policy", "mean-field"):
        lm.add_adapter(name, rank=2, seed=1)
        lm.save_adapter(name, folder.parent / "adapters" / name)
    return folder


def call(capsys, monkeypatch, *arguments):
    """(exit code, stdout, stderr) of the door with these arguments."""
    monkeypatch.setattr(sys, "argv", ["simulate.py", *map(str, arguments)])
    code = doors.run_door("simulate.py", simulate.main)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def door(capsys, monkeypatch, backbone):
    threads = torch.get_num_threads()
    yield lambda *arguments: call(capsys, monkeypatch, "--backbone", backbone, *SHORT, *arguments)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(backbone, tmp_path_factory):
    """One run of two events and all methods that need no adapter, which several tests look at."""
    out = tmp_path_factory.mktemp("runs") / "first"
    with pytest.MonkeyPatch.context() as patch:
        arguments = ("--backbone", str(backbone), *SHORT, "--events", "2", "--out", str(out))
        patch.setattr(sys, "argv", ["simulate.py", *arguments])
        assert doors.run_door("simulate.py", simulate.main) == 0
    return out


def rows_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_every_file_is_there_and_agrees_with_the_others(finished):
    """Rows are the contract's; metrics.json is what the rows say; run.json names weights, data and versions."""
    names = {path.name for path in finished.iterdir() if path.name != runs.LOCK_FILE}
    contract = {"run.json", "trajectory.jsonl", "mean_field.jsonl", "metrics.json", "report.png"}
    assert names == contract | {"likelihood.jsonl"}  # what nll is the mean of
    rows, fields = rows_of(finished / "trajectory.jsonl"), rows_of(finished / "mean_field.jsonl")
    assert all(list(row) == KEYS and set(row["labels"]) == set(row["real_labels"]) == set(DIMENSIONS) for row in rows)
    methods = ["state", "recent", "popular", "persistence", "empirical", "mf-llm-no-ib"]
    assert len(rows) == 2 * len(methods) * 40
    assert all((row["phase"] == "warmup") == (row["index"] < 14) for row in rows)
    assert all(row["text"] == row["real_text"] for row in rows if row["phase"] == "warmup")
    assert [list(field) for field in fields[:1]] == [["event", "method", "seed", "step", "text"]]
    assert {field["method"] for field in fields} == {"mf-llm-no-ib"} and len(fields) == 2 * 3
    result = json.loads((finished / "metrics.json").read_text())
    assert list(result["methods"]) == methods
    events = [agora.event("test", index) for index in (0, 1)]
    again = metrics.evaluate(metrics.collect(rows), {event.id: event.domain for event in events})
    for method in methods:
        assert result["methods"][method]["kl"] == again["methods"][method]["kl"]
        assert (result["methods"][method]["nll"] is None) == (method == "persistence")
    assert result["floor"] != again["floor"]  # the built-in world's own continuations, not split halves
    record = json.loads((finished / "run.json").read_text())
    assert record["status"] == "finished" and record["actions_per_second"] > 0 and record["seeds"] == [0]
    assert record["sha256"]["weights/model.safetensors"] and record["sha256"]["tokenizer/tokenizer.json"]
    assert record["sha256"]["data"] and record["versions"]["torch"] and record["threads"] == 1


def test_a_shorter_memory_changes_what_is_said_of_the_population_alone(finished, door, tmp_path):
    assert door("--events", "2", "--method", "state,empirical", "--half-life", "1", "--out", tmp_path / "short")[0] == 0
    assert json.loads((tmp_path / "short" / "run.json").read_text())["settings"]["half_life"] == 1
    same = {"state": True, "empirical": False}
    for method, alike in same.items():
        one, two = ([row for row in rows_of(out / "likelihood.jsonl") if row["method"] == method] for out in (finished, tmp_path / "short"))
        assert len(one) == 2 * 4 and (one == two) == alike


def test_the_same_settings_give_the_same_bytes(finished, door, tmp_path):
    """Trajectory, mean field, metrics and picture again, byte for byte; run.json too, without its time fields."""
    code, out, err = door("--events", "2", "--out", tmp_path / "b")
    assert code == 0 and err == "" and "mf-llm-no-ib" in out and "floor" in out
    for name in ("trajectory.jsonl", "mean_field.jsonl", "metrics.json", "report.png"):
        assert (tmp_path / "b" / name).read_bytes() == (finished / name).read_bytes(), name
    records = [json.loads((folder / "run.json").read_text()) for folder in (finished, tmp_path / "b")]
    bare = [json.dumps({k: v for k, v in record.items() if k not in runs.TIME_FIELDS}) for record in records]
    assert bare[0] == bare[1]


DAMAGES = [
    ("trajectory.jsonl", lambda rows: rows.insert(3, {})),
    ("trajectory.jsonl", lambda rows: rows.insert(3, rows[3])),
    ("trajectory.jsonl", lambda rows: rows[3].update(text=None)),
    ("trajectory.jsonl", lambda rows: rows[3].update(labels={"stance": "none"})),
    ("trajectory.jsonl", lambda rows: rows[3].update(event="another")),
    ("mean_field.jsonl", lambda rows: rows.insert(0, rows[0])),
    ("mean_field.jsonl", lambda rows: rows[0].update(text=3)),
    ("likelihood.jsonl", lambda rows: rows[0].update(nll="1.0")),
    ("likelihood.jsonl", lambda rows: rows[0].update(step=1)),
]


def test_an_interrupted_run_goes_on_where_it_was(finished, door, tmp_path, monkeypatch):
    """Ctrl-C in the second step, a torn last line besides: exit 130, then --resume ends at the bytes of a whole run."""
    out, original = tmp_path / "a", simulation.rollout

    def interrupted(*arguments):
        for step, item in enumerate(original(*arguments)):
            if step == 2:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(simulation, "rollout", interrupted)
    code, _, err = door("--events", "2", "--out", out)
    assert code == 130 and len(err.splitlines()) == 1
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    with (out / "trajectory.jsonl").open("a") as file:
        file.write((finished / "trajectory.jsonl").read_text().splitlines()[240] + '\n{"event": "agora-te')
    monkeypatch.setattr(simulation, "rollout", original)
    assert door("--events", "2", "--out", out)[0] == 2  # not without --resume
    kept = {path: path.read_bytes() for path in out.glob("*.jsonl")}
    for name, damage in DAMAGES:
        rows = [json.loads(line) for line in kept[out / name].split(b"\n")[:-1]]  # but for a torn one
        damage(rows)
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        code, _, err = door("--events", "2", "--out", out, "--resume")
        assert code == 2 and len(err.splitlines()) == 1 and "damaged, cannot resume" in err, (name, rows[:4], err)
        for path, content in kept.items():
            path.write_bytes(content)
    assert door("--events", "2", "--out", out, "--resume", "--seed", "1")[0] == 2  # nor with other settings
    assert door("--events", "2", "--out", out, "--resume")[0] == 0
    for name in ("trajectory.jsonl", "mean_field.jsonl", "metrics.json", "report.png"):
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name
    before = (out / "run.json").read_bytes()
    code, text, _ = door("--events", "2", "--out", out, "--resume")
    assert code == 0 and "finished" in text and (out / "run.json").read_bytes() == before


def test_seeds_adapters_and_the_choice_of_events(door, tmp_path, backbone):
    """--seeds rolls out several times, --event picks, mf-llm joins the default methods when its adapters are there."""
    name = "agora-dev-0003"
    options = ("--split", "dev", "--event", name, "--seeds", "2", "--seed", "5")
    assert door(*options, "--adapters", backbone.parent / "adapters", "--out", tmp_path / "a")[0] == 0
    rows = rows_of(tmp_path / "a" / "trajectory.jsonl")
    assert {row["event"] for row in rows} == {name} and {row["seed"] for row in rows} == {5, 6}
    result = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert {"mf-llm", "mf-llm-no-ib-policy", "state"} <= set(result["methods"]) and "sft" not in result["methods"]
    assert set(result["reduction"]) == set(result["methods"]) - {"mf-llm"}
    assert result["methods"]["state"]["kl_ci95"] is None and "kl_ci95" in result["notes"]
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    weights = {f"adapters/{name}/adapter_model.safetensors" for name in ("policy", "mean-field")}
    assert weights <= set(record["sha256"]) and record["seeds"] == [5, 6]


def test_events_from_a_file(door, tmp_path):
    """--data with the split as a folder, --events the first few; the floor is then that of split halves."""
    (tmp_path / "data" / "dev").mkdir(parents=True)
    write_events([agora.event("dev", index) for index in range(3)], tmp_path / "data" / "dev" / "e.jsonl")
    options = ("--method", "recent,state", "--events", "2", "--out", tmp_path / "a")
    assert door("--data", tmp_path / "data", "--split", "dev", *options)[0] == 0
    rows = rows_of(tmp_path / "a" / "trajectory.jsonl")
    assert list(dict.fromkeys(row["event"] for row in rows)) == ["agora-dev-0000", "agora-dev-0001"]
    assert list(dict.fromkeys(row["method"] for row in rows)) == ["state", "recent"]
    result = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert result["floor"] == metrics.evaluate(metrics.collect(rows), {row["event"]: "x" for row in rows})["floor"]


def test_a_run_within_the_folder_of_its_events_goes_on(door, tmp_path):
    """Data is the events that were read: what else comes to lie beside them, the run's own output too, changes nothing."""
    data = tmp_path / "data"
    data.mkdir()
    write_events([agora.event("dev", 0)], data / "e.jsonl")
    options = ("--data", data, "--method", "persistence", "--out", data / "run")
    assert door(*options)[0] == 0
    (data / ".hidden").touch()
    assert door(*options, "--resume")[:2] == (0, f"{data / 'run'} is finished: see {data / 'run' / 'report.png'}\n")
    write_events([agora.event("dev", 1)], data / "e.jsonl")
    assert "agora-dev-0001" in door(*options, "--resume")[2]
    event = agora.event("dev", 0)
    write_events([dataclasses.replace(event, topic="another")], data / "e.jsonl")
    assert "sha256.data" in door(*options, "--resume")[2]


def test_events_that_the_warm_up_leaves_nothing_of_are_left_out(door, tmp_path):
    """With a line that names each, unless they were asked for or are all."""
    events = [agora.event("dev", index) for index in range(3)]
    events[1:] = [dataclasses.replace(event, actions=event.actions[:14], posts=()) for event in events[1:]]
    write_events(events, tmp_path / "e.jsonl")
    write_events(events[1:], tmp_path / "short.jsonl")
    options = ("--method", "persistence", "--out", tmp_path / "a")
    (tmp_path / "torn.json").write_text("[")
    code, _, err = door("--data", tmp_path / "e.jsonl", "--intervene", tmp_path / "torn.json", *options)
    assert code == 2 and "torn.json" in err and err.count("\n") == 1, "what is wrong is said alone"
    why = "--warmup 14 leaves none of its 14 actions to simulate"
    with pytest.warns(Notice) as said:
        assert door("--data", tmp_path / "e.jsonl", *options)[0] == 0
    assert [str(notice.message) for notice in said] == [f"event {event.id!r}: {why}; left out" for event in events[1:]]
    assert {row["event"] for row in rows_of(tmp_path / "a" / "trajectory.jsonl")} == {events[0].id}
    for data, more in (("short.jsonl", ()), ("e.jsonl", ("--event", events[0].id, "--event", events[1].id))):
        code, _, err = door("--data", tmp_path / data, *more, *options[:3], tmp_path / "b")
        assert (code, err) == (2, f"simulate.py: event {events[1].id!r}: {why}\n")


def test_the_backbone_can_annotate(door, tmp_path):
    """--annotator lm: real and simulated texts pass the language model, whose labels need not be those of the rules."""
    event = agora.event("dev", 0)
    write_events([dataclasses.replace(event, actions=event.actions[:5], posts=())], tmp_path / "e.jsonl")
    options = ("--data", tmp_path / "e.jsonl", "--warmup", "3", "--method", "persistence,state")
    for name in ("rules", "lm"):
        assert door(*options, "--annotator", name, "--out", tmp_path / name)[0] == 0
    files = [tmp_path / name / "trajectory.jsonl" for name in ("rules", "lm")]
    rules, lm = ([row["real_labels"] for row in rows_of(file)] for file in files)
    assert rules != lm and all(set(labels) == set(DIMENSIONS) for labels in lm)


def test_an_intervention_is_measured_against_its_absence(door, tmp_path):
    """Inserted actions are in no row; without them the rollout is the plain one; the true process is asked as well."""
    inserted = [{"step": 1, "actions": [{"profile": "a liar", "text": "INSERTED I oppose this, shameful!"}] * 30}]
    (tmp_path / "i.json").write_text(json.dumps(inserted))
    common = ("--method", "recent,empirical", "--events", "1")
    code, text, _ = door(*common, "--intervene", tmp_path / "i.json", "--out", tmp_path / "a")
    assert code == 0 and "true process" in text
    assert door(*common, "--out", tmp_path / "b")[0] == 0
    without, plain = tmp_path / "a" / "trajectory-without.jsonl", tmp_path / "b" / "trajectory.jsonl"
    assert without.read_bytes() == plain.read_bytes()
    rows = rows_of(tmp_path / "a" / "trajectory.jsonl")
    assert len(rows) == 2 * 40 and not any("INSERTED" in row["text"] + row["real_text"] for row in rows)
    assert door(*common, "--warmup", "0", "--intervene", tmp_path / "i.json", "--out", tmp_path / "c")[0] == 0
    told = json.loads((tmp_path / "c" / "metrics.json").read_text())["intervention"]
    assert told["true_effect"] is None and told["note"] == "true_effect is null: there is no warm-up to go on from"
    code, _, err = door("--batch", "40", "--intervene", tmp_path / "i.json", "--out", tmp_path / "d")
    assert code == 2 and "no step could follow" in err
    told = json.loads((tmp_path / "a" / "metrics.json").read_text())["intervention"]
    assert told["from_step"] == 2 and set(told["effect"]) == {"recent", "empirical"}
    assert told["true_effect"]["stance"]["oppose"] > 0
    for shares in (*told["effect"]["recent"].values(), *told["true_effect"].values()):
        assert sum(shares.values()) == pytest.approx(0, abs=1e-9)


BAD = {
    "unknown method": (["--method", "state,nonsense"], "nonsense"),
    "a method without its adapter": (["--method", "mf-llm"], "policy"),
    "warm-up too long": (["--warmup", "40"], "--warmup 40"),
    "persistence of nothing": (["--method", "persistence", "--warmup", "0"], "--warmup 0"),
    "unknown event": (["--event", "agora-test-9999"], "agora-test-9999"),
    "no such data": (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    "no such split in data": (["--data", "{tmp}", "--split", "dev"], "--split dev"),
    "no such backbone": (["--backbone", "nowhere"], "nowhere"),
    "no such adapters": (["--adapters", "nowhere"], "nowhere"),
    "adapters of nobody": (["--adapters", "{tmp}"], "holds no adapter"),
    "no such adapter": (["--policy-adapter", "nowhere", "--mean-field-adapter", "nowhere"], "nowhere"),
    "no chat template": (["--chat"], "chat"),
    "not a number": (["--agents", "many"], "--agents"),
    "zero": (["--batch", "0"], "--batch"),
    "a population that remembers nothing": (["--half-life", "0"], "--half-life"),
    "summaries of no token at all": (["--summary-top-p", "0"], "--summary-top-p"),
    "more than everything": (["--summary-top-p", "nan"], "--summary-top-p"),
    "unknown option": (["--nonsense"], "--nonsense"),
    "resume without a place": (["--resume"], "--out"),
    "no cuda": (["--device", "cuda"], "cuda"),
    "an adapter that no method asks for": (["--method", "state", "--policy-adapter", "nowhere"], "nowhere"),
    "a path nobody can look at": (["--data", "x" * 5000], "xxx"),
    "an intervention nobody can look at": (["--intervene", "x" * 5000], "xxx"),
    "summaries longer than the backbone": (["--summary-tokens", "1000000000"], "--summary-tokens"),
    "no room for the prompt": (["--action-tokens", "4090", "--method", "state"], "4096 positions with 4090 tokens"),
    "no room for a summary's": (["--summary-tokens", "4090", "--method", "mf-llm-no-ib"], "4096 positions with 4090 tokens"),
    "seeds without end": (["--seeds", "1000000000000"], "--seeds"),
}


@pytest.mark.parametrize("arguments, word", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_nothing_on_disk(door, tmp_path, monkeypatch, arguments, word):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    where = [] if "--resume" in arguments else ["--out", tmp_path / "out"]
    code, out, err = door(*arguments, *where)
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and word in err, err
    assert list(tmp_path.iterdir()) == []


def test_an_end_of_text_that_the_backbone_lacks_is_named_before_anything_is_written(door, tmp_path, backbone):
    shutil.copytree(backbone, tmp_path / "other")
    (tmp_path / "other" / "generation_config.json").write_text('{"eos_token_id": 999999}')
    code, _, err = door("--backbone", tmp_path / "other", "--method", "state", "--out", tmp_path / "out")
    assert code == 2 and err == f"simulate.py: {tmp_path / 'other'}: names no end of text token (eos_token_id) that the backbone has\n"
    assert not (tmp_path / "out").exists()


WRONG = ["", "{}", "[]", "[1]", '[{"step": 0}]', '[{"step": 99, "actions": []}]', '[{"step": true, "actions": []}]',
         '[{"step": 0, "actions": []}]', '[{"step": 0, "actions": [{"text": "x"}]}]',
         '[{"step": 0, "actions": [{"profile": "", "text": 3}]}]',
         '[{"step": 0, "actions": [{"profile": "", "text": "\\ud800"}]}]']  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_intervention_file_is_named(tmp_path, text):
    path = tmp_path / "i.json"
    path.write_text(text)
    settings = simulation.Settings(agents=40, warmup=14)
    with pytest.raises(doors.InputError, match="i.json"):
        simulation.read_intervention(path, [agora.event("test", 0)], settings)


def test_help_comes_at_once_and_explains_itself():
    """--help must not wait for torch: it is the first thing a newcomer types."""
    code = """if True:
        import sys, simulate
        sys.argv[1:] = ["--help"]
        try:
            simulate.main()
        except SystemExit as end:
            print(end.code, "torch" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "report.png" in done.stdout and "--warmup" in done.stdout and done.stdout.endswith("0 False\n")


def test_a_refused_folder_is_left_alone(door, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    shutil.copy(tmp_path / "mine" / "thesis.txt", tmp_path / "file")
    for name in ("mine", "file"):
        code, _, err = door("--out", tmp_path / name)
        assert code == 2 and name in err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("fast", [True, False])
def test_auto_is_bfloat16_where_the_cpu_multiplies_it_and_never_for_training(fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast})
    args = argparse.Namespace(device="cpu", dtype="auto")
    assert doors.device_and_dtype(args, training=False)[1] is (torch.bfloat16 if fast else torch.float32)
    assert doors.device_and_dtype(args)[1] is torch.float32
    args.dtype = "float64"
    assert doors.device_and_dtype(args, training=False)[1] is torch.float64
