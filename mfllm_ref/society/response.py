"""The response curve: what share of agents acts as the signal says the population does.

A policy that reads its signal follows it; one that shrinks it (says 20% when told 5%, 50% when told 95%) cannot reproduce a
population that tips. The curve costs seconds and is the diagnostic to watch while training.
"""

from collections.abc import Sequence

import numpy as np

from mfllm_ref.lm import LanguageModel
from mfllm_ref.society import agora
from mfllm_ref.society.agora import UPDATE
from mfllm_ref.society.agora_text import STANCES
from mfllm_ref.society.corpus import Past
from mfllm_ref.society.events import DIMENSIONS, Event, hashed
from mfllm_ref.society.prompts import Signal
from mfllm_ref.society.rollout import Annotator
from mfllm_ref.society.signals import History, Shares, verbalise

LEVELS = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)
WATCHED = {
    "rumor": "counter", "sentiment_state": "angry", "sentiment_tendency": "negative", "behavior_type": "share",
    "stance": "oppose", "belief_degree": "doubt", "subjectivity": "subjective", "intent": "question",
}  # fmt: skip


def said(population: Shares, dimension: str, label: str, level: float) -> Shares:
    """`population` with the share of `label` set to `level`, its dimension's other labels keeping their proportions."""
    k = DIMENSIONS[dimension].index(label)
    rest = np.delete(population[dimension], k)
    rest = rest / rest.sum() if rest.sum() > 0 else np.full(len(rest), 1 / len(rest))
    return {**population, dimension: np.insert((1 - level) * rest, k, level)}


def response_curves(
    lm: LanguageModel, pasts: Sequence[Past], annotate: Annotator, step: int = 5, agents: int = 10,
    adapter: str | None = None, action_tokens: int = 48,
) -> dict[str, list[float]]:  # fmt: skip
    """Per dimension, the share of simulated actions that carry its WATCHED label when the signal states each of LEVELS.

    The topic, the posts and the other dimensions are those of `pasts` at `step`; `agents` of each event act at each level.
    """
    told, seeds, keys = [], [], []
    for past in pasts:
        event, history = past.event, History(past.batch)
        for earlier in range(step):
            history.update(past.actions(earlier))
        for dimension, label in WATCHED.items():
            for level in LEVELS:
                words = verbalise(said(history.population(), dimension, label, level), event.language)
                document = past.told(step, Signal("population", (words,)), agents)
                told += [document.prefix + private for private, _ in document.branches]
                seeds += [hashed("response", event.id, dimension, level, seen.id) for seen in past.actions(step, agents)]
                keys += [(event.id, dimension, level)] * len(document.branches)
    with lm.adapter(adapter):
        written = lm.generate(told, action_tokens, seeds=seeds, stop=("\n",), worlds=keys)
    acted = annotate([text.strip() for text in written], pasts[0].event.language)
    followed: dict[tuple[str, float], list[bool]] = {}
    for (_, dimension, level), labels in zip(keys, acted, strict=True):
        followed.setdefault((dimension, level), []).append(labels[dimension] == WATCHED[dimension])
    return {d: [float(np.mean(followed[d, level])) for level in LEVELS] for d in WATCHED}


def true_response(events: Sequence[Event], start: int, draws: int = 20) -> dict[str, list[float]]:
    """The response of agora's own process, in the shape of `response_curves`: the expected share of each WATCHED label
    among the ten agents from `start` on, if the population's shares were moved to each of LEVELS.

    Its agents react to the shares of stances alone: with these where they are, what is said of another dimension changes
    nothing. Raises InputError for events that are not agora's.
    """
    shares: dict[str, np.ndarray] = {d: np.zeros(len(LEVELS)) for d in WATCHED}
    for event in events:
        here = agora.world_of(event)
        stances = [STANCES.index(action.labels["stance"]) for action in event.actions[:start]]
        opinion, pending = agora.listen(here, here.first_opinion, stances)
        opinion = agora.absorb(opinion, pending, here.half_life)
        noise = agora.generator(event.id, "response").random((draws * UPDATE, agora.NOISE))
        for at, level in enumerate(LEVELS):
            moved = said({"stance": opinion}, "stance", WATCHED["stance"], level)["stance"]  # agora's order is ours
            for told, dimensions in ((moved, ("stance",)), (opinion, tuple(set(WATCHED) - {"stance"}))):
                labels = [
                    action.labels
                    for draw in np.split(noise, draws)
                    for action in agora.proceed(here, start, told, (), draw, start + UPDATE)
                ]
                for d in dimensions:
                    shares[d][at] += np.mean([row[d] == WATCHED[d] for row in labels]) / len(events)
    return {d: values.tolist() for d, values in shares.items()}


def slope(acted: Sequence[float]) -> float:
    """Least-squares slope of share acted against share said: 1 follows the signal, 0 ignores it."""
    return float(np.polyfit(LEVELS, acted, 1)[0])
