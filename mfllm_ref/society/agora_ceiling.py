"""What can be known in agora: six continuations of an event, whose KL calibrates it (`python -m mfllm_ref.calibration ceiling`).

    floor             a second continuation of the real process from the same warm-up
    reader            the process by one who knows J and h, and estimates m from the warm-up's stances
    believer          the process by one who knows it all but J, h and m, and infers them from the topic and the warm-up
    topic and shares  agents who have read the topic, hear the stance shares of the population so far, and infer J, h and m
    persistence       texts drawn uniformly from the warm-up's
    m-blind           a policy that knows everything but m: at each action m is that of a population whose first opinion
                      was drawn anew, so that the policy is marginalised over the prior of m

The two that do not know J and h act on their expectation over what they believe of them. A mean field of label shares, and a
policy that reads it, can come about as far as "topic and shares"; beyond, it would have to tell how the population came to
where it is.

The mean field matters where m-blind is far above the floor; it can be read where the reader is near it.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from mfllm_ref.society import agora
from mfllm_ref.society.agora import NOISE, STANCES, UPDATE, WARMUP
from mfllm_ref.society.events import HALF_LIFE, Action, Event
from mfllm_ref.society.signals import moved

PRIOR, BELIEVED = 200_000, 1_000  # worlds drawn from the prior, and how many of them that agree with a topic are weighed
SIMULATED, NEAR = 60_000, 200  # worlds that are simulated, and how many of those that agree best with what is heard are believed
UTILITIES = 60  # populations of the train split whose agents they have
HEARD = agora.memory(HALF_LIFE, UPDATE)  # what the shares that agents hear keep of their weight in a step
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


@lru_cache(maxsize=1)
def beliefs() -> tuple[np.ndarray, ...]:
    """Worlds drawn from the prior: J [n], h without shocks [n, 3], first opinion [n, 3], and what their topics say [n, 3]."""
    rng, n = agora.generator("agora", "beliefs"), PRIOR
    low, high = agora.CONSTANTS["coupling"]["world"]
    coupling, base = rng.uniform(low, high, n), rng.standard_normal((n, 3)) * agora.CONSTANTS["field"]
    first = rng.dirichlet(np.full(3, agora.CONSTANTS["first_opinion"]), n)
    return coupling, base, first, agora.hints(coupling, base, rng.standard_normal((n, 4)))


def believer(event: Event, seed: int) -> list[Action]:
    """The process by agents who act on their expectation over worlds that agree with the topic, weighed by the warm-up's
    likelihood."""
    here = agora.world_of(event)
    coupling, base, opinion, said = beliefs()
    agree = np.flatnonzero((said == here.hint).all(axis=1))[:BELIEVED]
    coupling, base, opinion = coupling[agree, None], base[agree], opinion[agree]
    stances = [STANCES.index(action.labels["stance"]) for action in event.actions[:WARMUP]]
    log_weight, actions = np.zeros(len(agree)), []
    rng = agora.generator(event.id, "believer", seed)
    waiting: list[int] = []
    for i in range(len(event.actions)):
        if i % UPDATE == 0 and waiting:
            opinion, waiting = agora.absorb(opinion, waiting, here.half_life), []
        field = base + here.field[i] - here.field[0]  # shocks are public
        p = agora.choice_probabilities(here.utility[i], 1.0, field, coupling * opinion)
        if i < WARMUP:
            log_weight += np.log(p[:, stances[i]])
            stance = stances[i]
        else:
            weight = np.exp(log_weight - log_weight.max())
            weight /= weight.sum()
            stance = int(rng.choice(3, p=weight @ p))
            actions.append(agora.act(here, i, stance, weight @ opinion, rng.random(NOISE)))
        waiting.append(stance)
    return actions


def _drawn(p: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Stances drawn from probabilities [..., 3]."""
    return (rng.random((*p.shape[:-1], 1)) > p.cumsum(axis=-1)[..., :2]).sum(axis=-1)


@lru_cache(maxsize=1)
def simulated() -> tuple[np.ndarray, np.ndarray]:
    """The first SIMULATED worlds of `beliefs` without shocks: m and the shares heard, each [steps, worlds, 3], at every step's
    start."""
    coupling, base, opinion, _ = (x[:SIMULATED] for x in beliefs())
    utility, rng = np.stack([agora.world("train", i).utility for i in range(UTILITIES)]), agora.generator("agora", "simulated")
    whose, keep = rng.integers(UTILITIES, size=SIMULATED), agora.memory(agora.CONSTANTS["half_life"]["world"][0], UPDATE)
    heard, weight, opinions, told = np.zeros_like(opinion), 0.0, [], []
    for start in range(0, agora.ACTIONS, UPDATE):
        opinions.append(opinion)
        told.append(heard)
        people = utility[whose, start : start + UPDATE]
        p = agora.choice_probabilities(people, coupling[:, None, None], base[:, None], opinion[:, None])
        now = (_drawn(p, rng)[..., None] == np.arange(3)).mean(axis=1)
        opinion = keep * opinion + (1 - keep) * now
        heard, weight = moved(heard, weight, now, HEARD)
    return np.stack(opinions), np.stack(told)


def hearer(event: Event, seed: int) -> list[Action]:
    """The process by agents who hear, at each step, the shares of the stances so far, and act on their expectation over the
    simulated worlds that agree with the topic and are nearest, at that step, to the shares heard."""
    here, rng = agora.world_of(event), agora.generator(event.id, "hearer", seed)
    coupling, base, _, said = (x[:SIMULATED] for x in beliefs())
    agree = np.flatnonzero((said == here.hint).all(axis=1))
    opinions, told = simulated()
    stances = [STANCES.index(action.labels["stance"]) for action in event.actions[:WARMUP]]
    heard, weight, actions = np.zeros(3), 0.0, []
    for step in range(-(-len(event.actions) // UPDATE)):
        span = range(step * UPDATE, min((step + 1) * UPDATE, len(event.actions)))
        if span[0] >= WARMUP:
            apart = ((told[step, agree] - heard) ** 2).sum(axis=1)
            near = agree[np.argpartition(apart, NEAR)[:NEAR]]
            opinion = opinions[step, near]
            for i in span:
                field = base[near] + here.field[i] - here.field[0]  # shocks are public
                p = agora.choice_probabilities(here.utility[i], 1.0, field, coupling[near, None] * opinion)
                stances.append(int(rng.choice(3, p=p.mean(axis=0))))
                actions.append(agora.act(here, i, stances[-1], opinion.mean(axis=0), rng.random(NOISE)))
        heard, weight = moved(heard, weight, np.bincount([stances[i] for i in span], minlength=3) / len(span), HEARD)
    return actions


def persistence(event: Event, seed: int) -> list[Action]:
    rng = agora.generator(event.id, "persistence", seed)
    return [event.actions[i] for i in rng.integers(WARMUP, size=len(event.actions) - WARMUP)]


def blind(event: Event, seed: int) -> list[Action]:
    """Each action sees the m of a population drawn at random among POPULATIONS that differ in their first opinion."""
    here, rng = agora.world_of(event), agora.generator(event.id, "blind", seed)
    opinion = rng.dirichlet(np.full(3, agora.CONSTANTS["first_opinion"]), size=POPULATIONS)
    keep, actions = agora.memory(here.half_life, UPDATE), []
    for start in range(0, len(event.actions), UPDATE):
        span = slice(start, start + UPDATE)
        p = agora.choice_probabilities(here.utility[None, span], here.coupling, here.field[span], opinion[:, None])
        stance = _drawn(p, rng)
        if start >= WARMUP:
            for offset, who in enumerate(rng.integers(POPULATIONS, size=p.shape[1])):
                choice = int(stance[who, offset])
                actions.append(agora.act(here, start + offset, choice, opinion[who], rng.random(NOISE)))
        shares = (stance[..., None] == np.arange(3)).mean(axis=1)
        opinion = keep * opinion + (1 - keep) * shares
    return actions


RIVALS: dict[str, Callable[[Event, int], list[Action]]] = {
    "floor": second_continuation, "reader": reader, "believer": believer, "topic and shares": hearer,
    "persistence": persistence, "m-blind": blind,
}  # fmt: skip
