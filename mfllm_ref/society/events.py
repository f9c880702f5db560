"""Events: who acted, in what order, with what words. Plain data; nothing here knows a language model.

An event is a topic c and a time-ordered list of actions; an action is an agent's text. Eight dimensions describe an
action (after the paper's annotation); which label a text carries is the annotator's business.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

DIMENSIONS: dict[str, tuple[str, ...]] = {
    "rumor": ("spread", "counter"),
    "sentiment_state": ("angry", "calm", "happy", "sad", "fear", "surprise"),
    "sentiment_tendency": ("positive", "negative", "neutral"),
    "behavior_type": ("comment", "share"),
    "stance": ("support", "oppose", "neutral"),
    "belief_degree": ("believe", "doubt"),
    "subjectivity": ("subjective", "objective"),
    "intent": ("question", "promotion", "opinion"),
}

LANGUAGES = ("en", "zh")
HALF_LIFE = 60  # actions: after so many newer ones an action counts half in the population, unless another number is given


@dataclass(frozen=True, slots=True)
class Agent:
    """One author. `profile` is what the policy is told of them (s_i); `reach` is their audience (followers), None if not known."""

    id: str
    profile: str = ""
    reach: float | None = None


@dataclass(frozen=True, slots=True)
class Action:
    """One post. An empty text is a plain share.

    `popularity` is what could be known when it was posted (never a crawl-time count), `parent` the index, within the
    event's actions, of the action it answers, and `labels` are gold or generating labels, used only to score annotators.
    """

    agent: Agent
    text: str
    time: float
    popularity: float = 0.0
    parent: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PublicPost:
    """A post every agent from action `index` on has seen, real or simulated: an official denial, a celebrity's post."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class Event:
    """A topic and its time-ordered actions. `facts` holds what the generating process knows (agora) and no agent does."""

    id: str
    topic: str
    domain: str
    language: str
    actions: tuple[Action, ...]
    posts: tuple[PublicPost, ...] = ()
    facts: Mapping[str, float] = field(default_factory=dict)


def action_ids(actions: Sequence[Action]) -> list[str]:
    """An id for every action that does not depend on its place in a step: its author and which of theirs it is."""
    counts: Counter[str] = Counter()
    ids = []
    for action in actions:
        ids.append(f"{action.agent.id}#{counts[action.agent.id]}")
        counts[action.agent.id] += 1
    return ids


def hashed(*parts: object) -> int:
    """A 63-bit seed: the same for the same parts on every machine, independent for different ones."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
