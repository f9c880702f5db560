"""Real events, where they lie beside the repository; elsewhere the loops below have nothing to go through."""

from pathlib import Path

import pytest

from mfllm_ref.society.annotate import RuleAnnotator
from mfllm_ref.society.events import DIMENSIONS, Event
from mfllm_ref.society.methods import METHODS
from mfllm_ref.society.readers import load_events
from mfllm_ref.society.rollout import Settings, World, rollout

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
PLACES = {"weibo-ced/dev": (120, "zh"), "rumoureval-2017/dev": (1, "en")}


@pytest.fixture(scope="module")
def real_events() -> dict[str, list[Event]]:
    return {place: load_events(DATA / place) for place in PLACES if (DATA / place).is_dir()}


def test_real_events_are_read_whole_and_in_order(real_events):
    for place, events in real_events.items():
        assert (len(events), {event.language for event in events}) == (PLACES[place][0], {PLACES[place][1]})
        for event in events:
            times = [action.time for action in event.actions]
            assert times == sorted(times) and len(times) >= 150
            assert all(a.parent is None or 0 <= a.parent < i for i, a in enumerate(event.actions))


def test_every_real_text_has_a_label_in_every_dimension(real_events):
    for events in real_events.values():
        event = max(events, key=lambda event: len(event.actions))
        for row in RuleAnnotator()([action.text for action in event.actions], event.language):
            assert all(row[dimension] in labels for dimension, labels in DIMENSIONS.items()) and len(row) == len(DIMENSIONS)


def test_real_events_roll_out(real_events, random_lm):
    methods = [METHODS[name] for name in ("popular", "persistence", "mf-llm-no-ib")]
    settings = Settings(agents=24, warmup=10, action_tokens=4, summary_tokens=4)
    for events in real_events.values():
        worlds = [World(events[0], method, 0) for method in methods]
        rows = [row for step in rollout(random_lm, worlds, settings, RuleAnnotator()) for row in step.trajectory]
        warm = [row["text"] for row in rows if row["phase"] == "warmup"]
        assert warm == [action.text for action in events[0].actions[:10]] * len(methods)
        assert len(rows) == 3 * 24
