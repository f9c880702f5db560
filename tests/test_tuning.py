import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch

import train
from mfllm_ref import ib_tune, tuning
from mfllm_ref.errors import InputError
from mfllm_ref.lm import LanguageModel
from mfllm_ref.runs import TIME_FIELDS
from mfllm_ref.simulation import digest
from mfllm_ref.society import agora
from mfllm_ref.society.annotate import RuleAnnotator
from mfllm_ref.society.corpus import Past
from mfllm_ref.society.events import DIMENSIONS
from mfllm_ref.society.prompts import WORDING
from mfllm_ref.society.readers import load_events, write_events
from mfllm_ref.society.response import response_curves
from mfllm_ref.society.signals import parse

ANNOTATE = RuleAnnotator()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six events of 110 actions as JSON Lines."""
    path = tmp_path_factory.mktemp("data") / "events.jsonl"
    events = [agora.event("train", index) for index in range(6)]
    write_events([type(e)(e.id, e.topic, e.domain, e.language, e.actions[:110]) for e in events], path)
    return path


def names(jobs):
    return [(job.name, job.signal, job.mean_field, job.steps) for job in jobs]


def test_stages_and_methods_decide_what_is_tuned():
    both = [("mean-field", None, None, 5), ("policy", "mean-field", "mean-field", 4)]
    rivals = [("sft", "none", None, 9), ("recent-sft", "recent", None, 9), ("popular-sft", "popular", None, 9),
              ("empirical-sft", "empirical", None, 9)]  # fmt: skip
    assert names(tuning.jobs("all", None, (5, 4), [1.0])) == both
    assert names(tuning.jobs("mean-field", None, (5, 4), [1.0])) == both[:1]
    assert names(tuning.jobs("policy", None, (5, 4), [1.0])) == both[1:]
    assert names(tuning.jobs("sft", None, (5, 4), [1.0])) == rivals
    assert names(tuning.jobs("sft", ["recent-sft"], (5, 4), [1.0])) == rivals[1:2]
    assert names(tuning.jobs("policy", ["mf-llm-no-ib-mf"], (5, 4), [1.0])) == [("policy-no-ib-mf", "mean-field", None, 4)]
    assert set(names(tuning.jobs("all", ["all"], (5, 4), [1.0]))) == {*both, *rivals, ("policy-no-ib-mf", "mean-field", None, 4)}
    assert names(tuning.jobs("all", ["all"], (5, 4), [1.0]))[:2] == both, "a policy is tuned on summaries of the mean field before it"
    plane = tuning.jobs("mean-field", None, (5, 4), [0.1, 10.0])
    assert [(job.name, job.beta, job.start) for job in plane] == [
        ("beta-10/mean-field", 10.0, None), ("beta-0.1/mean-field", 0.1, "beta-10/mean-field")
    ]  # fmt: skip
    drawn = [tuning.draws_plane(tuning.jobs("mean-field", None, (5, 4), betas)) for betas in ([1.0], [1.0, 1.0], [0.1, 10.0])]
    assert drawn == [False, True, True], "several betas, be they one"
    close = [job.name for job in tuning.jobs("mean-field", None, (5, 4), [1.00000001, 1.00000002, 1.00000001])]
    assert close == ["beta-1.00000002/mean-field", "beta-1.00000001/mean-field"], "a folder for each, and once"
    wrong = (("all", ["state"]), ("all", ["x"]), ("sft", ["mf-llm"]), ("policy", ["sft"]), ("mean-field", ["sft"]),
             ("policy", ["mf-llm", "sft"]), ("sft", ["mf-llm", "sft"]), ("mean-field", ["mf-llm", "mf-llm-no-ib-mf"]),
             ("policy", ["mf-llm", "mf-llm-no-ib-policy"]))  # fmt: skip
    for stage, methods in wrong:
        for several in ([], [2.0]) if stage == "mean-field" else ([],):
            with pytest.raises(InputError, match="--method"):
                tuning.jobs(stage, methods, (5, 4), [1.0, *several])
    with pytest.raises(InputError, match="--beta"):
        tuning.jobs("all", None, (5, 4), [1.0, 2.0])


def test_events_that_select_are_not_tuned_on(data):
    events = [agora.event("train", index) for index in range(12)]
    tuned, dev = tuning.choose_events(events, [events[0].id], None, 10, ANNOTATE)
    ids = [past.event.id for past in (*tuned, *dev)]
    assert len(set(ids)) == len(ids) == 11 and events[0].id not in ids and len(dev) == 2
    assert len(tuning.choose_events(events, [], [], 10, ANNOTATE)[0]) < 3, "the fifth that pretraining left"
    named = [event.id for event in events[:3]]
    (one,), (other,) = tuning.choose_events(events, named[:1], named, 10, ANNOTATE)
    assert {one.event.id, other.event.id} == set(named[1:]), "those that pretraining was told to leave"
    assert {past.half_life for some in tuning.choose_events(events, [], None, 10, ANNOTATE, 960) for past in some} == {960}
    for few in ([], events[:1]):
        with pytest.raises(InputError, match="empty split"):
            tuning.choose_events(few, [], None, 10, ANNOTATE)
    with pytest.raises(InputError, match="1 with over 20 actions .* as pretraining has read 5; two are needed"):
        tuning.choose_events(events[:6], [], [], 10, ANNOTATE)
    short = [replace(event, actions=event.actions[:30]) for event in events]
    with pytest.raises(InputError, match="over 3 steps"):  # and so no chain of a mean field's on a dev event would end early
        tuning.choose_events(short, [], None, 10, ANNOTATE)
    with pytest.raises(InputError, match="--leave-out nobody"):
        tuning.choose_events(events, ["nobody"], None, 10, ANNOTATE)
    ids = [past.event.id for past in dev]
    cut = [replace(event, actions=event.actions[:25]) if event.id in ids else event for event in events]
    assert not {past.event.id for past in tuning.choose_events(cut, [], None, 10, ANNOTATE)[1]} & set(ids), "too short to select"


@pytest.mark.parametrize(("pretrained_on", "pretrained"), [("the same", ["a"]), ("other data", None), (None, None)])
def test_only_what_pretraining_has_seen_is_left_out(data, tmp_path, monkeypatch, door, pretrained_on, pretrained):
    """Data is what it says, wherever it lies: a backbone has seen four fifths of its own and none of other data."""

    def chosen(events, leave_out, pretrained, *rest):
        raise InputError(f"left out: {pretrained}")

    monkeypatch.setattr(tuning, "choose_events", chosen)
    moved = tmp_path / "moved"  # a folder instead of a file, with the backbone in it
    moved.mkdir()
    (moved / "events.jsonl").write_bytes(data.read_bytes())
    digests = {"the same": {"events": digest(load_events(data))}, "other data": {"events": "ab"}, None: {}}[pretrained_on]
    settings = {"stage": "pretrain", "data": pretrained_on and str(data), "leave_out": ["a"]}
    backbone = moved / "backbone"
    backbone.mkdir()
    (backbone / "run.json").write_text(json.dumps({"settings": settings, "sha256": digests}))
    assert f"left out: {pretrained}" in door("--data", moved, "--backbone", backbone, "--threads", 1, "--out", tmp_path / "out")[2]


OPTIONS = ("--steps", "3,4", "--rows", 2, "--micro", 1, "--samples", 2, "--save-every", 2, "--threads", 1, "--rank", 2, "--summary-tokens", 8)


@pytest.fixture
def options(data, shallow_folder, monkeypatch):
    compare = tuning.compare  # small, as the random model's texts say nothing
    monkeypatch.setattr(tuning, "compare", lambda *a: compare(*a[:-1], replace(a[-1], action_tokens=2, summary_tokens=2)))
    monkeypatch.setattr(tuning, "SHOWN", 1)
    monkeypatch.setattr(tuning, "response_curves", partial(response_curves, agents=3, action_tokens=4))
    return ["--data", data, "--backbone", shallow_folder, *OPTIONS]


def test_a_run_writes_adapters_logs_and_pictures_and_resumes_to_the_same_bytes(options, tmp_path, monkeypatch, door):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = ["--method", "mf-llm,empirical-sft,mf-llm-no-ib-mf", "--steps", "2,2", "--save-every", 1]
    written, learned, summaries, update = [], [], ib_tune.summaries, ib_tune.policy_update
    with monkeypatch.context() as patch:
        patch.setattr(ib_tune, "summaries", lambda *a: (written.append(a[2]), summaries(*a))[1])
        patch.setattr(ib_tune, "policy_update", lambda *a: (learned.append(a), update(*a))[1])
        code, said, _ = door(*options, *more, "--out", whole)
    assert code == 0
    adapters = ("mean-field", "policy", "policy-no-ib-mf", "empirical-sft")
    lm = LanguageModel.load(options[3])
    for name in adapters:
        lm.load_adapter(name, whole / name)
    assert written == ["mean-field"] * 2 + [None] * 2, "a policy's summaries are the tuned mean field's, of train and dev events"
    for _, documents, adapter, named in learned:
        if adapter != "empirical-sft":
            texts = json.loads((whole / "summaries" / f"{adapter}.train.json").read_text())
            for document, (event, step) in zip(documents, (place.split(" step ") for place in named.split(", ")), strict=True):
                assert document.event == event and texts[event][int(step)] in document.prefix
    *rows, last = [json.loads(line) for line in open(whole / "log.jsonl")]
    assert [row["step"] for row in rows if row["stage"] == "mean-field"] == [0, 1, 2]
    assert [row["step"] for row in rows if row["stage"] == "empirical-sft"] == list(range(5)), "as many as both stages"
    for row in rows:
        if "loss" in row:
            assert {"reward", "action_nll", "gradient_norm", "tokens_per_second"} <= set(row)
            assert ("kl" in row) == (row["stage"] == "mean-field")
    assert all((whole / name).stat().st_size > 5000 for name in ("loss.png", "response.png"))
    record = json.loads((whole / "run.json").read_text())
    assert set(record["response"]) == {"before", "after"} and record["status"] == "finished"
    before_and_after = ("state", "persistence", "mf-llm-no-ib", "mf-llm")
    assert tuple(record["kl"]) == before_and_after and all(0 < kl < 3 for kl in record["kl"].values())
    first = [line.split(" ")[0] for line in said.splitlines()]
    assert [word for word in first if word in before_and_after] == [*before_and_after], "the table"
    assert last == {key: record[key] for key in ("response", "kl")}, "the log's last word: how what is acted follows what is said"

    saves, save = [0], tuning.save_state
    for stop in (1, 1, 2):  # each run is cut at another of its states

        def interrupted(*arguments, stop=stop, **groups):
            save(*arguments, **groups)
            saves[0] += 1
            if saves[0] == stop:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(tuning, "save_state", interrupted)
            saves[0] = 0
            assert door(*options, *more, "--out", cut, "--resume")[0] == 130
    code, _, said = door(*options, *more, "--beta", 2, "--out", cut, "--resume")
    assert code == 2 and "beta" in said
    assert door(*options, *more, "--out", cut, "--resume")[0] == 0
    for name in adapters:
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (cut / name / file).read_bytes() == (whole / name / file).read_bytes(), name
    again = [json.loads(line) for line in open(cut / "log.jsonl")]
    timeless = [[{k: v for k, v in row.items() if k not in TIME_FIELDS} for row in some] for some in ([*rows, last], again)]
    assert timeless[0] == timeless[1]
    assert not (cut / "state.safetensors").exists()
    assert door(*options, *more, "--out", cut, "--resume")[0] == 0, "a finished run stays as it is"


@pytest.mark.parametrize(("file", "content", "said"), [
    ("log.jsonl", b"", "has 0 of"), ("log.jsonl", b'{"a": 1}\ngarbage\n', "has 1 of"),
    ("summaries/policy.train.json", b"{}", "needs 11 summaries"), ("summaries/policy.train.json", b"[]", "must be a JSON object"),
    ("summaries/policy.train.json", ..., "needs 11 summaries"),
])  # fmt: skip
def test_what_is_damaged_is_named_and_stays_as_it_is(options, tmp_path, monkeypatch, door, file, content, said):
    save, out = tuning.save_state, tmp_path / "out"

    def interrupted(path, facts, **groups):
        save(path, facts, **groups)
        if facts["job"] == "policy" and facts["step"]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "save_state", interrupted)
        assert door(*options, "--steps", "2,4", "--out", out)[0] == 130
    if content is ...:  # one summary less
        texts = json.loads((out / file).read_bytes())
        content = json.dumps(texts | {next(iter(texts)): next(iter(texts.values()))[1:]}).encode()
    (out / file).write_bytes(content)
    before = {path: path.read_bytes() for path in out.rglob("*.safetensors")}
    code, _, errors = door(*options, "--steps", "2,4", "--out", out, "--resume")
    assert code == 2 and said in errors and file in errors and len(errors.splitlines()) == 1
    assert {path: path.read_bytes() for path in out.rglob("*.safetensors")} == before


def test_the_version_selected_before_a_break_is_the_one_kept(options, tmp_path, monkeypatch, door):
    more = [*options, "--stage", "sft", "--method", "sft", "--steps", "2,2", "--save-every", 3]
    assert door(*more, "--out", tmp_path / "plain")[0] == 0
    losses = [json.loads(line)["dev_loss"] for line in open(tmp_path / "plain" / "log.jsonl")]
    monkeypatch.setattr(tuning, "finite", lambda what, value: abs(value - losses[1]))  # of five versions the second is the best
    assert door(*more, "--out", tmp_path / "whole")[0] == 0
    save = tuning.save_state

    def interrupted(*arguments, **groups):
        save(*arguments, **groups)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "save_state", interrupted)
        assert door(*more, "--out", tmp_path / "cut")[0] == 130
    assert door(*more, "--out", tmp_path / "cut", "--resume")[0] == 0
    plain, whole, cut = ((tmp_path / name / "sft" / "adapter_model.safetensors").read_bytes() for name in ("plain", "whole", "cut"))
    assert whole == cut != plain


def test_several_betas_draw_the_information_plane(options, tmp_path, monkeypatch, door):
    assert door(*options, "--stage", "sft", "--method", "sft", "--out", tmp_path / "sft")[0] == 0
    sft = tmp_path / "sft" / "sft"
    out = tmp_path / "plane"
    scored, found, draw, information = set(), [], ib_tune.draw, ib_tune.information
    monkeypatch.setattr(ib_tune, "draw", lambda *a: (scored.add((type(a[5]), a[7])), draw(*a))[1])
    monkeypatch.setattr(ib_tune, "information", lambda *a: (found.append(information(*a)), found[-1])[1])
    more = ["--sft-adapter", sft, "--policy-adapter", sft, "--out", out]
    code, said, _ = door(*options, "--stage", "mean-field", "--beta", "0.1,10", *more)
    assert code == 0 and "see loss.png and information_plane.png" in said
    assert scored == {(int, "policy"), (str, "policy")}, "that policy's likelihood is the reward, in updates and in selection"
    record = json.loads((out / "run.json").read_text())
    for point, measured in zip([record["untuned"], *record["plane"]], found[-3:], strict=True):
        assert point["gain"] == measured["reward"] - measured["blind"] != 0
    assert [point["beta"] for point in record["plane"]] == [10.0, 0.1]
    first = {row["stage"]: row["dev_loss"] for row in map(json.loads, open(out / "log.jsonl")) if row.get("step") == 0}
    # L_mu of what each begins as: the untuned one, and the version that was selected before it
    for (place, beta), begun in zip((("beta-10/mean-field", 10.0), ("beta-0.1/mean-field", 0.1)), found[-3:], strict=False):
        assert first[place] == pytest.approx(begun["kl"] - beta * begun["reward"])
    assert all(point["kl"] > 0 for point in (*record["plane"], record["untuned"]))
    assert (out / "information_plane.png").stat().st_size > 5000
    assert (out / "beta-10" / "mean-field" / "adapter_config.json").exists()


def test_half_of_the_populations_are_made_up_where_half_are_asked_for(data, options, tmp_path, monkeypatch, door):
    """Made-up populations are no real steps, and an agent who is told nothing has none."""
    seen, update = {}, ib_tune.policy_update

    def watched(lm, documents, adapter, named):
        seen.setdefault(adapter, []).extend(documents)
        return update(lm, documents, adapter, named)

    monkeypatch.setattr(ib_tune, "policy_update", watched)
    methods = ["--stage", "sft", "--method", "sft,recent-sft", "--steps", 1, "--rows", 8, "--micro", 8]
    assert door(*options, *methods, "--reweighted", 0.5, "--out", tmp_path / "out")[0] == 0
    pasts = [Past(event, ANNOTATE, 10) for event in load_events(data)]
    for adapter, kind, least, most in (("sft", "none", 0, 0), ("recent-sft", "recent", 0.25, 0.75)):
        real = {past.policy(step, kind, 10) for past in pasts for step in range(past.steps)}
        assert least <= sum(document not in real for document in seen[adapter]) / len(seen[adapter]) <= most


def test_a_made_up_population_is_told_as_a_mean_field_tells_it(options, tmp_path, monkeypatch, door):
    seen, update = [], ib_tune.policy_update
    monkeypatch.setattr(ib_tune, "policy_update", lambda lm, documents, *rest: (seen.extend(documents), update(lm, documents, *rest))[1])
    methods = ["--stage", "policy", "--method", "mf-llm-no-ib-mf"]
    assert door(*options, *methods, "--reweighted", 1, "--out", tmp_path / "out")[0] == 0
    assert len(seen) == 8  # four updates of two rows
    for document in seen:
        (line,) = [line for line in document.prefix.splitlines() if line.startswith(WORDING["en"].population)]
        assert set(parse(line.removeprefix(WORDING["en"].population), "en")) == set(DIMENSIONS) and len(document.branches) == 10


@pytest.mark.parametrize(("stage", "make"), [("sft", "policy_update"), ("mean-field", "mean_field_update")])
def test_numbers_that_become_nan_name_step_and_batch_and_leave_the_best_adapter(options, tmp_path, monkeypatch, door, stage, make):
    """Met first by the language model, or its sampler: one line, the log up to there, and the best version of those looked at."""
    versions, made = [], getattr(ib_tune, make)

    def poisoned(lm, *rest):
        parameters = lm.adapters.parameters(stage)
        versions.append([p.detach().clone() for p in parameters])
        if len(versions) == 4:
            parameters[0].detach().fill_(torch.nan)
        return made(lm, *rest)

    monkeypatch.setattr(ib_tune, make, poisoned)
    monkeypatch.setattr(tuning, "SELECTIONS", 3)  # looked at: 0 and 2
    out = tmp_path / "out"
    method = {"sft": "sft", "mean-field": "mf-llm"}[stage]
    code, _, said = door(*options, "--stage", stage, "--method", method, "--steps", "7,1", "--lr", 0.02, "--out", out)
    assert code == 2 and "logits are not finite at step 3 (agora-train" in said and len(said.splitlines()) == 1
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    log = [json.loads(line) for line in open(out / "log.jsonl")]
    assert [("loss" in row, "dev_loss" in row) for row in log] == [(True, True), (True, False), (True, True)]
    assert log[2]["dev_loss"] < log[0]["dev_loss"], "so that the untouched version is not the best"
    lm = LanguageModel.load(options[3])
    lm.load_adapter(stage, out / stage)
    assert all(torch.equal(p, q) for p, q in zip(lm.adapters.parameters(stage), versions[2], strict=True))


@pytest.mark.parametrize(("arguments", "said"), [
    (["--beta", "0"], "--beta 0"), (["--beta", "1,-2", "--stage", "mean-field"], "--beta -2"), (["--beta", "x"], "--beta"),
    (["--beta", "nan"], "--beta nan"),
    (["--samples", "1"], "--samples 1"), (["--method", "state"], "--method"), (["--stage", "policy"], "--mean-field-adapter"),
    (["--stage", "sft", "--policy-adapter", "x"], "--policy-adapter x: stage sft reads none"),
    (["--leave-out", "nobody"], "--leave-out nobody"), (["--split", "nowhere"], "nowhere"), (["--clip", "0"], "--clip 0"),
    (["--clip", "inf"], "--clip inf"), (["--repetition-penalty", "inf"], "--repetition-penalty inf"),
    (["--reweighted", "1.5"], "--reweighted 1.5"), (["--reweighted", "nan"], "--reweighted nan"),
    (["--beta", "1,2", "--stage", "mean-field"], "--sft-adapter"), (["--method", "sft, x"], "--method 'x'"),
    (["--stage", "pretrain"], "is for tuning; --stage pretrain does not read it"), (["--dropout", "0.1"], "--dropout is for pretraining"),
    (["--method", ""], "--method ''"), (["--summary-tokens", "99999"], "--summary-tokens 99999"),
    (["--summary-tokens", "2000"], "event 'agora-train-"), (["--rank", "100000000000"], "--rank"),
])  # fmt: skip
def test_bad_options_are_one_line(options, tmp_path, arguments, said, door):
    code, _, errors = door(*options, *arguments, "--out", tmp_path / "out")
    assert code == 2 and said in errors and len(errors.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_adapter_for_another_backbone_is_refused_by_name_and_shape(options, tmp_path, door):
    other = LanguageModel.load(train.doors.CHECKPOINTS / "tiny")
    other.add_adapter("mean-field", rank=2)
    other.save_adapter("mean-field", tmp_path / "mean-field")
    code, _, errors = door(*options, "--stage", "policy", "--mean-field-adapter", tmp_path / "mean-field", "--out", tmp_path / "out")
    assert code == 2 and "q_proj" in errors and "192" in errors and len(errors.splitlines()) == 1


def test_what_may_not_fit_is_refused_before_tuning(monkeypatch, random_lm):
    """By bytes, not characters: a step of emoji beside longer ASCII posts. The summary before may be the exact shares' words."""
    event = agora.event("train", 0)
    many = [replace(action, text="\U0001f98a" * 40) for action in event.actions[10:20]]
    past = Past(replace(event, id="emoji", actions=(*event.actions[:10], *many, *event.actions[20:60])), ANNOTATE, 10)
    encode, jobs = random_lm.tokenizer.encode, tuning.jobs("mean-field", None, (1, 1), [1.0])
    longest = max(len(encode(past.summarise(step, ""))) for step in range(past.steps - 1))
    told = max(len(encode(text)) for text in past.population)
    for summary_tokens in (8, told + 50):
        fits = longest + max(told, summary_tokens) + summary_tokens
        for positions in (fits, fits - 1):
            monkeypatch.setattr(random_lm.backbone, "config", replace(random_lm.backbone.config, max_positions=positions))
            with nullcontext() if positions == fits else pytest.raises(InputError, match="event 'emoji': a prompt of .* more than the"):
                tuning.check_room(random_lm, [past], jobs, summary_tokens)
