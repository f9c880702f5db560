"""Agora is an instrument: frozen, a pure function of (split, index), its process continued exactly."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from mfllm_ref.errors import InputError
from mfllm_ref.society import agora, agora_text
from mfllm_ref.society.agora import CONSTANTS, DOMAINS, SPLITS, STANCES

FROZEN = {
    "constants": "0d936149e06416906ab5894ad71ac501ad74dc2c36564e4d38231babf4b157a8",
    "grammar": "b67c8b92c4fd9adbe1e822df6b86b8738db349bd6bfadf3d125b9e48d0c36978",
    "events": "3676b70300639a93494edb7836a4d7319e75b042682b13709685dbddbcd60820",
}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest(split: str, index: int) -> str:
    """The words of one event: topic, posts, profiles, texts and labels."""
    event = agora.event(split, index)
    rows = [[a.agent.id, a.agent.profile, a.agent.reach, a.text, dict(a.labels)] for a in event.actions]
    return sha256(json.dumps([event.topic, [[p.index, p.text] for p in event.posts], rows]).encode())


def test_frozen():
    """The world does not change: whoever changes a constant, a phrase or the process must calibrate anew and say so."""
    constants = [CONSTANTS, SPLITS, DOMAINS, agora.ACTIONS, agora.WARMUP, agora.UPDATE, agora.NOISE]
    assert sha256(json.dumps(constants).encode()) == FROZEN["constants"]
    assert sha256(json.dumps(agora_text.grammar(), sort_keys=True).encode()) == FROZEN["grammar"]
    digests = [digest(split, index) for split in SPLITS for index in (0, SPLITS[split] - 1)]
    assert sha256("".join(digests).encode()) == FROZEN["events"]


def test_event_is_a_pure_function_of_split_and_index():
    """The same event comes from another process with another hash seed, in another order, alone."""
    here = [digest("dev", 3), digest("train", 5)]
    script = (f"import sys; sys.path[:0] = {[os.path.dirname(__file__), *sys.path]!r}\n"
              "import test_agora; print(test_agora.digest('train', 5), test_agora.digest('dev', 3))")
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True,
                           env={**os.environ, "PYTHONHASHSEED": "12345"}).stdout.split()
    assert there == here[::-1]


def test_topics_are_disjoint():
    """No topic occurs twice, within a split or across splits; domains take turns."""
    topics = [agora.world(split, index).topic.split(". ")[0] for split, count in SPLITS.items() if split != "pretrain"
              for index in range(count)]
    pairs = [(DOMAINS[i % 7], *agora._topic_names(split, i)) for split, count in SPLITS.items() for i in range(count)]
    assert len(set(topics)) == len(topics) and len(set(pairs)) == len(pairs) == sum(SPLITS.values())
    assert [agora.world("dev", i).domain for i in range(7)] == list(DOMAINS)


def test_words_are_short_varied_and_few():
    """Comments are about 5 to 18 words of a small vocabulary, and most occur once."""
    actions = [action for index in range(21) for action in agora.event("pretrain", index).actions]
    texts = [action.text for action in actions if action.labels["behavior_type"] != "share"]
    lengths = np.array([len(text.split()) for text in texts])
    assert np.percentile(lengths, 95) <= 19 and np.median(lengths) >= 8 and lengths.min() >= 3
    assert len(set(texts)) > 0.85 * len(texts)
    assert len({word.strip(".,!?:").lower() for text in texts for word in text.split()}) < 1000
    assert not any("{" in text or "  " in text or text != text.strip() for text in texts)


def test_continuation_from_the_warmup_is_the_event_itself():
    """With the event's own noise, the process continued from its recomputed m repeats the event, at any warm-up."""
    event, here = agora.event("dev", 9), agora.world("dev", 9)
    noise = agora.generator(here.id, "actions").random((agora.ACTIONS, agora.NOISE))
    for warmup in (1, 10, 37, 50, 299):
        stances = [STANCES.index(action.labels["stance"]) for action in event.actions[:warmup]]
        opinion, pending = agora.listen(here, here.first_opinion, stances)
        assert agora.proceed(here, warmup, opinion, pending, noise[warmup:]) == list(event.actions[warmup:])


def test_true_rollout_keeps_the_warmup_and_draws_the_rest_anew():
    event = agora.event("dev", 4)
    first, again, other = (agora.true_rollout(event, 50, seed=seed) for seed in (1, 1, 2))
    assert first == again and first[:50] == list(event.actions[:50]) == other[:50] and len(first) == 300
    assert first[50:] != other[50:] and first[50:] != list(event.actions[50:])
    assert [a.agent for a in first] == [a.agent for a in event.actions]
    part = dataclasses.replace(event, actions=event.actions[:120])
    assert agora.true_rollout(part, 50, seed=1) == first[:120]


@pytest.mark.parametrize("batch", [10, 15])
def test_intervention_moves_the_world_from_its_step_on(batch):
    """Inserted opposition leaves every earlier action as it was and, on average, makes the later ones oppose more."""
    crowd = [{"step": 6, "actions": [{"profile": "", "text": "I oppose this, it is wrong."}] * 40}]
    moved = []
    for index in range(14):
        event = agora.event("dev", index)
        plain, pushed = (agora.true_rollout(event, 50, intervention=x, seed=3, batch=batch) for x in (None, crowd))
        assert len(pushed) == len(plain) == 300 and plain[: 7 * batch] == pushed[: 7 * batch]
        moved.append(np.mean([(b.labels["stance"] == "oppose") - float(a.labels["stance"] == "oppose")
                              for a, b in zip(plain[7 * batch:], pushed[7 * batch:])]))
    assert min(moved) >= 0 and np.mean(moved) > 0.1


def test_interventions_enter_during_the_warmup_too():
    event, nothing = agora.event("dev", 2), [{"step": 0, "actions": []}]
    early = [{"step": 1, "actions": [{"profile": "", "text": "I support this."}] * 30}]
    assert agora.true_rollout(event, 50, nothing) == agora.true_rollout(event, 50)
    assert agora.true_rollout(event, 50, early)[50:] != agora.true_rollout(event, 50)[50:]


def test_posts_shift_the_field_from_their_index_on():
    """A public post changes the field at its index for good, and the field is the event's own before the first."""
    seen = 0
    for index in range(70):
        here = agora.world("dev", index)
        changes = [int(i) + 1 for i in np.flatnonzero(np.abs(np.diff(here.field, axis=0)).sum(axis=1))]
        assert changes == [post.index for post in here.posts]
        assert all(i >= agora.WARMUP for i in changes)
        seen += len(changes)
    assert seen > 20


def test_spectral_radius_and_mean_field_map():
    """J/3 without private utilities, so disorder turns unstable at J = 3; elsewhere the map's own derivative."""
    assert agora.spectral_radius(np.zeros((5, 3)), 3.0) == pytest.approx(1.0)
    utility, coupling = np.concatenate([np.roll(np.diag([1.2, 0.3, -0.7])[:, ::d], k, axis=1) for k in range(3)
                                        for d in (1, -1)]), 3.5
    third, step = np.full(3, 1 / 3), 1e-6
    assert agora.mean_field_map(utility, coupling, np.zeros(3), third) == pytest.approx(third)
    ahead, behind = ([agora.mean_field_map(utility, coupling, np.zeros(3), third + sign * step * e) for e in np.eye(3)]
                     for sign in (1, -1))
    columns = (np.array(ahead) - np.array(behind)) / (2 * step)
    radius = np.abs(np.linalg.eigvals(columns)).max()
    assert agora.spectral_radius(utility, coupling) == pytest.approx(radius, rel=1e-6)
    dev = [agora.event("dev", index).facts["spectral_radius"] for index in range(70)]
    assert min(dev) < 0.8 and max(dev) > 1.2 and 0.25 < np.mean(np.array(dev) > 1) < 0.75


def test_law_of_large_numbers():
    """Below criticality, at a fixed horizon, empirical shares approach the mean-field map as 1/sqrt(agents a step)."""
    here = next(agora.world("dev", i) for i in range(70)
                if agora.spectral_radius(agora.world("dev", i).utility, agora.world("dev", i).coupling) < 0.8)
    keep, rng, steps, runs = 2.0 ** (-agora.UPDATE / here.half_life), np.random.default_rng(0), 25, 20
    exact = [here.first_opinion]
    for _ in range(steps):
        expected = agora.mean_field_map(here.utility, here.coupling, here.field[0], exact[-1])
        exact.append(keep * exact[-1] + (1 - keep) * expected)
    errors, sizes = [], (10, 160, 2560)
    for agents in sizes:
        squares = []
        for _ in range(runs):
            opinion = here.first_opinion
            for _ in range(steps):
                who = here.utility[rng.integers(agora.ACTIONS, size=agents)]
                ends = agora.choice_probabilities(who, here.coupling, here.field[0], opinion).cumsum(axis=1)
                stances = (rng.random((agents, 1)) > ends[:, :2]).sum(axis=1)
                opinion = keep * opinion + (1 - keep) * np.bincount(stances, minlength=3) / agents
            squares.append(((opinion - exact[-1]) ** 2).sum())
        errors.append(np.sqrt(np.mean(squares)))
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert -0.6 < slope < -0.4


def test_popular_misleads():
    """The five most popular of the last 30 predict the next ten's stances worse than five of the 30 at random would."""
    def shares(actions):
        return np.array([sum(a.labels["stance"] == stance for a in actions) / len(actions) for stance in STANCES])

    errors = []
    for index in range(70):
        actions = agora.event("train", index).actions
        for t in range(50, 300, 10):
            popular = sorted(actions[t - 30:t], key=lambda a: -a.popularity)[:5]
            errors.append([np.abs(shares(x) - shares(actions[t:t + 10])).sum() for x in (popular, actions[t - 30:t:6])])
    popular, spaced = np.mean(errors, axis=0)
    assert popular > 1.08 * spaced


def test_topic_tells_of_coupling_and_field():
    """A scandal is contagious, a routine notice is not; the second sentence leans as the field does."""
    scandal, routine, lean = [], [], []
    for index in range(140):
        here = agora.world("train", index)
        kinds = agora_text.grammar()["domains"][here.domain]["kinds"]
        first = here.topic.split(":")[0].split(" ")[0]
        loud = first in ("Scandal", "Leaked", "Viral", "Breaking")
        (scandal if loud else routine).append(here.coupling)
        assert len(kinds) == 3
        lines = {side: [x for tone in tones for x in tone] for side, tones in agora_text.grammar()["lean"].items()}
        side = next(side for side, options in lines.items() if any(here.topic.endswith(x) for x in options))
        lean.append(STANCES.index(side) == int(here.field[0].argmax()))
    assert np.mean(scandal) > np.mean(routine) + 0.8 and np.mean(lean) > 0.65


def test_pretraining_populations_are_weaker_and_varied():
    """pretrain: lower J, other half-lives; elsewhere J in [2, 4.5] and a half-life of 60 actions."""
    weak = [agora.world("pretrain", index) for index in range(0, 2100, 30)]
    assert max(w.coupling for w in weak) <= 3.0 and np.mean([w.coupling for w in weak]) < 2.0
    assert min(w.half_life for w in weak) < 30 and max(w.half_life for w in weak) > 120
    strong = [agora.world("test", index) for index in range(140)]
    assert all(w.half_life == 60 and 2 <= w.coupling <= 4.5 for w in strong)


@pytest.mark.parametrize("call", [
    lambda: agora.event("holdout", 0),
    lambda: agora.event("dev", 70),
    lambda: agora.event("dev", -1),
    lambda: agora.true_rollout(dataclasses.replace(agora.event("dev", 0), id="agora-dev-9999"), 50),
    lambda: agora.true_rollout(dataclasses.replace(agora.event("dev", 0), id="rumour-7"), 50),
    lambda: agora.true_rollout(dataclasses.replace(agora.event("dev", 0), topic="Another topic."), 50),
    lambda: agora.true_rollout(agora.event("dev", 0), 0),
    lambda: agora.true_rollout(agora.event("dev", 0), 301),
    lambda: agora.true_rollout(agora.event("dev", 0), 50, [{"step": 1}]),
    lambda: agora.true_rollout(agora.event("dev", 0), 50, [{"step": "1", "actions": [{"text": "No."}]}]),
    lambda: agora.true_rollout(agora.event("dev", 0), 50, [{"step": -5, "actions": [{"text": "No."}]}]),
    lambda: agora.true_rollout(agora.event("dev", 0), 50, [{"step": 1.5, "actions": [{"text": "No."}]}]),
    lambda: agora.true_rollout(agora.event("dev", 0), 50, [{"step": 1, "actions": [{"text": 5}]}]),
    lambda: agora.true_rollout(dataclasses.replace(agora.event("dev", 0), actions=tuple(
        dataclasses.replace(a, labels={}) for a in agora.event("dev", 0).actions)), 50),
])
def test_bad_input_is_one_line(call):
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value)
