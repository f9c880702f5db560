"""Invariants of the mean-field update and the rollout, in float64, where no token depends on the batch.

Each test states its invariant in words; `mutants.py` shows for each that it can fail. Examples are not shrunk: they are tiny
as they are, and a mutant should fail at once.
"""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from mfllm_ref import metrics, runs
from mfllm_ref.lm import language_model, worlds
from mfllm_ref.society import agora, rollout
from mfllm_ref.society.annotate import RuleAnnotator
from mfllm_ref.society.events import DIMENSIONS, Action, Agent, Event, PublicPost, action_ids
from mfllm_ref.society.methods import METHODS, Method
from mfllm_ref.society.rollout import Rows, Settings, World
from mfllm_ref.society.signals import History, Seen

ROOT = Path(__file__).resolve().parents[2]
ANNOTATE = RuleAnnotator()


def check(examples: int) -> settings:
    phases = (Phase.explicit, Phase.generate)
    return settings(deadline=None, derandomize=True, database=None, max_examples=examples, phases=phases)


POSTS = (
    "", "I support this.", "This is a lie, I am furious!", "Is there any proof?", "Everyone should read this.",
    "The ministry confirmed it on Monday.", "I am afraid of what comes.", " padded \t", "两岸🕯️ 'x'\u2028y",
)  # fmt: skip
TEXTS = st.sampled_from(POSTS) | st.text(alphabet=st.characters(codec="utf-8"), max_size=9)
REACH = st.sampled_from([0.0, 7.0, 1e5])
# `recent` is about order, and `persistence` has no model.
TOLD = [METHODS[name] for name in ("state", "recent", "popular", "empirical", "mf-llm-no-ib")]
ALL = [*TOLD, METHODS["persistence"]]


@st.composite
def societies(draw, least_warmup: int = 1, **fixed) -> tuple[Event, Settings]:
    """A small event whose authors may act again, and settings: warm-up and batch that need not fit each other."""
    agents = [Agent(f"u{i}", draw(TEXTS), draw(st.none() | REACH)) for i in range(8)]
    actions = []
    for index in range(draw(st.integers(8, 13))):
        parent = draw(st.none() | st.integers(0, index - 1)) if index else None
        agent = agents[draw(st.integers(0, len(agents) - 1))]
        actions.append(Action(agent, draw(TEXTS), float(index), draw(REACH), parent))
    posts = (PublicPost(draw(st.integers(0, 8)), draw(TEXTS)),)
    event = Event(f"e{draw(st.integers(0, 99))}", "A dam leaks " + draw(TEXTS), "news", "en", tuple(actions), posts)
    warmup = fixed.pop("warmup", None)
    warmup = draw(st.integers(least_warmup, len(actions) - 2)) if warmup is None else warmup
    fixed = {"batch": draw(st.integers(2, 5)), "action_tokens": 4, "summary_tokens": 6, **fixed}
    return event, Settings(warmup=warmup, **fixed)


def run(lm, worlds_, options, **more) -> tuple[list[dict], list[dict]]:
    """The rows of trajectory and mean field."""
    out: tuple[list[dict], list[dict]] = ([], [])
    for rows in rollout.rollout(lm, worlds_, options, ANNOTATE, **more):
        out[0].extend(rows.trajectory)
        out[1].extend(rows.mean_field)
    return out


def cast(event, methods, seeds=(0,)) -> list[World]:
    return [World(event, method, seed) for method in methods for seed in seeds]


def steps_of(event, options) -> list[range]:
    count = len(event.actions)
    return [range(i, min(i + options.batch, count)) for i in range(0, count, options.batch)]


def texts(rows) -> list:
    return [(row["method"], row["index"], row["text"]) for row in rows]


def seen(labels, index=0, **known) -> Seen:
    return Seen(**{"id": f"a#{index}", "index": index, "profile": "", "text": f"text {index}", "labels": labels,
                   "popularity": 0.0, **known})  # fmt: skip


LABELS = st.fixed_dictionaries({dimension: st.sampled_from(names) for dimension, names in DIMENSIONS.items()})


# ---- (1) exchangeability


@check(10)
@given(societies(), st.data())
def test_agents_of_a_step_are_exchangeable(random_lm, society, data):
    """Permuting the agents of a step permutes that step's actions and leaves m_{t+1} and all that follows unchanged.

    `recent` is about order and exempt. In the step where the warm-up ends, its agents are permuted among themselves.
    """
    event, options = society
    span = data.draw(st.sampled_from(steps_of(event, options)))
    order = list(range(len(event.actions)))
    for some in ([i for i in span if i < options.warmup], [i for i in span if i >= options.warmup]):
        for place, old in zip(some, data.draw(st.permutations(some)), strict=True):
            order[place] = old
    place = {old: new for new, old in enumerate(order)}
    actions = [event.actions[old] for old in order]
    actions = tuple(replace(a, parent=None if a.parent is None else place[a.parent]) for a in actions)
    methods = [method for method in ALL if method.signal != "recent"]
    before, after = (run(random_lm, cast(e, methods), options) for e in (event, replace(event, actions=actions)))
    assert after[1] == before[1]
    acted = [Counter((r["method"], r["step"], r["agent"], r["text"]) for r in rows) for rows, _ in (before, after)]
    assert acted[0] == acted[1]


@check(25)
@given(st.lists(st.lists(st.tuples(LABELS, REACH), min_size=1, max_size=7), min_size=2, max_size=9), st.randoms())
def test_a_population_is_told_the_same_in_whatever_order_its_steps_came(steps, random):
    """Signals but `recent` do not depend on the order within steps, wherever the window of the newest actions cuts."""
    one, two = History(5), History(5)
    for k, step in enumerate(steps):
        actions = [seen(labels, 10 * k + i, popularity=reach) for i, (labels, reach) in enumerate(step)]
        one.update(actions)
        two.update(random.sample(actions, len(actions)))
        for kind in ("popular", "empirical"):
            assert one.signal(kind, "en") == two.signal(kind, "en")


# ---- (2) conditional independence


@check(4)
@given(societies(), st.permutations(range(2 * len(ALL))), st.integers(1, 2 * len(ALL)))
def test_a_world_does_not_depend_on_the_worlds_beside_it(random_lm, society, order, count):
    """Given m_t, an action does not depend on which other worlds share the batch, nor on their order."""
    event, options = society
    everything = cast(event, ALL, seeds=(0, 1))
    rows, fields = run(random_lm, everything, options)
    chosen = [everything[k] for k in order[:count]]
    fewer = run(random_lm, chosen, options)
    names = {(world.method.name, world.seed) for world in chosen}
    for mine, others in zip(fewer, (rows, fields), strict=True):
        expected = [row for row in others if (row["method"], row["seed"]) in names]
        key = lambda row: (row["method"], row["seed"], row["step"], row.get("index", 0))  # noqa: E731
        assert sorted(mine, key=key) == sorted(expected, key=key)


@check(8)
@given(societies(least_warmup=0), st.data())
def test_an_agent_does_not_depend_on_the_agents_beside_it(random_lm, society, data):
    """Given m_t, an action does not depend on which other agents act in the same step."""
    event, options = society
    step = options.warmup // options.batch
    first = range(options.warmup, min((step + 1) * options.batch, len(event.actions)))
    kept = data.draw(st.lists(st.sampled_from(first), min_size=1, unique=True).map(sorted))
    fewer = replace(event, actions=tuple(event.actions[i] for i in [*range(options.warmup), *kept]))
    spoken = []
    for e in (event, fewer):
        ids = action_ids(e.actions)
        rows = run(random_lm, cast(e, TOLD), replace(options, agents=min(len(e.actions), first.stop)))[0]
        spoken.append({(r["method"], ids[r["index"]]): r["text"] for r in rows if r["phase"] == "rollout"})
    assert spoken[1].items() <= spoken[0].items() and len(spoken[1]) == len(kept) * len(TOLD)


@check(5)
@given(societies(), st.sampled_from([2**11, 2**13, 2**30]), st.integers(700, 9000), st.integers(16, 200), st.integers(1, 9))
def test_an_agent_does_not_depend_on_how_work_is_cut(random_lm, society, cache, logits, packed, growth):
    """Given m_t, an action does not depend on the sizes of the batches that the language model computes in."""
    event, options = society
    whole = run(random_lm, cast(event, TOLD), options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_model, "CACHE_BYTES", cache)
        patch.setattr(language_model, "LOGITS", logits)
        patch.setattr(language_model, "GROWTH", growth)
        patch.setattr(worlds, "PACKED", (packed, packed))
        assert run(random_lm, cast(event, TOLD), options) == whole


PROCESS = """
import json, sys, torch
from mfllm_ref.lm import LanguageModel
from mfllm_ref.society import agora, methods, rollout
from mfllm_ref.society.annotate import RuleAnnotator
torch.set_num_threads(int(sys.argv[2]))
lm = LanguageModel.load(sys.argv[1], dtype=torch.float64)
options = rollout.Settings(agents=16, batch=4, warmup=4, action_tokens=4, summary_tokens=6)
worlds = [rollout.World(agora.event("train", 3), methods.METHODS[name], 0) for name in sys.argv[3:]]
print(json.dumps([row for rows in rollout.rollout(lm, worlds, options, RuleAnnotator()) for row in rows.trajectory]))
"""


def test_an_agent_does_not_depend_on_how_many_processes_share_the_work(random_lm, random_folder):
    """A process with half of the methods and another number of threads writes what one process writes of them."""
    names = [method.name for method in ALL[2:5]]
    command = [sys.executable, "-c", PROCESS, str(random_folder), str(torch.get_num_threads() + 1), *names]
    other = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    options = Settings(agents=16, batch=4, warmup=4, action_tokens=4, summary_tokens=6)
    rows, _ = run(random_lm, cast(agora.event("train", 3), ALL), options)
    assert json.loads(other.communicate()[0]) == [row for row in rows if row["method"] in names]


# ---- (3) causality


@check(8)
@given(societies(), st.data())
def test_no_real_action_after_the_warm_up_is_read(random_lm, society, data):
    """Changing text, label, popularity or parent of any real action of the rollout phase changes no simulated action and
    no mean field at any step."""
    event, options = society
    changed = data.draw(st.lists(st.integers(options.warmup, len(event.actions) - 1), min_size=1, unique=True))
    actions = list(event.actions)
    for i in changed:
        labels, parent = data.draw(LABELS), data.draw(st.none() | st.integers(0, i - 1))
        actions[i] = replace(actions[i], text=f"lie {i}", labels=labels, popularity=1e9, parent=parent)
    before, after = (run(random_lm, cast(e, ALL), options) for e in (event, replace(event, actions=tuple(actions))))
    assert texts(after[0]) == texts(before[0]) and after[1] == before[1]


@check(8)
@given(societies(), st.data())
def test_a_warm_up_action_changes_nothing_before_its_step_is_over(random_lm, society, data):
    """Changing a warm-up action of step t changes no other action of steps up to t and no mean field up to m_t."""
    event, options = society
    changed = data.draw(st.integers(0, options.warmup - 1))
    step = changed // options.batch
    actions = list(event.actions)
    actions[changed] = replace(actions[changed], text="lie, a lie!", popularity=1e9, parent=None)
    methods = [method for method in ALL if not method.resamples]  # persistence is the warm-up, from its first action on
    before, after = (run(random_lm, cast(e, methods), options) for e in (event, replace(event, actions=tuple(actions))))
    early = [[r for r in rows if r["step"] <= step and r["index"] != changed] for rows, _ in (before, after)]
    assert early[0] == early[1]
    assert [r for r in before[1] if r["step"] <= step] == [r for r in after[1] if r["step"] <= step]


@check(10)
@given(societies(), st.data())
def test_a_mean_field_depends_on_the_past_through_the_last_one_alone(random_lm, society, data):
    """m_t depends only on (c, m_{t-1}, s_{t-1}, a_{t-1}, seed): with m_{t-1} given, another past changes nothing from step
    t-1 on."""
    event, options = society
    world = cast(event, [METHODS["mf-llm-no-ib"]])
    steps = list(rollout.rollout(random_lm, world, options, ANNOTATE))
    assume(len(steps) > 2)
    given_ = data.draw(st.integers(1, len(steps) - 2))
    past = [row for rows in steps[:given_] for row in rows.trajectory]
    fields = [row for rows in steps[:given_] for row in rows.mean_field]
    other = [{**row, "text": data.draw(TEXTS)} for row in past]
    others = [{**row, "text": f"summary {row['step']}"} for row in fields[:-1]] + fields[-1:]
    again = rollout.rollout(random_lm, world, options, ANNOTATE, done=Rows(other, others))
    assert list(again) == steps[given_:]


# ---- (4) warm-up


@check(10)
@given(societies())
def test_warm_up_texts_are_the_real_ones_byte_for_byte(random_lm, society):
    """The first W actions of every method are the event's own, to the byte, in memory and in the file's JSON."""
    event, options = society
    for row in run(random_lm, cast(event, ALL), options)[0]:
        real = event.actions[row["index"]].text.encode()
        assert (row["phase"] == "warmup") == (row["index"] < options.warmup)
        if row["phase"] == "warmup":
            assert row["text"].encode() == real and json.loads(runs._json(row))["text"].encode() == real


# ---- (5) fixed point and (8) scaling


@check(40)
@given(st.lists(LABELS, min_size=1, max_size=8), st.lists(st.integers(1, 5), min_size=2, max_size=12), st.randoms())
def test_a_population_that_does_not_change_is_a_fixed_point(step, heads, random):
    """Under a population whose every step has the same label shares the exact empirical signal stays where it is, to the
    bit, however many agents the steps have."""
    history, told = History(len(step)), []
    for times in heads:
        rows = random.sample(step * times, len(step) * times)
        history.update([seen(labels, i) for i, labels in enumerate(rows)])
        told.append({dimension: p.tobytes() for dimension, p in history.population().items()})
    assert all(shares == told[0] for shares in told)


@check(40)
@given(st.lists(st.lists(LABELS, min_size=1, max_size=6), min_size=1, max_size=6), st.integers(2, 5))
def test_duplicating_every_agent_leaves_the_empirical_shares_unchanged(steps, k):
    """Having every agent k times within its step leaves the unsmoothed empirical shares unchanged: the signal's, to the
    bit, and those that measures are made of."""
    once, often = History(3), History(3)
    for step in steps:
        once.update([seen(labels, i) for i, labels in enumerate(step)])
        often.update([seen(labels, i) for i, labels in enumerate(step * k)])
        for dimension, shares in once.population().items():
            assert np.array_equal(shares, often.population()[dimension])
    ids = np.repeat(np.arange(len(steps)), [len(step) for step in steps])
    codes = metrics.encode([labels for step in steps for labels in step])
    repeated = metrics.label_shares(np.repeat(codes, k, axis=0), np.repeat(ids, k))
    assert np.array_equal(metrics.label_shares(codes, ids), repeated)


# ---- (7) interventions and (9) common random numbers


@check(6)
@given(societies(), st.dictionaries(st.integers(0, 4), st.just(()), min_size=1))
def test_an_intervention_that_inserts_nothing_changes_nothing(random_lm, society, nothing):
    """With no action inserted, in whatever steps, rows and mean fields are those without an intervention."""
    event, options = society
    assert run(random_lm, cast(event, ALL), options, intervention=nothing) == run(random_lm, cast(event, ALL), options)


@check(8)
@given(societies(), st.data())
def test_an_intervention_changes_nothing_before_it_is_seen(random_lm, society, data):
    """The noise is the same with and without an intervention: up to the step it is inserted in, so are the actions."""
    event, options = society
    step = data.draw(st.integers(0, 2))
    inserted = {step: [(data.draw(TEXTS), data.draw(TEXTS))]}
    pair = [run(random_lm, cast(event, ALL), options, intervention=given_) for given_ in (inserted, None)]
    for one, two in zip(*pair, strict=True):
        assert [r for r in one if r["step"] <= step] == [r for r in two if r["step"] <= step]


@check(8)
@given(societies(least_warmup=0), st.sampled_from([method.signal for method in TOLD]), st.data())
def test_methods_that_show_an_agent_the_same_prompt_get_the_same_action(random_lm, society, signal, data):
    """Common random numbers: whatever else is simulated, equal prompts for one agent of one event, step and seed mean equal
    actions, whoever shows them: a method under another name, or another method before there is anything to tell."""
    event, options = society
    twins = [Method("a", signal), *data.draw(st.permutations(TOLD)), Method("z", signal)]
    shown: dict[tuple, dict[str, str]] = {}
    original = rollout.State.policy_prompts

    def recorded(state, step, indices, drop):
        prompts = original(state, step, indices, drop)
        for i, prompt in zip(indices, prompts, strict=True):
            shown.setdefault((step, i), {})[state.world.method.name] = prompt
        return prompts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout.State, "policy_prompts", recorded)
        rows = run(random_lm, cast(event, twins), options)[0]
    acted: dict[tuple, dict[str, str]] = {}
    for row in rows:
        if row["phase"] == "rollout":
            acted.setdefault((row["step"], row["index"]), {})[row["method"]] = row["text"]
    for place, prompts in shown.items():
        assert prompts["a"] == prompts["z"]
        by_prompt: dict[str, set[str]] = {}
        for method, prompt in prompts.items():
            by_prompt.setdefault(prompt, set()).add(acted[place][method])
        assert all(len(actions) == 1 for actions in by_prompt.values())


def test_equal_prompts_alone_do_not_make_equal_actions(random_lm):
    """Noise is an agent's own: two agents with one profile, who are shown one prompt, need not act alike."""
    agent = Agent("x", "a nurse")
    event = Event("e", "A dam leaks", "news", "en", tuple(Action(replace(agent, id=f"u{i}"), "", float(i)) for i in range(8)))
    rows, _ = run(random_lm, cast(event, TOLD[:1]), Settings(warmup=0, batch=8, action_tokens=4))
    assert len({row["text"] for row in rows}) > 4
