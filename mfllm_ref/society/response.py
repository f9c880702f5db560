"""The response curve: what share of agents acts as the signal says the population does.

A policy that reads its signal follows it; one that shrinks it (says 20% when told 4%, 50% when told 96%) cannot reproduce a
population that tips. The curve costs seconds and is the diagnostic to watch while training.
"""

from collections.abc import Sequence

import numpy as np

from mfllm_ref.lm import LanguageModel
from mfllm_ref.society import agora
from mfllm_ref.society.agora import UPDATE
from mfllm_ref.society.corpus import Past
from mfllm_ref.society.events import DIMENSIONS, hashed
from mfllm_ref.society.prompts import Signal
from mfllm_ref.society.rollout import Annotator
from mfllm_ref.society.signals import Shares, verbalise

LEVELS = (0.04, 0.2, 0.4, 0.6, 0.8, 0.96)
WATCHED = {
    "rumor": "counter", "sentiment_state": "angry", "sentiment_tendency": "negative", "behavior_type": "share",
    "stance": "oppose", "belief_degree": "doubt", "subjectivity": "subjective", "intent": "question",
}  # fmt: skip


def with_share(past: Past, dimension: str, level: float) -> Shares:
    """The event's population, its actions weighted so that a share `level` of them carries the dimension's WATCHED label.

    All dimensions move along, as they would in a real population: angry posts oppose. Told of one dimension alone, with the
    words for the others left as they were, a policy that reads them all would look deaf. Where the event has no such action,
    or no other, only that dimension's words change, its other labels keeping their proportions.
    """
    label = DIMENSIONS[dimension].index(WATCHED[dimension])
    chosen = past.codes[dimension] == label
    mixed = chosen.any() and not chosen.all()
    weights = np.where(chosen, level / max(chosen.sum(), 1), (1 - level) / max((~chosen).sum(), 1)) if mixed else None
    shares = {d: np.bincount(codes, weights, len(DIMENSIONS[d])) for d, codes in past.codes.items()}
    if not mixed:
        rest = np.delete(shares[dimension], label)
        rest = rest / rest.sum() if rest.sum() > 0 else np.full(len(rest), 1 / len(rest))
        shares[dimension] = np.insert((1 - level) * rest, label, level)
    return shares


def response_curves(
    lm: LanguageModel, pasts: Sequence[Past], annotate: Annotator, step: int = 5, agents: int = 10,
    adapter: str | None = None, action_tokens: int = 48,
) -> dict[str, list[float]]:  # fmt: skip
    """Per dimension, the share of simulated actions that carry its WATCHED label when the signal states each of LEVELS.

    The topic and the posts are those of `pasts` at `step` (or their last one), the population is that of `with_share`;
    `agents` of each event, as far as it has them, act at each level.
    """
    told, seeds, keys = [], [], []
    for past in pasts:
        at = min(step, past.steps - 1)
        for dimension in WATCHED:
            for level in LEVELS:
                words = verbalise(with_share(past, dimension, level), past.event.language)
                document = past.told(at, Signal("population", (words,)), agents)
                told += [document.prefix + private for private, _ in document.branches]
                seeds += [hashed("response", past.event.id, dimension, level, seen.id) for seen in past.actions(at, agents)]
                keys += [(past.event.id, past.event.language, dimension, level)] * len(document.branches)
    with lm.adapter(adapter):
        written = lm.generate(told, action_tokens, seeds=seeds, stop=("\n",), worlds=keys)
    followed: dict[tuple[str, float], list[bool]] = {}
    for (_, language, dimension, level), text in zip(keys, written, strict=True):
        (labels,) = annotate([text.strip()], language)
        followed.setdefault((dimension, level), []).append(labels[dimension] == WATCHED[dimension])
    return {d: [float(np.mean(followed[d, level])) for level in LEVELS] for d in WATCHED}


def true_response(pasts: Sequence[Past], step: int = 5, draws: int = 4) -> dict[str, list[float]]:
    """The response of agora's own process, in the shape of `response_curves`: the expected share of each WATCHED label
    among the ten agents from `step` (or the last one) on, if the population were that of `with_share` at each of LEVELS. Its
    agents react to the stances in it, and to nothing else. Raises InputError for events that are not agora's.
    """
    shares: dict[str, np.ndarray] = {d: np.zeros(len(LEVELS)) for d in WATCHED}
    for past in pasts:
        here, start = agora.world_of(past.event), min(step, past.steps - 1) * past.batch
        noise = agora.generator(past.event.id, "response").random((draws, UPDATE, agora.NOISE))
        for dimension, label in WATCHED.items():
            for at, level in enumerate(LEVELS):
                opinion = with_share(past, dimension, level)["stance"]
                opinion = opinion / opinion.sum()  # agora's order of stances is that of DIMENSIONS
                acted = [a for draw in noise for a in agora.proceed(here, start, opinion, (), draw, start + UPDATE)]
                shares[dimension][at] += np.mean([a.labels[dimension] == label for a in acted]) / len(pasts)
    return {d: values.tolist() for d, values in shares.items()}


def slope(acted: Sequence[float]) -> float:
    """Least-squares slope of share acted against share said: 1 follows the signal, 0 ignores it."""
    return float(np.polyfit(LEVELS, acted, 1)[0])
