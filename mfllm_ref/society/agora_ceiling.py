"""What can be known in agora: the ceiling table that calibrates it (`python -m mfllm_ref.society.agora_ceiling`).

Mean KL of DESIGN section 6 (annotated labels, all dimensions, windows of 100 rollout actions) between each event's own
rollout and four others:

    floor        a second continuation of the real process from the same warm-up
    reader       the process by one who knows J and h, and estimates m from the warm-up's stances
    persistence  texts drawn uniformly from the warm-up's
    m-blind      a policy that knows everything but m: at each action m is that of a population whose first opinion was
                 drawn anew, so that the policy is marginalised over the prior of m

The mean field matters where m-blind is far above the floor; it can be read where the reader is near it.
"""

import argparse
from collections.abc import Callable, Sequence

import numpy as np

from mfllm_ref.society import agora
from mfllm_ref.society.agora import NOISE, STANCES, UPDATE, WARMUP
from mfllm_ref.society.annotate import annotate
from mfllm_ref.society.events import DIMENSIONS, Action, Event

WINDOW = 100
POPULATIONS = 64  # populations with a first opinion of their own, over which m-blind is marginalised


def second_continuation(event: Event, seed: int) -> list[Action]:
    return agora.true_rollout(event, WARMUP, seed=seed)[WARMUP:]


def reader(event: Event, seed: int) -> list[Action]:
    """The process continued from m estimated as the exponentially weighted shares of the warm-up alone."""
    here = agora.world_of(event)
    stances = [STANCES.index(action.labels["stance"]) for action in event.actions[:WARMUP]]
    heard, pending = agora.listen(here, np.zeros(3), stances)
    noise = agora.generator(here.id, "reader", seed).random((len(event.actions) - WARMUP, NOISE))
    return agora.proceed(here, WARMUP, heard / heard.sum(), pending, noise)


def persistence(event: Event, seed: int) -> list[Action]:
    rng = agora.generator(event.id, "persistence", seed)
    return [event.actions[i] for i in rng.integers(WARMUP, size=len(event.actions) - WARMUP)]


def blind(event: Event, seed: int) -> list[Action]:
    """Each action sees the m of a population drawn at random among POPULATIONS that differ in their first opinion."""
    here, rng = agora.world_of(event), agora.generator(event.id, "blind", seed)
    opinion = rng.dirichlet(np.full(3, agora.CONSTANTS["first_opinion"]), size=POPULATIONS)
    keep, actions = 2.0 ** (-UPDATE / here.half_life), []
    for start in range(0, len(event.actions), UPDATE):
        span = slice(start, start + UPDATE)
        p = agora.choice_probabilities(here.utility[None, span], here.coupling, here.field[span], opinion[:, None])
        stance = (rng.random(p.shape[:2] + (1,)) > p.cumsum(axis=-1)[..., :2]).sum(axis=-1)
        if start >= WARMUP:
            for offset, who in enumerate(rng.integers(POPULATIONS, size=p.shape[1])):
                choice = int(stance[who, offset])
                actions.append(agora.act(here, start + offset, choice, opinion[who], rng.random(NOISE)))
        shares = (stance[..., None] == np.arange(3)).mean(axis=1)
        opinion = keep * opinion + (1 - keep) * shares
    return actions


RIVALS: dict[str, Callable[[Event, int], list[Action]]] = {
    "floor": second_continuation, "reader": reader, "persistence": persistence, "m-blind": blind}


def counts(actions: Sequence[Action]) -> list[np.ndarray]:
    """Annotated label counts [windows, labels] per dimension; the rollout of 250 has windows of 100, 100 and 50."""
    read = [annotate(action.text, "en") for action in actions]
    windows = [read[start:start + WINDOW] for start in range(0, len(read), WINDOW)]
    return [np.array([[sum(row[name] == label for row in window) for label in labels] for window in windows])
            for name, labels in DIMENSIONS.items()]


def kl(real: Sequence[np.ndarray], simulated: Sequence[np.ndarray]) -> np.ndarray:
    """KL(real || simulated) in nats per dimension [8], 0.5 added to each count, mean over windows (DESIGN 6)."""
    values = []
    for p, q in zip(real, simulated):
        p, q = ((x + 0.5) / (x + 0.5).sum(axis=1, keepdims=True) for x in (p, q))
        values.append(float((p * np.log(p / q)).sum(axis=1).mean()))
    return np.array(values)


def ceiling(split: str = "dev", events: int | None = None, seeds: int = 2) -> dict[str, np.ndarray]:
    """Mean KL per rival and dimension [8], over the split's first `events` and `seeds` rollouts of each rival."""
    total = {name: np.zeros(len(DIMENSIONS)) for name in RIVALS}
    events = events or agora.SPLITS[split]
    for index in range(events):
        event = agora.event(split, index)
        real = counts(event.actions[WARMUP:])
        for name, continuation in RIVALS.items():
            total[name] += sum(kl(real, counts(continuation(event, seed))) for seed in range(seeds)) / (seeds * events)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description="Print agora's ceiling table (mean KL in nats, per dimension).")
    parser.add_argument("--split", choices=list(agora.SPLITS), default="dev")
    parser.add_argument("--events", type=int, default=None)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    table = ceiling(args.split, args.events, args.seeds)
    print("| continuation | mean | " + " | ".join(DIMENSIONS) + " |")
    print("|---" * (len(DIMENSIONS) + 2) + "|")
    for name, row in table.items():
        print(f"| {name} | {row.mean():.3f} | " + " | ".join(f"{value:.3f}" for value in row) + " |")


if __name__ == "__main__":
    main()
