"""The response curve: what share of agents acts as the signal says the population does.

A policy that reads its signal follows it; one that shrinks it (says 20% when told 5%, 50% when told 95%) cannot reproduce a
population that tips. The curve costs seconds and is the diagnostic to watch while training.
"""

from collections.abc import Sequence

import numpy as np

from mfllm_ref.lm import LanguageModel
from mfllm_ref.society import prompts
from mfllm_ref.society.corpus import Past
from mfllm_ref.society.events import DIMENSIONS, hashed
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


def response_curve(
    lm: LanguageModel, pasts: Sequence[Past], annotate: Annotator, dimension: str, step: int = 5, agents: int = 10,
    adapter: str | None = None, action_tokens: int = 48,
) -> list[float]:  # fmt: skip
    """Share of simulated actions that carry WATCHED[dimension] when the signal states each of LEVELS.

    The topic, the posts and the other dimensions are those of `pasts` at `step`; `agents` of each event act at each level.
    """
    label, out = WATCHED[dimension], []
    for level in LEVELS:
        texts, seeds, worlds = [], [], []
        for world, past in enumerate(pasts):
            event, history = past.event, History(past.batch)
            for earlier in range(step):
                history.update(past.actions(earlier))
            told = verbalise(said(history.population(), dimension, label, level), event.language)
            shared = prompts.policy_shared(event.language, event.topic, past.posts(step), Signal("population", (told,)))
            for seen in past.actions(step, agents):
                texts.append(shared + prompts.policy_private(event.language, seen.profile))
                seeds.append(hashed("response", event.id, dimension, level, seen.id))
                worlds.append(world)
        with lm.adapter(adapter):
            written = lm.generate(texts, action_tokens, seeds=seeds, stop=("\n",), worlds=worlds)
        acted = annotate([text.strip() for text in written], pasts[0].event.language)
        out.append(float(np.mean([row[dimension] == label for row in acted])))
    return out


def slope(acted: Sequence[float]) -> float:
    """Least-squares slope of share acted against share said: 1 follows the signal, 0 ignores it."""
    return float(np.polyfit(LEVELS, acted, 1)[0])
