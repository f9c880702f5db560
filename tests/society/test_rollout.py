from dataclasses import replace

import numpy as np
import pytest

from mfllm_ref.errors import InputError
from mfllm_ref.society import agora, prompts
from mfllm_ref.society.annotate import RuleAnnotator
from mfllm_ref.society.events import Action, Agent, Event, PublicPost
from mfllm_ref.society.methods import METHODS
from mfllm_ref.society.rollout import Rows, Settings, State, World, complete_steps, hashed, rollout

ANNOTATE = RuleAnnotator()
SETTINGS = Settings(agents=34, batch=8, warmup=12, action_tokens=6, summary_tokens=8)
UNTUNED = [METHODS[name] for name in ("state", "recent", "popular", "persistence", "empirical", "mf-llm-no-ib")]


def worlds(*events: Event, methods=UNTUNED, seeds=(0,)) -> list[World]:
    return [World(event, method, seed) for event in events for method in methods for seed in seeds]


def run(lm, worlds_, settings=SETTINGS, **options):
    rows, fields = [], []
    for new in rollout(lm, worlds_, settings, ANNOTATE, **options):
        rows += new.trajectory
        fields += new.mean_field
    return rows, fields


def of(rows, **keys):
    return [row for row in rows if all(row[key] == value for key, value in keys.items())]


@pytest.fixture(scope="module")
def event() -> Event:
    return agora.event("train", 3)


@pytest.fixture(scope="module")
def result(random_lm, event):
    return run(random_lm, worlds(event, agora.event("train", 4)))


def test_every_action_of_every_world_has_one_row(result, event):
    rows, fields = result
    for method in UNTUNED:
        mine = of(rows, event=event.id, method=method.name)
        assert [row["index"] for row in mine] == list(range(34))
        assert [row["step"] for row in mine] == [i // 8 for i in range(34)]
        assert [row["agent"] for row in mine] == [a.agent.id for a in event.actions[:34]]
        assert [row["real_text"] for row in mine] == [a.text for a in event.actions[:34]]
        assert all(row["real_labels"] == ANNOTATE([row["real_text"]], "en")[0] for row in mine)
        assert all(row["labels"] == ANNOTATE([row["text"]], "en")[0] for row in mine)
    assert [row["step"] for row in of(fields, event=event.id)] == [1, 2, 3, 4], "m_t guides step t; m_0 is empty"


def test_a_simulated_action_has_its_authors_reach(event):
    """Where none is given, the popularity of what they did in the warm-up, and nothing else is known of later posts."""
    known, unknown = (Agent(name, reach=reach) for name, reach in (("known", 5.0), ("unknown", None)))
    actions = [Action(agent, "x", float(i), 9.0 + i) for i, agent in enumerate((known, unknown) * 10)]
    actions[15] = replace(actions[15], agent=Agent("unknown", reach=0.0))  # given, so it counts
    state = State(World(replace(event, actions=tuple(actions), posts=()), METHODS["popular"], 0), SETTINGS, {})
    labels = ANNOTATE(["x"] * 8, "en")
    popularity = [seen.popularity for seen in state.seen(1, ["x"] * 8, labels)]
    assert popularity == [17.0, 18.0, 19.0, 20.0, 5.0, 20.0, 5.0, 0.0], "four real ones, then simulated ones"


def test_the_warm_up_is_real_byte_for_byte(result):
    warm = of(result[0], phase="warmup")
    assert {row["index"] for row in warm} == set(range(12))
    assert all(row["text"] == row["real_text"] and row["labels"] == row["real_labels"] for row in warm)


def test_persistence_draws_from_the_warm_up(result, event):
    pool = {action.text for action in event.actions[:12]}
    drawn = [row["text"] for row in of(result[0], event=event.id, method="persistence", phase="rollout")]
    assert set(drawn) <= pool and len(set(drawn)) > 1


def test_no_real_action_after_the_warm_up_is_read(random_lm, event, result):
    """Changing text and popularity of the rollout phase's real actions changes no simulated action and no mean field."""
    lie = tuple(a if i < 12 else replace(a, text=f"lie {i}", popularity=1e9, parent=0) for i, a in enumerate(event.actions))
    rows, fields = run(random_lm, worlds(replace(event, actions=lie)))
    assert [r["text"] for r in rows] == [r["text"] for r in of(result[0], event=event.id)]
    assert fields == of(result[1], event=event.id)


def test_a_warm_up_action_changes_nothing_before_the_next_step(random_lm, event, result):
    actions = list(event.actions)
    actions[9] = replace(actions[9], text="This is a lie, I am furious!")
    rows, fields = run(random_lm, worlds(replace(event, actions=tuple(actions))))
    before = of(result[0], event=event.id)
    same = [(a["text"] == b["text"], a) for a, b in zip(rows, before, strict=True)]
    # Action 9 is in step 1, of which only action 12 on is simulated: those read the signal of step 0 alone. `persistence`
    # draws from the whole warm-up, whatever the step.
    assert all(equal for equal, row in same if row["step"] <= 1 and row["index"] != 9 and row["method"] != "persistence")
    assert not all(equal for equal, row in same if row["step"] >= 2)
    assert of(fields, step=1) == of(result[1], event=event.id, step=1)


def test_worlds_do_not_depend_on_each_other(random_lm, event, result):
    """Given m_t, an action does not depend on which other worlds share the batch, nor on their order."""
    alone = run(random_lm, worlds(event, methods=[METHODS["recent"]]))[0]
    assert alone == of(result[0], event=event.id, method="recent")
    backwards = run(random_lm, worlds(agora.event("train", 4), event, methods=UNTUNED[::-1]))[0]
    for method in UNTUNED:
        assert of(backwards, event=event.id, method=method.name) == of(result[0], event=event.id, method=method.name)


def test_methods_that_tell_an_agent_the_same_get_the_same_action(random_lm, event):
    """Common random numbers: before anything has happened all methods show the same prompt, so all act the same."""
    cold = replace(SETTINGS, warmup=0, agents=8)
    assert hashed(0, event.id, 0, "x") != hashed(1, event.id, 0, "x")
    texts = {}
    methods = [m for m in UNTUNED if not m.resamples]
    for row in run(random_lm, worlds(event, methods=methods), cold)[0]:
        texts.setdefault(row["method"], []).append(row["text"])
    assert len(texts) == len(methods) and len({tuple(t) for t in texts.values()}) == 1


def test_seeds_give_other_futures(random_lm, event):
    rows = run(random_lm, worlds(event, methods=[METHODS["state"]], seeds=(0, 1)))[0]
    one, two = ([r["text"] for r in of(rows, seed=s)] for s in (0, 1))
    assert one[:12] == two[:12] and one[12:] != two[12:]


@pytest.mark.parametrize(("kept", "steps"), [((0, 0, 0), 0), ((1, 0, 0), 0), ((100, 3, 13), 1), ((408, 8, 50), 5)])
def test_an_interrupted_rollout_goes_on_to_the_same_rows(random_lm, event, kept, steps):
    everything = worlds(event, agora.event("train", 4))
    whole = [list(rows) for rows in zip(*map(_files, rollout(random_lm, everything, SETTINGS, ANNOTATE, likelihood=True)))]
    whole = [[row for step in file for row in step] for file in whole]
    assert [len(file) for file in whole] == [408, 8, 50]
    complete, counts = complete_steps(everything, SETTINGS, kept, likelihood=True)
    assert complete == steps and all(a <= b for a, b in zip(counts, kept, strict=True))
    done = Rows(*(file[:n] for file, n in zip(whole, counts, strict=True)))
    again = [list(file) for file in _files(done)]
    for rows in rollout(random_lm, everything, SETTINGS, ANNOTATE, done=done, likelihood=True):
        for file, new in zip(again, _files(rows), strict=True):
            file += new
    assert again == whole


def _files(rows: Rows):
    return rows.trajectory, rows.mean_field, rows.likelihood


def test_an_intervention_that_inserts_nothing_changes_nothing(random_lm, event, result):
    assert run(random_lm, worlds(event), intervention={1: []})[0] == of(result[0], event=event.id)


def test_an_intervention_is_seen_from_the_next_step_on(random_lm, event, result):
    rows, fields = run(random_lm, worlds(event), intervention={2: [("Ada, nurse", "The proof is clear, it is a lie!")]})
    before = of(result[0], event=event.id)
    assert len(rows) == len(before), "inserted actions are in no trajectory"
    changed = {a["step"] for a, b in zip(rows, before, strict=True) if a["text"] != b["text"]}
    assert changed and min(changed) == 3
    mean_fields = of(result[1], event=event.id)
    assert fields[:2] == mean_fields[:2] and fields[2] != mean_fields[2]


def test_public_posts_are_shown_from_their_time_on(random_lm, event):
    methods = [METHODS["state"]]
    plain = replace(event, posts=())
    posted = replace(event, posts=(PublicPost(16, "The ministry denies it."),))
    one, two = (run(random_lm, worlds(e, methods=methods))[0] for e in (plain, posted))
    changed = {a["step"] for a, b in zip(one, two, strict=True) if a["text"] != b["text"]}
    assert changed and min(changed) == 2


def test_twins_score_the_real_actions_given_the_real_past(random_lm, event, result):
    methods = [METHODS["state"], METHODS["recent"], METHODS["mf-llm-no-ib"], METHODS["persistence"]]
    steps = [*rollout(random_lm, worlds(event, methods=methods), SETTINGS, ANNOTATE, likelihood=True)]
    rows = [row for step in steps for row in step.likelihood]
    assert {row["method"] for row in rows} == {"state", "recent", "mf-llm-no-ib"}, "no model, no likelihood"
    mine = of(rows, method="state")
    assert [row["step"] for row in mine] == [0, 1, 2, 3, 4] and mine[0]["tokens"] == 0
    shared = prompts.policy_shared("en", event.topic, [])
    texts = [shared + prompts.policy_private("en", a.agent.profile) for a in event.actions[12:34]]
    spoken = [prompts.continuation(a.text) for a in event.actions[12:34]]
    expected = -random_lm.log_prob(texts, spoken, worlds=[*range(22)], end_of_text=True).sum()
    np.testing.assert_allclose(sum(row["nll"] for row in mine), expected.item(), rtol=1e-9)
    assert sum(row["tokens"] for row in mine) == sum(len(random_lm.tokenizer.encode(text)) + 1 for text in spoken)
    # The twin's summaries are those of a world that never stops warming up, and the simulated worlds do not notice it.
    late = run(random_lm, worlds(event, methods=methods[2:3]), replace(SETTINGS, warmup=33))[1]
    assert [row["text"] for row in of(rows, method="mf-llm-no-ib")][:4] == [row["text"] for row in late]
    assert [row for step in steps for row in step.trajectory if row["method"] == "recent"] == of(
        result[0], event=event.id, method="recent"
    )


def test_summaries_are_drawn_from_their_likeliest_tokens_and_actions_from_all(random_lm, event, monkeypatch):
    drawn, generate = [], type(random_lm).generate

    def recorded(lm, texts, tokens, **options):
        drawn.append((tokens, options.get("top_p", 1)))
        return generate(lm, texts, tokens, **options)

    monkeypatch.setattr(type(random_lm), "generate", recorded)
    for settings, p in ((SETTINGS, prompts.SUMMARY_TOP_P), (replace(SETTINGS, summary_top_p=0.3), 0.3)):
        drawn.clear()
        run(random_lm, worlds(event, methods=[METHODS["mf-llm-no-ib"]]), settings)
        assert set(drawn) == {(SETTINGS.summary_tokens, p), (SETTINGS.action_tokens, 1)}


def test_mean_fields_with_equal_pasts_are_written_once(random_lm, event, monkeypatch):
    asked: list[list[str]] = []
    generate = type(random_lm).generate

    def recorded(lm, texts, tokens, **options):
        if tokens == SETTINGS.summary_tokens:
            asked.append(list(zip(texts, options["seeds"], options["adapters"], strict=True)))
        return generate(lm, texts, tokens, **options)

    monkeypatch.setattr(type(random_lm), "generate", recorded)
    field = METHODS["mf-llm-no-ib"]
    both = worlds(event, methods=[field, replace(field, name="other")], seeds=(0, 1))
    rows = [row for step in rollout(random_lm, both, SETTINGS, ANNOTATE, likelihood=True) for row in step.mean_field]
    # Two methods with two seeds, and twins of the first seed: one question a seed while the past is real.
    assert [len(questions) for questions in asked] == [2, 2 + 1, 2 + 1, 2 + 1] and all(len(set(q)) == len(q) for q in asked)
    assert [row["text"] for row in of(rows, method="other")] == [row["text"] for row in of(rows, method=field.name)]


def test_a_warm_up_that_leaves_nothing_is_refused(random_lm, event):
    with pytest.raises(InputError, match=f"{event.id}.*--warmup 34 leaves none of its 34 actions"):
        run(random_lm, worlds(event), replace(SETTINGS, warmup=34))
    with pytest.raises(InputError, match="--warmup 0.*persistence"):
        run(random_lm, worlds(event), replace(SETTINGS, warmup=0))


def _few_positions(lm, monkeypatch, positions):
    monkeypatch.setattr(lm.backbone, "config", replace(lm.backbone.config, max_positions=positions))


def test_a_prompt_that_is_too_long_tells_less_of_the_oldest(random_lm, event, monkeypatch):
    """Signal first (from its oldest line), then posts; never the profile or the instruction, and one warning in all."""
    posts = (PublicPost(0, "The first news. " * 3), PublicPost(4, "The second news. " * 3))
    some = worlds(replace(event, posts=posts), methods=[METHODS["recent"], METHODS["popular"], METHODS["mf-llm-no-ib"]])
    shown: list[tuple[str, int]] = []
    generate, limit = type(random_lm).generate, 270

    def recorded(lm, texts, tokens, **options):
        shown.extend((text, tokens) for text in texts)
        return generate(lm, texts, tokens, **options)

    monkeypatch.setattr(type(random_lm), "generate", recorded)
    plain = run(random_lm, some)[0]
    full = shown.copy()
    shown.clear()
    _few_positions(random_lm, monkeypatch, limit)
    with pytest.warns(UserWarning, match="part of what it tells of the population is left out"):
        again = run(random_lm, some)[0]
    lengths = [len(random_lm.tokenizer.encode(text)) + tokens for text, tokens in full]
    assert max(lengths) > limit > min(lengths) and len(again) == len(plain)
    assert all(len(random_lm.tokenizer.encode(text)) + tokens <= limit for text, tokens in shown)
    # Before anything simulated was seen, both runs are asked the same but for what had to go.
    shorter = 0
    for (whole, tokens), (part, _) in zip(full[:6], shown[:6], strict=True):
        lines, left = whole.splitlines(), part.splitlines()
        assert [line for line in lines if line in left] == left, "lines are left out, none is changed"
        fixed = 2 if lines[-1] == "Post:" else 1
        assert lines[-fixed:] == left[-fixed:] and lines[:2] == left[:2], "profile, instruction and topic stay"
        shorter += left != lines
        if len(random_lm.tokenizer.encode(whole)) + tokens <= limit - 2:
            assert left == lines
    assert shorter


def test_an_event_whose_shortest_prompt_does_not_fit_is_refused(random_lm, event, monkeypatch):
    _few_positions(random_lm, monkeypatch, 40)
    with pytest.raises(InputError, match=f"{event.id!r}, method recent: .* 40 positions") as error:
        run(random_lm, worlds(event, methods=[METHODS["recent"]]))
    assert "\n" not in str(error.value)
