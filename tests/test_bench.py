"""The comparisons run end to end on tiny shapes, and tell no time where the contestants disagree."""

import json
import sys

import pytest
import torch

from mfllm_ref import bench, scale

TINY = "--config tiny --random-weights --prefix 24 --suffix 6 --new 4 --repeats 1 --threads 1".split()


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def cells(text):
    """The rows of the Markdown tables in a text, without heads and rules."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [row for k, row in enumerate(lines) if row[0] != "---" and lines[k + 1 : k + 2] != [["---"] * len(row)]]


@pytest.mark.parametrize("agents, dtype", [("1,6", "float32"), ("3", "bfloat16")])
def test_throughput(capsys, agents, dtype):
    assert bench.main(["throughput", "--agents", agents, "--dtype", dtype, *TINY]) == 0
    out = capsys.readouterr().out
    assert out.startswith("greedy tokens agree in float32; tiny (2.9 M parameters), " + dtype)
    rows = [[float(cell) for cell in row] for row in cells(out)]
    assert [int(row[0]) for row in rows] == [int(n) for n in agents.split(",")]
    for _, ours, padded, reuse, over_padded, over_reuse, *_ in rows:  # a busy machine's rates have few digits in print
        assert over_padded == pytest.approx(ours / padded, rel=0.1) and over_reuse == pytest.approx(ours / reuse, rel=0.1)


def test_train(capsys):
    assert bench.main(["train", "--agents", "3", "--rank", "4", *TINY]) == 0
    (row,) = cells(capsys.readouterr().out)
    agents, ours, theirs, ratio, tokens, *gaps = map(float, row)
    assert agents == 3 and ratio == pytest.approx(theirs / ours, abs=0.1 + 0.1 * ratio)
    assert tokens == round(3 * 34 / (24 + 3 * 10), 2)
    assert max(gaps) <= 1e-4


@pytest.mark.parametrize("command", [["throughput", "--agents", "5"], ["train", "--agents", "2"]])
def test_no_time_is_told_of_contestants_that_disagree(capsys, monkeypatch, command):
    theirs = bench.their_model

    def other(lm):
        model = theirs(lm)
        weight = model.model.layers[0].mlp.down_proj.weight.detach()
        model.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(-3 * weight, requires_grad=False)
        return model

    monkeypatch.setattr(bench, "their_model", other)
    with pytest.raises(SystemExit, match="differ, so no times are printed"):
        bench.main([*command, *TINY])
    assert not cells(capsys.readouterr().out)


def test_greedy_tokens_may_part_at_a_tie_alone(random_lm):
    """Two words as likely as each other, one told instead of the other; and the same with one that is less likely."""
    prompts = [[5, 6, 7], [8, 9]]
    likely = random_lm.generate(prompts, 3, temperature=0)
    ours = [" ".join(map(str, ids)) for ids in random_lm.tokenizer.encode_batch(likely)]
    assert bench.agree("(a)", random_lm, prompts, ours, ours) == 0
    others = [ours[0], " ".join([ours[1].split()[0], "3", "4"])]
    with pytest.raises(SystemExit, match=r"agent 1: ours and \(a\) differ"):
        bench.agree("(a)", random_lm, prompts, ours, others)
    with torch.no_grad():  # now all words are as likely as each other
        kept = random_lm.backbone.lm_head.weight.clone()
        random_lm.backbone.lm_head.weight.zero_()
        try:
            assert bench.agree("(a)", random_lm, prompts, ours, others) == 1
        finally:
            random_lm.backbone.lm_head.weight.copy_(kept)


@pytest.mark.parametrize("command, library", [("throughput", "transformers"), ("train", "transformers"), ("train", "peft")])
def test_a_missing_rival_is_one_line(capsys, monkeypatch, command, library):
    monkeypatch.setitem(sys.modules, library, None)
    assert bench.main([command, "--agents", "2", *TINY]) == 2
    assert capsys.readouterr().err == f"bench: {library} is needed to compare with: pip install -e '.[test]'\n"


@pytest.mark.parametrize(
    "wrong, said",
    [
        (["throughput", "--config", "qwen2-0.5b"], "--random-weights"), (["throughput", "--agents", "4,0"], "--agents"),
        (["throughput", "--new", str(2**62)], "--new"), (["train", "--rank", str(2**62)], "--rank"),
        (["train", "--dtype", "bfloat16"], "float32"), (["predict", "--utilisation", "0"], "--utilisation"),
        (["scale", "--backbone", "nowhere"], "nowhere"), (["fly"], "fly"), ([], "command"),
        (["throughput", "--config", "tiny", "--prefix", "5000", "--agents", "1"], "positions"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(capsys, wrong, said):
    assert bench.main(wrong) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench: ") and said in error and error.count("\n") == 1


def test_whoever_begins_changes_and_medians_count(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    costs = {"ours": [1, 9, 2], "(a)": [5, 4, 70]}

    def taking(name):
        def run():
            order.append(name)
            clock[0] += costs[name][order.count(name) - 1]

        return run

    assert bench.in_turns({name: taking(name) for name in costs}, 3) == {"ours": 2, "(a)": 5}
    assert order == ["ours", "(a)", "(a)", "ours", "ours", "(a)"]


def test_prompts_share_exactly_the_prefix():
    args = bench.parser().parse_args(["throughput", *TINY])
    lm = bench.our_model(args, torch.device("cpu"), end=False)
    ids = bench.random_prompts(lm, args, 7)
    same = (ids == ids[0]).all(axis=0)
    assert ids.shape == (7, 30) and same[:24].all() and not same[24] and ids.min() > 0
    assert lm.generate(ids.tolist(), 2, temperature=0) == [" ".join(text.split()[:2]) for text in lm.generate(ids.tolist(), 3, 0)]


def test_a_long_event_goes_on_with_other_people():
    event = scale.long_event(650)
    assert len(event.actions) == 650 and len({action.agent.id for action in event.actions}) > 300
    assert event.actions[:40] == scale.long_event(40).actions and event.actions[300] != event.actions[0]


def test_scale(capsys, random_folder, tmp_path):
    """Each size in a process of its own; numbers, table, picture. 20 agents in steps of 8 make 3 steps."""
    given = ["--agents", "20", "--worlds", "2", "--world-agents", "9", "--batch", "8", "--new", "5", "--summary", "6"]
    out = tmp_path / "out"
    assert bench.main(["scale", *given, "--threads", "1", "--backbone", str(random_folder), "--out", str(out)]) == 0
    found = json.loads((out / "scale.json").read_text())
    (alone,), (pair,) = found["agents"], found["worlds"]
    assert (alone["agents"], alone["worlds"], alone["steps"]) == (20, 1, 3)
    assert (pair["agents"], pair["worlds"], pair["steps"]) == (9, 2, 2)
    for row in (alone, pair):
        assert 0 < row["loaded"] <= row["rolled"] <= row["peak"] < 2e9 and row["seconds"] > 0
        assert row["new"] > 1 and row["summary"] > 1 and row["listing"] > row["prefix"] and row["told_flops"] > 0
    assert found["exponents"] == {} and (out / "scale.png").read_bytes()[:4] == b"\x89PNG"
    assert [row[:2] for row in cells(capsys.readouterr().out)] == [["20", "1"], ["9", "2"]]


def test_scale_fits_large_sizes_and_says_what_failed(capsys, monkeypatch, random_folder, tmp_path):
    """Exponents are fitted from FITTED_FROM agents on; a child's failure ends the run, and what was measured is kept."""
    row = {"evaluating": 0, "loaded": 1, "rolled": 2, "peak": 3, "files": 4, "prefix": 9, "suffix": 5, "new": 4, "listing": 30,
           "summary": 8, "steps": 5}  # fmt: skip

    def child(command, **_):
        agents, worlds = (int(part.split("=")[1]) for part in command if part.startswith(("--agents", "--worlds")))
        text = json.dumps(row | {"agents": agents, "worlds": worlds, "seconds": 1e-3 * agents * worlds**0.5})
        return scale.subprocess.CompletedProcess(command, {13: 1, 14: 2}.get(agents, 0), text)

    monkeypatch.setattr(scale.subprocess, "run", child)
    common = ["--backbone", str(random_folder), "--out", str(tmp_path / "out")]
    assert bench.main(["scale", "--agents", "10,1000,4000", "--worlds", "1,4", *common]) == 0
    found = json.loads((tmp_path / "out" / "scale.json").read_text())["exponents"]
    assert found == {"agents": pytest.approx(1), "worlds": pytest.approx(0.5)}
    assert "agents ^ 1.000 (from 1000 on)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="13 agents"):
        bench.main(["scale", "--agents", "10,10,13", *common[:2], "--out", str(tmp_path / "other")])
    assert [row["agents"] for row in json.loads((tmp_path / "other" / "scale.json").read_text())["agents"]] == [10, 10]
    with pytest.raises(SystemExit) as ended:  # bad input, of which the child has said what
        bench.main(["scale", "--agents", "14", *common[:2], "--out", str(tmp_path / "third")])
    assert ended.value.code == 2 and not (tmp_path / "third").exists()


def test_predict(capsys):
    assert bench.main(["predict", "--agents", "1000", "--worlds", "2", "--batch", "50,100"]) == 0
    assert [row[:3] for row in cells(capsys.readouterr().out)] == [["2", "50", "10"], ["2", "100", "5"]]
