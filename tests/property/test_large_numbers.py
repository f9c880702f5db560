"""(6) of the invariants of the mean-field update; the others are in test_mean_field.py."""

from dataclasses import replace

import numpy as np

from mfllm_ref.society import agora, events
from mfllm_ref.society.events import DIMENSIONS
from mfllm_ref.society.signals import History, Seen


def deviation(world: agora.World, copies: int, repeats: int, horizon: int) -> float:
    """Root mean square distance, after `horizon` steps of all agents, each `copies` times, between unrounded empirical
    stance shares and the deterministic mean-field map's. m keeps half its weight each step, whatever the step's size."""
    count = len(world.utility) * copies
    tiled = replace(
        world, utility=np.tile(world.utility, (copies * horizon, 1)), field=np.tile(world.field[:1], (count * horizon, 1)),
        agents=world.agents * copies * horizon, moods=world.moods * copies * horizon,
        slots=world.slots * copies * horizon, half_life=float(count),
    )  # fmt: skip
    opinion, expected, weight = world.first_opinion, np.zeros(3), 0.0
    for _ in range(horizon):
        shares = agora.mean_field_map(world.utility, world.coupling, world.field[0], opinion)
        opinion = (opinion + shares) / 2
        weight = 0.5 ** (len(world.utility) / events.HALF_LIFE) * weight + 1
        expected += (shares - expected) / weight
    squares = []
    for repeat in range(repeats):
        noise = agora.generator("law", copies, repeat).random((count * horizon, agora.NOISE))
        actions = agora.proceed(tiled, 0, world.first_opinion, (), noise, count * horizon)
        history = History(len(world.utility))  # as many steps are remembered, whatever their size
        for step in range(horizon):
            part = enumerate(actions[step * count : (step + 1) * count])
            history.update([Seen(f"a#{i}", i, "", "", action.labels, 0.0) for i, action in part])
        order = [agora.STANCES.index(stance) for stance in DIMENSIONS["stance"]]
        squares.append(((history.population()["stance"] - expected[order]) ** 2).sum())
    return float(np.mean(squares) ** 0.5)


def test_shares_obey_the_law_of_large_numbers(monkeypatch):
    """In agora below criticality, at a fixed horizon, unrounded empirical shares approach the deterministic mean-field map's
    at rate 1/sqrt(agents per step)."""
    world = agora.world("train", 5)
    agents = 20
    world = replace(
        world, coupling=1.5, utility=world.utility[:agents], agents=world.agents[:agents], moods=world.moods[:agents],
        slots=world.slots[:agents],
    )  # fmt: skip
    assert agora.spectral_radius(world.utility, world.coupling) < 0.7
    found = []
    for copies in (1, 16):
        monkeypatch.setattr(agora, "UPDATE", agents * copies)
        found.append(deviation(world, copies, repeats=24, horizon=3))
    rate = np.log(found[0] / found[1]) / np.log(16)
    assert 0.38 < rate < 0.62, f"deviations {found}"
