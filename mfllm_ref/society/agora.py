"""Agora: a built-in world whose mean field is known, so that the floor and the true effect of an intervention are too.

An agent's stance is a Brock-Durlauf discrete choice with social interaction:

    P(stance | s, m, t) = softmax(u(s) + J m + h(t))

u(s) is private and readable from the profile, m the exponentially weighted share of each stance, updated every 10
actions, h(t) a public field that public posts shift. With no field, order appears at J = 2.75 and disorder loses
stability at 3. The first opinion m_0 is drawn per event and hidden: only actions show it. The other seven dimensions
follow from stance, profile and m. Everything is a pure function of (split, index); each action has a row of uniforms of
its own, so a continuation is compared with and without an intervention on equal noise.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np

from mfllm_ref.errors import InputError
from mfllm_ref.society import agora_text
from mfllm_ref.society.agora_text import STANCES, grammar, pick
from mfllm_ref.society.annotate import annotate
from mfllm_ref.society.events import Action, Agent, Event, PublicPost

DOMAINS = ("crime", "culture", "health", "news", "politics", "sports", "technology")
SPLITS: dict[str, int] = {"pretrain": 2100, "train": 140, "dev": 70, "test": 140}
ACTIONS, WARMUP, UPDATE = 300, 50, 10  # actions an event, of which warm-up; m is updated every UPDATE actions

CONSTANTS: dict[str, Any] = {
    "coupling": {"pretrain": (0.5, 3.0), "world": (2.0, 4.5)},  # J, uniform
    "coupling_noise": 0.3,  # what the kind of topic tells of J
    "half_life": {"pretrain": (20.0, 180.0), "world": (60.0, 60.0)},  # actions, log-uniform
    "first_opinion": 0.3,  # Dirichlet parameter of m_0
    "field": 0.8,  # standard deviation of h, per stance
    "field_noise": 0.3,  # what the topic's second sentence tells of h
    "utility": {"outlook": 1.2, "occupation": 0.5},  # private utility: what the profile's words add to their stance
    "influencers": 0.1,  # share of agents with reach
    "slant": 2.0,  # utility of the influencers' own stance
    "shocks": (0.5, 0.35, 0.15),  # probability of none, one, two
    "shock_size": (0.5, 0.9),  # a celebrity's post, an official statement
    # Given stance, its share m[stance] = a and the mood word: weights base + slope * a of each feeling.
    "feeling": {
        "support": {"angry": (0.02, 0.0), "calm": (0.9, -0.7), "happy": (0.5, 1.0), "sad": (0.03, 0.0),
                    "fear": (0.03, 0.0), "surprise": (0.15, 0.0)},
        "oppose": {"angry": (0.4, 1.0), "calm": (0.7, -0.5), "happy": (0.01, 0.0), "sad": (0.2, 0.0),
                   "fear": (0.2, 0.0), "surprise": (0.1, 0.0)},
        "neutral": {"angry": (0.02, 0.0), "calm": (1.0, 0.5), "happy": (0.02, 0.0), "sad": (0.05, 0.0),
                    "fear": (0.1, 0.0), "surprise": (0.15, 0.0)},
    },
    "mood": 2.5,  # factor on what the mood word names
    # Given stance: chance base + slope * a. Only a neutral agent passes a topic on without a word.
    "share": {"support": (0.0, 0.0), "oppose": (0.0, 0.0), "neutral": (0.2, 0.6)},
    "objective": {"support": (0.1, 0.0), "oppose": (0.1, 0.0), "neutral": (0.45, 0.3)},
    "denial": {"support": (0.0, 0.0), "oppose": (0.5, 0.45), "neutral": (0.0, 0.0)},
    "judgement": {"support": (0.8, 0.0), "oppose": (0.8, 0.0), "neutral": (0.0, 0.0)},
    "doubt": {"support": (0.03, 0.0), "oppose": (0.6, 0.3), "neutral": (0.1, 0.0)},
    "question": {"support": (0.03, 0.0), "oppose": (0.06, 0.0), "neutral": (0.6, 0.0)},
    "promotion": {"support": (0.1, 0.5), "oppose": (0.03, 0.05), "neutral": (0.02, 0.0)},
}
NOISE = 40  # uniforms an action: one a label, the rest for words


def generator(*key: object) -> np.random.Generator:
    """A source of noise seeded by a stable hash of `key` (the same on every machine and run)."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


@dataclass(frozen=True)
class World:
    """Everything the process of one event knows. `utility` [actions, 3], `field` [actions, 3] with shocks, J scalar."""

    split: str
    index: int
    domain: str
    topic: str
    hint: tuple[int, int, int]  # what the topic says of J and h: see `hints`
    coupling: float
    half_life: float
    first_opinion: np.ndarray
    field: np.ndarray
    posts: tuple[PublicPost, ...]
    agents: tuple[Agent, ...]
    moods: tuple[str, ...]
    slots: tuple[Mapping[str, str], ...]
    utility: np.ndarray

    @property
    def id(self) -> str:
        return f"agora-{self.split}-{self.index:04d}"


def choice_probabilities(utility: np.ndarray, coupling: float | np.ndarray, field: np.ndarray, opinion: np.ndarray) -> np.ndarray:
    """P(stance | s, m, t) = softmax(u + J m + h): utility [..., 3], field and opinion [3] (or alike) -> [..., 3]."""
    logits = utility + coupling * opinion + field
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def mean_field_map(utility: np.ndarray, coupling: float, field: np.ndarray, opinion: np.ndarray) -> np.ndarray:
    """F(m): the expected stance shares [3] of a population with utilities [agents, 3] that sees opinion m [3]."""
    return choice_probabilities(utility, coupling, field, opinion).mean(axis=0)


def memory(half_life: float, actions: int) -> float:
    """The weight that m keeps while `actions` new actions enter it."""
    return 2.0 ** (-actions / half_life)


def spectral_radius(utility: np.ndarray, coupling: float) -> float:
    """Radius of dF/dm at the disordered fixed point; above 1 disorder is unstable, J/3 where all utilities are equal.

    The map is taken without its public field and over the population with its relabellings (each agent once per order
    of the stances), so that nothing favours a stance and m = 1/3 is a fixed point. There dF/dm is
    J E[diag(p) - p p^T], a multiple of the projection on vectors of sum 0, whose radius is half its trace.
    """
    p = choice_probabilities(utility, coupling, np.zeros(3), np.full(3, 1 / 3))
    return float(coupling * (1 - (p**2).sum(axis=1).mean()) / 2)


@lru_cache(maxsize=64)
def world(split: str, index: int) -> World:
    """The world of event `index` of `split`; raises InputError for an unknown split or an index out of range."""
    if split not in SPLITS:
        raise InputError(f"split {split!r}: agora has {', '.join(SPLITS)}")
    if not 0 <= index < SPLITS[split]:
        raise InputError(f"index {index}: agora's split {split!r} has events 0 to {SPLITS[split] - 1}")
    rng = generator("agora", split, index)
    kind = "pretrain" if split == "pretrain" else "world"
    low, high = CONSTANTS["coupling"][kind]
    coupling = rng.uniform(low, high)
    coupling_noise = rng.standard_normal()
    shortest, longest = CONSTANTS["half_life"][kind]
    half_life = shortest * (longest / shortest) ** rng.random()
    first_opinion = rng.dirichlet(np.full(3, CONSTANTS["first_opinion"]))
    base = CONSTANTS["field"] * rng.standard_normal(3)
    hint = hints(np.array([coupling]), base[None], np.array([[coupling_noise, *rng.standard_normal(3)]]), kind)[0].tolist()
    contagion, lean, strong = hint
    domain = DOMAINS[index % len(DOMAINS)]
    name, place = _topic_names(split, index)
    topic = agora_text.topic(domain, contagion, STANCES[lean], bool(strong), name, place, iter(rng.random(2)))
    field, posts = _shocks(base, rng)
    agents, moods, slots, utility = _population(f"agora-{split}-{index:04d}", place, rng)
    return World(split, index, domain, topic, tuple(hint), coupling, half_life, first_opinion, field, posts, agents, moods, slots,
                 utility)


def hints(coupling: np.ndarray, base: np.ndarray, noise: np.ndarray, kind: str = "world") -> np.ndarray:
    """What topics say of J [n] and h [n, 3], seen through normal `noise` [n, 4]: int64 [n, 3] of how contagious they are (0 to
    2), the stance they favour, and whether strongly (0 or 1)."""
    low, high = CONSTANTS["coupling"][kind]
    seen = (coupling + CONSTANTS["coupling_noise"] * noise[:, 0] - low) / (high - low)
    told = base + CONSTANTS["field_noise"] * noise[:, 1:]
    contagion = np.clip((3 * seen).astype(np.int64), 0, 2)
    return np.stack([contagion, told.argmax(1), told.max(1) - told.mean(1) > 0.8], axis=1)


def _topic_names(split: str, index: int) -> tuple[str, str]:
    """A name and a place that no other event of this domain has, in this split or another."""
    names, places = grammar()["names"], grammar()["places"]
    splits = list(SPLITS)
    first = sum(-(-SPLITS[other] // len(DOMAINS)) for other in splits[: splits.index(split)])
    order = generator("agora", "topics", DOMAINS[index % len(DOMAINS)]).permutation(len(names) * len(places))
    pair = int(order[first + index // len(DOMAINS)])
    return names[pair // len(places)], places[pair % len(places)]


def _shocks(base: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, tuple[PublicPost, ...]]:
    """The field h(t) [actions, 3], and the public posts that shift it for good, each from its index on."""
    field, posts = np.tile(base, (ACTIONS, 1)), []
    count = int(np.searchsorted(np.cumsum(CONSTANTS["shocks"]), rng.random()))
    for index in sorted(rng.choice(np.arange(WARMUP, ACTIONS - 50, UPDATE), size=count, replace=False)):
        direction, official = int(rng.integers(3)), int(rng.integers(2))
        field[index:, direction] += CONSTANTS["shock_size"][official]
        posts.append(PublicPost(int(index), agora_text.public_post(STANCES[direction], bool(official), rng.random())))
    return field, tuple(posts)


def _population(event_id: str, place: str, rng: np.random.Generator
                ) -> tuple[tuple[Agent, ...], tuple[str, ...], tuple[Mapping[str, str], ...], np.ndarray]:
    """Agents with profiles, their mood words, text slots and private utilities [actions, 3].

    Outlooks and occupations are balanced over stances. Influencers have most of the reach and a stance of their own.
    """
    words = grammar()
    outlooks = [(word, STANCES.index(stance), size)
                for stance, row in words["outlook"].items() for word, size in row.items()]
    jobs = [(word, STANCES.index(stance)) for stance in STANCES for word in words["occupations"][stance]]
    moods = list(words["moods"])
    slant = int(rng.integers(3))
    draw = rng.random((ACTIONS, 8))
    reach = np.exp(rng.normal(4.0, 1.0, ACTIONS))
    utility, agents, slots, mood_of = np.zeros((ACTIONS, 3)), [], [], []
    for i, (u, audience) in enumerate(zip(draw.tolist(), reach.tolist())):
        outlook, direction, size = outlooks[int(u[0] * len(outlooks))]
        utility[i, direction] += CONSTANTS["utility"]["outlook"] * size
        mood = pick(moods, u[1])
        if u[2] < CONSTANTS["influencers"]:
            job, audience = pick(words["influencers"], u[3]), 100 * audience
            utility[i, slant] += CONSTANTS["slant"]
        else:
            job, towards = jobs[int(u[3] * len(jobs))]
            utility[i, towards] += CONSTANTS["utility"]["occupation"]
        home = place if u[5] < 0.5 else pick(words["places"], u[6])
        profile = f"{pick(words['first_names'], u[4])}, {int(18 + 55 * u[7])}, {job} from {home}, {outlook} and {mood}"
        agents.append(Agent(f"{event_id}-{i:03d}", profile, float(round(audience))))
        slots.append({"place": home, "occupation": job})
        mood_of.append(words["moods"][mood])
    return tuple(agents), tuple(mood_of), tuple(slots), utility


def choices(options: Sequence[str], weights: Iterable[float], u: float) -> str:
    """The option at uniform `u` of the distribution proportional to `weights`."""
    ends = list(accumulate(weights))
    return options[min(bisect_right(ends, u * ends[-1]), len(options) - 1)]


def other_labels(stance: str, opinion: np.ndarray, mood: str, u: Iterator[float]) -> dict[str, str]:
    """All eight labels of an action, given its stance, the opinion m [3] it saw and its author's mood word."""
    own = float(opinion[STANCES.index(stance)])

    def chance(name: str) -> bool:
        base, slope = CONSTANTS[name][stance]
        return next(u) < min((base + slope * own) * (CONSTANTS["mood"] if mood == name else 1.0), 0.95)

    shared, objective, denied = chance("share"), chance("objective"), chance("denial")
    weights = {feeling: max(base + slope * own, 0.01) * (CONSTANTS["mood"] if mood == feeling else 1.0)
               for feeling, (base, slope) in CONSTANTS["feeling"][stance].items()}
    feeling = choices(list(weights), weights.values(), next(u))
    tendency = "neutral"
    judged, doubt, question, promotion = chance("judgement"), chance("doubt"), chance("question"), chance("promotion")
    if shared:  # passed on without a word of one's own, so without a feeling, a doubt or an appeal
        objective, question, promotion = True, False, False
    if objective:
        feeling, denied, doubt = "calm", stance == "oppose", False
    elif feeling not in ("calm", "surprise"):
        tendency = "positive" if feeling == "happy" else "negative"
    elif judged:
        tendency = "positive" if stance == "support" else "negative"
    return {
        "rumor": "counter" if denied else "spread",
        "sentiment_state": feeling,
        "sentiment_tendency": tendency,
        "behavior_type": "share" if shared else "comment",
        "stance": stance,
        "belief_degree": "doubt" if doubt or denied else "believe",
        "subjectivity": "objective" if objective else "subjective",
        "intent": "question" if question else "promotion" if promotion else "opinion",
    }


def act(here: World, index: int, stance: int, opinion: np.ndarray, noise: Iterable[float]) -> Action:
    """The action at `index` with a stance already chosen: labels, then words, from a row of uniforms."""
    u = iter(noise)
    labels = other_labels(STANCES[stance], opinion, here.moods[index], u)
    agent = here.agents[index]
    text = agora_text.comment(labels, here.slots[index], here.domain, u)
    return Action(agent, text, 60.0 * index, agent.reach or 0.0, None, labels)


def proceed(here: World, start: int, opinion: np.ndarray, pending: Sequence[int], noise: np.ndarray,
            stop: int = ACTIONS, inserted: Mapping[int, Sequence[int]] | None = None) -> list[Action]:
    """Run the process over actions start to stop, from opinion m [3] and the stances not yet taken into it.

    noise [stop - start, NOISE] uniforms. inserted: stances that enter m beside the actions before the key's index.
    """
    actions, pending = [], list(pending)
    for index in range(start, stop):
        if index > start and inserted:
            pending += inserted.get(index, ())
        if index % UPDATE == 0 and pending:
            opinion, pending = absorb(opinion, pending, here.half_life), []
        if index % UPDATE == 0 or index == start:  # the chances of all who act on this m
            span = slice(index, index - index % UPDATE + UPDATE)
            ends = choice_probabilities(here.utility[span], here.coupling, here.field[span], opinion).cumsum(axis=-1)
            ends, first = ends.tolist(), index
        row = noise[index - start].tolist()
        stance = min(bisect_right(ends[index - first], row[0]), 2)
        actions.append(act(here, index, stance, opinion, row[1:]))
        pending.append(stance)
    return actions


def absorb(opinion: np.ndarray, stances: Sequence[int], half_life: float) -> np.ndarray:
    """m after new stances: kept with weight 2^(-n / half-life), the rest from their shares."""
    keep = memory(half_life, len(stances))
    return keep * opinion + (1 - keep) * np.bincount(stances, minlength=3) / len(stances)


def listen(here: World, opinion: np.ndarray, stances: Sequence[int], inserted: Mapping[int, Sequence[int]] | None = None
           ) -> tuple[np.ndarray, list[int]]:
    """m [3] after the event's first stances, from a first opinion; and the stances that have not entered it yet."""
    pending: list[int] = []
    for index, stance in enumerate(stances):
        pending += (inserted or {}).get(index, ())
        if index % UPDATE == 0 and pending:
            opinion, pending = absorb(opinion, pending, here.half_life), []
        pending.append(stance)
    return opinion, pending + list((inserted or {}).get(len(stances), ()))


def world_of(event: Event) -> World:
    """The world an event came from; raises InputError where it is not one of agora's."""
    name, _, rest = event.id.partition("-")
    split, _, index = rest.partition("-")
    if name != "agora" or split not in SPLITS or not index.isdecimal() or world(split, int(index)).topic != event.topic:
        raise InputError(f"event {event.id!r}: not one of agora's, so its true process is unknown")
    return world(split, int(index))


def event(split: str, index: int) -> Event:
    """Event `index` of `split` (SPLITS): 300 actions, 50 meant as warm-up. Raises InputError where there is none."""
    here = world(split, index)
    actions = proceed(here, 0, here.first_opinion, (), generator(here.id, "actions").random((ACTIONS, NOISE)))
    radius = spectral_radius(here.utility, here.coupling)
    facts = {"J": here.coupling, "half_life": here.half_life, "spectral_radius": radius}
    facts |= {f"h_{stance}": float(value) for stance, value in zip(STANCES, here.field[0])}
    facts |= {f"m0_{stance}": float(value) for stance, value in zip(STANCES, here.first_opinion)}
    return Event(here.id, here.topic, here.domain, "en", tuple(actions), here.posts, facts)


def true_rollout(event: Event, warmup: int, intervention: Sequence[Mapping[str, Any]] | None = None, seed: int = 0,
                 batch: int = 10) -> list[Action]:
    """The event's first `warmup` actions, then a fresh continuation of the real process by the same agents.

    m after the warm-up is recomputed from its generating labels. `intervention`: a list of {"step": t, "actions":
    [{"profile", "text"}]}, t counted from the event's first action in steps of `batch`; the stance the annotator reads
    from each text enters m beside the step's own actions. Returns len(event.actions) actions; inserted ones are left
    out. One `seed` is one noise, with or without an intervention. Raises InputError for an event that is not agora's.
    """
    here = world_of(event)
    if not 0 < warmup <= len(event.actions) <= ACTIONS:
        raise InputError(f"event {event.id}: warm-up {warmup} of {len(event.actions)} actions")
    inserted: dict[int, list[int]] = {}
    for item in intervention or ():
        try:
            texts, end = [action["text"] for action in item["actions"]], (item["step"] + 1) * batch
        except (KeyError, TypeError, IndexError) as error:
            raise InputError(f"intervention: {item!r} is not a step and its actions") from error
        if type(item["step"]) is not int or item["step"] < 0 or not all(isinstance(text, str) for text in texts):
            raise InputError(f"intervention: {item!r} must have a step of at least 0, and texts")
        inserted.setdefault(end, []).extend(STANCES.index(annotate(text, event.language)["stance"]) for text in texts)
    try:
        stances = [STANCES.index(action.labels["stance"]) for action in event.actions[:warmup]]
    except KeyError as error:
        raise InputError(f"event {event.id}: its actions carry no generating stance") from error
    opinion, pending = listen(here, here.first_opinion, stances, inserted)
    noise = generator(here.id, "rollout", seed).random((ACTIONS, NOISE))[warmup:]
    actions = proceed(here, warmup, opinion, pending, noise, len(event.actions), inserted)
    return [*event.actions[:warmup], *actions]
