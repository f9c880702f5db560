"""Training documents: what real populations would have been told and did, under every kind of signal.

A document is one prefix and its branches: the prefix is the shared part of a prompt, a branch one agent's private part and
the text to learn. All branches of a document are trained against one computation of the prefix (see packing's block mask).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mfllm_ref.society import prompts
from mfllm_ref.society.events import DIMENSIONS, HALF_LIFE, Event, action_ids, hashed
from mfllm_ref.society.prompts import Signal
from mfllm_ref.society.rollout import Annotator
from mfllm_ref.society.signals import RECENT, History, Seen, Shares, abridge, imagined, parse, shares, verbalise

KINDS = ("none", "recent", "popular", "empirical")
LOST = 0.1  # chance that an imagined previous summary lacks a dimension: see Past.mean_field
GUESTS = 7  # events that lend their people to a made-up population: see Past.reweighted
TUNING_SHARE = 0.21  # of an outside data set's events, kept from pretraining for tuning later: 200 of 952


@dataclass(frozen=True, slots=True)
class Document:
    """`branches` are (private prompt, target); every target is followed by end of text. `event` is the id of the one it is of."""

    prefix: str
    branches: tuple[tuple[str, str], ...]
    event: str = ""


def pretraining_part(events: Sequence[Event], leave_out: Sequence[str] = ()) -> tuple[list[Event], list[Event]]:
    """(events to pretrain on, events kept for tuning): those whose ids are in `leave_out`, or where that is empty a fifth, chosen
    by a hash of the event's id alone."""
    order = sorted(events, key=lambda event: (event.id not in leave_out, hashed("tuning", event.id)))
    kept = sum(event.id in leave_out for event in events) if leave_out else round(TUNING_SHARE * len(events))
    return sorted(order[kept:], key=lambda e: e.id), sorted(order[:kept], key=lambda e: e.id)


def _branch(language: str, seen: Seen) -> tuple[str, str]:
    return prompts.policy_private(language, seen.profile), prompts.continuation(seen.text)


class Past:
    """What every step of one real event could be told: its signals, and the population in words before and after it."""

    def __init__(self, event: Event, annotate: Annotator, batch: int, half_life: float = HALF_LIFE) -> None:
        self.event, self.batch, self.half_life = event, batch, half_life
        labels = annotate([action.text for action in event.actions], event.language)
        self.seen = [
            Seen(name, i, a.agent.profile, a.text, row, a.popularity, a.parent)
            for i, (name, a, row) in enumerate(zip(action_ids(event.actions), event.actions, labels, strict=True))
        ]
        # Label numbers of all actions, per dimension.
        self.codes = {d: np.array([names.index(row[d]) for row in labels]) for d, names in DIMENSIONS.items()}
        history = History(batch, half_life)
        self.signals: list[dict[str, Signal | None]] = []  # at the start of each step, and behind the last
        self.weights: list[float] = []  # of the past in the shares of "empirical", in steps
        for step in range(self.steps + 1):
            self.signals.append({kind: history.signal(kind, event.language) for kind in KINDS})
            self.weights.append(history.weight)
            history.update(self.actions(step))
        # The exact empirical shares in words.
        self.population = [told["empirical"].lines[0] if told["empirical"] else "" for told in self.signals]

    @property
    def steps(self) -> int:
        return -(-len(self.event.actions) // self.batch)

    def actions(self, step: int, width: int | None = None) -> list[Seen]:
        start = step * self.batch
        return self.seen[start : start + (width or self.batch)]

    def posts(self, step: int) -> list[str]:
        return [post.text for post in self.event.posts if post.index <= step * self.batch]

    def policy(self, step: int, kind: str, width: int) -> Document:
        """`width` actions from `step` on, each given the signal of `kind` at the step's start."""
        return self.told(step, self.signals[step][kind], width)

    def told(self, step: int, signal: Signal | None, width: int | None = None) -> Document:
        """The actions of `step` (or `width` of them from there on), given a signal."""
        event = self.event
        prefix = prompts.policy_shared(event.language, event.topic, self.posts(step), signal)
        return Document(prefix, tuple(_branch(event.language, seen) for seen in self.actions(step, width)), event.id)

    def reweighted(self, kind: str, width: int, rng: np.random.Generator, others: Sequence["Past"] = ()) -> Document:
        """A population that this event did not have: actions drawn so that a random dimension's shares are random, and a
        signal of `kind` that tells of just that population. Its people may be those of `others` too.

        Real populations differ too little from each other, for the same topic, to teach a small model within minutes that
        the signal is worth reading. And a small data set's own posts can be learned by heart, with their signals; posts
        borrowed from other events cannot.
        """
        event, pasts = self.event, (self, *others)
        everyone = [seen for past in pasts for seen in past.seen]
        codes = {d: np.concatenate([past.codes[d] for past in pasts]) for d in DIMENSIONS}
        counts = {d: np.bincount(some, minlength=len(DIMENSIONS[d])) for d, some in codes.items()}
        varied = [d for d, n in counts.items() if np.count_nonzero(n) > 1]
        weights = np.full(len(everyone), 1 / len(everyone))
        if varied:
            dimension = varied[int(rng.integers(len(varied)))]
            present = np.flatnonzero(counts[dimension])
            share = np.zeros(len(counts[dimension]))
            share[present] = rng.dirichlet(np.full(len(present), 0.5)) / counts[dimension][present]
            weights = share[codes[dimension]] / share[codes[dimension]].sum()
        drawn = [everyone[i] for i in rng.choice(len(weights), size=width + RECENT, p=weights)]
        signal = Signal(kind, tuple(seen.text for seen in drawn[width:]))
        if kind == "empirical":
            population = {d: np.bincount(some, weights, len(DIMENSIONS[d])) for d, some in codes.items()}
            signal = Signal("population", (verbalise(population, event.language),))
        prefix = prompts.policy_shared(event.language, event.topic, [], signal)
        return Document(prefix, tuple(_branch(event.language, seen) for seen in drawn[:width]), event.id)

    def prior(self, step: int) -> Document:
        """The summary after `step`, told neither topic nor history."""
        return Document(prompts.prior_prompt(self.event.language), (("", self.population[step + 1]),), self.event.id)

    def mean_field(self, step: int, others: int, rng: np.random.Generator, abridged: float = 0.0) -> Document:
        """The summary after `step`, written by the verbaliser from counts; then those that would follow if one of `others`
        random ones stood in the place of the real summary before.

        In a rollout the summary before is a sampled one: it errs, and may have lost a dimension, of which only the newest
        actions then tell. The others are mixed from the real population and a random one, in random parts, and lack each
        dimension with probability LOST; a part `abridged` of them ends early. What follows from them is exact in expectation:
        rounded to the nearest, shares that move by less than half a step of the words' grid would never move.
        """
        language, told = self.event.language, [(self.population[step], self.population[step + 1])]
        real = parse(self.population[step], language)
        for _ in range(others if step else 0):
            part = rng.random()
            mixed = {d: (1 - part) * real[d] + part * p for d, p in imagined(rng).items() if rng.random() >= LOST}
            before = verbalise(mixed, language)
            if abridged and rng.random() < abridged:
                before = abridge(before, rng)
            told.append((before, verbalise(self.follows(step, before), language, rng)))
        branches = tuple((prompts.mean_field_private(language, before), after) for before, after in told)
        return Document(self._newest(step), branches, self.event.id)

    def counted(self, step: int, count: int, rng: np.random.Generator) -> Document:
        """`count` first summaries, of populations of which only a few have acted: one to half a step of consecutive real
        actions each, fewer more often. The summary of a single post names its labels, which ten posts' shares hardly show."""
        language, branches = self.event.language, []
        for _ in range(count):
            few = 1 + int(self.batch / 2 * rng.random() ** 2)
            start = int(rng.integers(max(1, len(self.seen) - few)))
            actions = self.seen[start : start + few]
            private = self._listed(actions, len(actions)) + prompts.mean_field_private(language, "")
            branches.append((private, verbalise(shares([seen.labels for seen in actions]), language)))
        context = prompts.mean_field_context(language, self.event.topic, self.posts(step))
        return Document(context, tuple(branches), self.event.id)

    def follows(self, step: int, before: str) -> Shares:
        """The exact shares after `step`, were those that the summary `before` states the shares before it."""
        history = History(self.batch, self.half_life)
        history.mean, history.weight = parse(before, self.event.language), self.weights[step]
        history.update(self.actions(step))
        return history.population()

    def _newest(self, step: int) -> str:
        """What the mean-field model is told behind `step`, but for the summary before."""
        event, actions = self.event, self.actions(step)
        context = prompts.mean_field_context(event.language, event.topic, self.posts(step))
        return context + self._listed(actions, step * self.batch + len(actions))

    def _listed(self, actions: Sequence[Seen], acted: int) -> str:
        """The newest actions in canonical order, of a population of which `acted` have acted."""
        listed = [(a.profile, a.text) for a in sorted(actions, key=lambda a: (a.text, a.id))]
        return prompts.mean_field_newest(self.event.language, listed, acted)

    def summarise(self, step: int, previous: str) -> str:
        """The prompt of mu(m_{step+1} | c, X) behind the real actions of `step` and m_step."""
        return self._newest(step) + prompts.mean_field_private(self.event.language, previous)


@dataclass(frozen=True, slots=True)
class Mixture:
    """What share of documents is of which sort."""

    summaries: float = 0.25
    prior: float = 0.1  # of the summaries
    signals: tuple[float, ...] = (0.12, 0.16, 0.16, 0.56)  # of the policy documents, in the order of KINDS
    shuffled: float = 0.0  # of the policy documents that are not reweighted: the signal is another event's
    reweighted: float = 0.4  # of the policy documents with a signal: see Past.reweighted
    guests: float = 0.0  # of the reweighted: people of GUESTS other events are drawn from too
    width: int = 32  # actions a policy document, as far as they fit in its row
    counted: float = 0.25  # of the other summaries: see Past.counted
    few: int = 8  # populations of a counted document, as far as they fit in its row
    abridged: float = 0.0  # of the documents that state or are told shares: they end early, see signals.abridge
    others: int = 4  # imagined summaries before, beside the real one, of a summary document, as far as they fit in its row


class Corpus:
    """Draws documents from events. A draw is a pure function of the generator it is given."""

    def __init__(self, count: int, annotate: Annotator, batch: int, mixture: Mixture, event: Callable[[int], Event],
                 half_life: float = HALF_LIFE) -> None:  # fmt: skip
        """`event` makes the i-th of `count` events when it is first drawn."""
        self.count, self.make = count, event
        self.annotate, self.batch, self.mixture, self.half_life = annotate, batch, mixture, half_life
        self.pasts: dict[int, Past] = {}

    def past(self, index: int) -> Past:
        if index not in self.pasts:
            self.pasts[index] = Past(self.make(index), self.annotate, self.batch, self.half_life)
        return self.pasts[index]

    def draw(self, rng: np.random.Generator) -> tuple[str, Document]:
        """One document and its sort: "mean-field", or the kind of its signal."""
        mixture, past = self.mixture, self.past(int(rng.integers(self.count)))
        if rng.random() < mixture.summaries:
            document = self._summary(past, rng)
            if self._abridges(rng):
                document = replace(document, branches=tuple((private, abridge(text, rng)) for private, text in document.branches))
            return "mean-field", document
        step = int(rng.integers(past.steps))
        kind = KINDS[int(rng.choice(len(KINDS), p=mixture.signals))]
        if kind != "none" and rng.random() < mixture.reweighted:
            visited = mixture.guests and rng.random() < mixture.guests  # without guests nothing is drawn
            others = [self.past(i) for i in rng.integers(self.count, size=GUESTS).tolist()] if visited else []
            return kind, past.reweighted(kind, mixture.width, rng, others)
        source = self.past(int(rng.integers(self.count))) if rng.random() < mixture.shuffled else past
        signal = source.signals[min(step, source.steps - 1)][kind]
        if kind == "empirical" and signal and self._abridges(rng):
            signal = replace(signal, lines=(abridge(signal.lines[0], rng),))
        return kind, past.told(step, signal, mixture.width)

    def _summary(self, past: Past, rng: np.random.Generator) -> Document:
        mixture = self.mixture
        # Early steps more often: there a step moves the shares most, and all later summaries build on them.
        step = int(past.steps * rng.random() ** 2)
        if rng.random() < mixture.prior:
            return past.prior(int(rng.integers(past.steps)))
        if rng.random() < mixture.counted:
            return past.counted(step, mixture.few, rng)
        return past.mean_field(step, mixture.others, rng, mixture.abridged)

    def _abridges(self, rng: np.random.Generator) -> bool:
        return self.mixture.abridged > 0 and rng.random() < self.mixture.abridged
