"""What a population looks like: label shares, their words, and the history that every signal is read from.

A `History` is all that a method may know of the past: the newest actions (for `recent` and `popular`) and exponentially
weighted label shares (for `empirical`). It is updated a step at a time, never ahead of it.
"""

import math
import re
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mfllm_ref.errors import Notice
from mfllm_ref.society.events import DIMENSIONS, HALF_LIFE, hashed
from mfllm_ref.society.prompts import Signal

RECENT, POPULAR, POPULAR_WINDOW = 5, 5, 30
# Percent: shares are told in multiples of it. With so few values a label and its share can be one token, so that a small model
# compares neighbouring values instead of adding digits: with single percents, digits apart, one was wrong by 4.5 points, where
# a step of ten agents moves a share by 1.8. With multiples of 5 rounding alone cost 1.8 points a step.
GRID = 2

Shares = dict[str, np.ndarray]  # dimension -> shares in the order of DIMENSIONS, summing to 1

NAMES: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "en": {
        dimension: (heading, DIMENSIONS[dimension])
        for dimension, heading in zip(
            DIMENSIONS,
            ("rumor", "feeling", "sentiment", "behavior", "stance", "belief", "subjectivity", "intent"),
            strict=True,
        )
    },
    "zh": {
        "rumor": ("传言", ("传播", "反驳")),
        "sentiment_state": ("情绪", ("愤怒", "平静", "高兴", "悲伤", "恐惧", "惊讶")),
        "sentiment_tendency": ("倾向", ("正面", "负面", "中性")),
        "behavior_type": ("行为", ("评论", "转发")),
        "stance": ("立场", ("支持", "反对", "中立")),
        "belief_degree": ("信念", ("相信", "怀疑")),
        "subjectivity": ("主观性", ("主观", "客观")),
        "intent": ("意图", ("提问", "推广", "意见")),
    },
}


def shares(labels: Sequence[Mapping[str, str]]) -> Shares:
    """Label shares of a set of actions, per dimension in the order of DIMENSIONS; uniform where no action has a label."""
    out: Shares = {}
    for dimension, names in DIMENSIONS.items():
        counts = np.zeros(len(names))
        for row in labels:
            if dimension in row:
                counts[names.index(row[dimension])] += 1
        out[dimension] = counts / counts.sum() if counts.any() else np.full(len(names), 1 / len(names))
    return out


def imagined(rng: np.random.Generator) -> Shares:
    """A random population: Dirichlet(0.5) in every dimension."""
    return {dimension: rng.dirichlet(np.full(len(names), 0.5)) for dimension, names in DIMENSIONS.items()}


def _percentages(p: np.ndarray, rng: np.random.Generator | None) -> list[int]:
    """Multiples of GRID percent that sum to 100, each less than GRID from the exact value: largest remainder, or with `rng`
    systematic sampling, whose expectation is exact."""
    exact = 100 / GRID * p / p.sum()
    if rng is not None:
        return (GRID * np.diff(np.floor(np.cumsum(exact) + rng.random() + 1e-9), prepend=0).astype(int)).tolist()
    floor = np.floor(exact + 1e-9).astype(int)
    short = 100 // GRID - int(floor.sum())
    floor[np.argsort(floor - exact, kind="stable")[:short]] += 1
    return (GRID * floor).tolist()


def verbalise(population: Mapping[str, np.ndarray], language: str, rng: np.random.Generator | None = None) -> str:
    """Label shares in words: `stance: support 45% oppose 05% neutral 50%; ...`, a two-valued dimension by its second label.

    A dimension that `population` lacks is left out. Shares are rounded to the nearest multiples of GRID, or with `rng` at
    random, so that their expectation is exact.
    """
    colon, gap, between = (": ", " ", "; ") if language == "en" else ("：", "", "；")
    parts = []
    for dimension, (heading, names) in NAMES[language].items():
        if dimension not in population:
            continue
        percent = _percentages(population[dimension], rng)
        pairs = list(zip(names, percent, strict=True))[-1 if len(names) == 2 else 0:]
        parts.append(heading + colon + " ".join(f"{name}{gap}{value:02d}%" for name, value in pairs))
    return between.join(parts)


def abridge(summary: str, rng: np.random.Generator) -> str:
    """What `verbalise` wrote, up to a random one of its dimensions."""
    parts = re.split("(?=[;；])", summary)
    return "".join(parts[: 1 + int(rng.integers(len(parts)))])


def parse(text: str, language: str) -> Shares:
    """The shares that a text written like `verbalise`'s states; a dimension it does not state (or not fully) is left out.

    The inverse of `verbalise` within rounding (less than GRID percentage points a label).
    """
    out: Shares = {}
    for part in re.split("[;；]", text):
        heading, _, rest = part.strip().replace("：", ":").partition(":")
        for dimension, (name, labels) in NAMES[language].items():
            if heading.strip() != name:
                continue
            said = {label: int(value) for label, value in re.findall(r"([^\W\d]+) ?(\d{1,3})%", rest)}
            if len(labels) == 2 and labels[1] in said:
                said.setdefault(labels[0], 100 - said[labels[1]])
            values = np.array([said.get(label, -1) for label in labels], dtype=float)
            if (values >= 0).all() and values.sum() > 0:
                out[dimension] = values / values.sum()
    return out


@dataclass(frozen=True, slots=True)
class Seen:
    """One action as the population saw it. `id` tells it from all others of its event; `index` is None if inserted."""

    id: str
    index: int | None
    profile: str
    text: str
    labels: Mapping[str, str]
    popularity: float
    parent: int | None = None  # known for real actions only


def moved(mean: np.ndarray, weight: float, now: np.ndarray, retention: float) -> tuple[np.ndarray, float]:
    """(mean, weight) of all steps so far, after one with the shares `now`; what was before keeps `retention` of its weight."""
    weight = retention * weight + 1
    # Moving the mean by its distance to `now` keeps it exactly where it is when there is no distance.
    return mean + (now - mean) / weight, weight


class History:
    """The past of one world, as far as signals need it: memory does not grow with the event, except for one counter for each real
    action that was answered."""

    def __init__(self, batch: int, half_life: float = HALF_LIFE) -> None:
        # Decay by the nominal step, so that a step counts by its shares and not by its head count: telling the same
        # story with every agent twice changes nothing.
        self.retention = 0.5 ** (batch / half_life)
        self.newest: deque[Seen] = deque(maxlen=RECENT)
        self.window: deque[Seen] = deque(maxlen=POPULAR_WINDOW)
        self.children: dict[int, int] = {}
        self.mean: Shares = {}
        self.weight = 0.0

    def update(self, step: Sequence[Seen]) -> None:
        """Take in one step's actions, in order of arrival."""
        if not step:
            return
        self.newest.extend(step)
        # Agents of a step are exchangeable: who is still in the window and who wins a tie must not depend on their order
        # of arrival, nor favour the same text, an empty one say, in step after step.
        salt = min((seen.id for seen in step if seen.index is not None), default="")
        self.window.extend(sorted(step, key=lambda seen: (hashed(salt, seen.text), seen.id)))
        for seen in step:
            if seen.parent is not None:
                self.children[seen.parent] = self.children.get(seen.parent, 0) + 1
        now, weight = shares([seen.labels for seen in step]), self.weight
        self.mean = now | self.mean
        for dimension, p in self.mean.items():
            self.mean[dimension], self.weight = moved(p, weight, now[dimension], self.retention)

    def population(self) -> Shares:
        """Exponentially weighted label shares of all actions so far (`half_life` in actions); none before the first."""
        return self.mean

    def _score(self, seen: Seen) -> float:
        known = self.children.get(seen.index, 0) if seen.index is not None else 0
        return known + math.log1p(max(0.0, seen.popularity))

    def signal(self, kind: str, language: str, mean_field: str = "") -> Signal | None:
        """What the next step's agents are told under a method's `kind` of signal; None where there is nothing to tell.

        An empty mean field of a population that has acted, a summary without a word, tells nothing; that is warned of once.
        """
        if kind == "mean-field":
            if self.newest and not mean_field:
                warnings.warn("a mean-field model wrote an empty summary, which tells the next step nothing", Notice, stacklevel=2)
            return Signal("population", (mean_field,)) if mean_field else None
        if kind == "none" or not self.newest:
            return None
        if kind == "empirical":
            return Signal("population", (verbalise(self.population(), language),))
        if kind == "recent":
            return Signal("recent", tuple(seen.text for seen in self.newest))
        if kind == "popular":
            # Newest step first among equals: without any reach or answer known, popular is the newest step's.
            ranked = sorted(reversed(self.window), key=self._score, reverse=True)
            return Signal("popular", tuple(seen.text for seen in ranked[:POPULAR]))
        raise ValueError(f"unknown signal {kind!r}")
