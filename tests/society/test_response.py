"""What a population is said to do, and what agora's own process would do then."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

from mfllm_ref.society import agora
from mfllm_ref.society.annotate import RuleAnnotator
from mfllm_ref.society.corpus import Past
from mfllm_ref.society.events import DIMENSIONS
from mfllm_ref.society.response import LEVELS, WATCHED, response_curves, slope, true_response, with_share

PASTS = [Past(agora.event("dev", index), RuleAnnotator(), 10) for index in range(4)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dimension", WATCHED)
def test_a_moved_population_has_the_share_asked_for_and_is_one_population(dimension, level):
    shares = with_share(PASTS[0], dimension, level)
    label = DIMENSIONS[dimension].index(WATCHED[dimension])
    assert shares[dimension][label] / shares[dimension].sum() == pytest.approx(level)
    assert all((part >= 0).all() for part in shares.values())
    sums = [part.sum() for name, part in shares.items() if name != dimension]
    assert sums == pytest.approx([sums[0]] * len(sums)), "every action has one label of each dimension"


def test_dimensions_that_go_together_move_together():
    low, high = (with_share(PASTS[0], "stance", level)["belief_degree"] for level in (0.05, 0.95))
    assert abs(low - high).max() > 0.1


@pytest.mark.parametrize("seen", ["no action has the label", "all have it"])
def test_a_label_that_no_action_or_every_action_has_moves_alone(seen):
    event = PASTS[0].event
    text = "I am angry." if seen == "all have it" else "Good."
    annotate = lambda texts, language: [{d: WATCHED[d] if text == "I am angry." else names[-1 if names[0] == WATCHED[d] else 0]  # noqa: E731
                                         for d, names in DIMENSIONS.items()} for _ in texts]  # fmt: skip
    past = Past(replace(event, actions=event.actions[:20]), annotate, 10)
    for dimension, label in WATCHED.items():
        one, other = (with_share(past, dimension, level) for level in (0.2, 0.8))
        assert one[dimension][DIMENSIONS[dimension].index(label)] / one[dimension].sum() == pytest.approx(0.2)
        assert all(np.array_equal(one[d], other[d]) for d in DIMENSIONS if d != dimension)


def test_an_event_shorter_than_the_step_acts_at_its_last_one(random_lm):
    short = Past(replace(PASTS[0].event, actions=PASTS[0].event.actions[:23]), RuleAnnotator(), 10)
    curves = response_curves(random_lm, [short], RuleAnnotator(), action_tokens=4)
    assert all(len(curve) == len(LEVELS) and all(3 * share in (0, 1, 2, 3) for share in curve) for curve in curves.values())
    assert curves.keys() == WATCHED.keys() == true_response([short]).keys()


def test_what_agents_write_is_annotated_in_their_events_language():
    event = replace(PASTS[0].event, actions=PASTS[0].event.actions[:40])
    both = [Past(replace(event, id=language, language=language), RuleAnnotator(), 10) for language in ("en", "zh")]

    class Angry:
        def adapter(self, name):
            return nullcontext()

        def generate(self, told, *_, worlds, **__):
            return ["我很愤怒！" if world[0] == "zh" else "I am furious!" for world in worlds]

    assert response_curves(Angry(), both, RuleAnnotator())["sentiment_state"] == [1.0] * len(LEVELS)


def test_agoras_true_response_follows_the_stances_it_is_told():
    curves = true_response(PASTS)
    assert set(curves) == set(WATCHED) and all(len(curve) == len(LEVELS) for curve in curves.values())
    assert slope(curves["stance"]) > 0.3 and all(a <= b for a, b in zip(curves["stance"], curves["stance"][1:]))
    assert slope(curves["belief_degree"]) > 0.1, "doubt goes with opposing"
