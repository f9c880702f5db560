"""Agora's words: topics, profiles, public posts and comments, filled from `agora_grammar.json`.

A text is assembled from short ordinary phrases, each of which says something about one dimension (a stance, a fact, a
belief, a feeling, a judgement, a question or an appeal), in varying order and number, so that no template is the label.
Every choice takes one uniform number from its caller: the same uniforms give the same words. Names, places and brands
are made up.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

STANCES = ("support", "oppose", "neutral")


@cache
def grammar() -> dict[str, Any]:
    """The phrases by what they say; a test holds their sha256."""
    return json.loads(files("mfllm_ref.society").joinpath("agora_grammar.json").read_text(encoding="utf-8"))


def pick(options: Sequence[str], u: float) -> str:
    """The option at uniform `u` in [0, 1)."""
    return options[int(u * len(options))]


def topic(domain: str, contagion: int, lean: str, strong: bool, name: str, place: str, u: Iterator[float]) -> str:
    """The topic text: its kind says how contagious it is (0 to 2), a second sentence which way the field leans."""
    kind = pick(grammar()["domains"][domain]["kinds"][contagion], next(u))
    return kind.format(name=name, place=place) + " " + pick(grammar()["lean"][lean][strong], next(u))


def public_post(direction: str, official: bool, u: float) -> str:
    """A public post that moves the field towards a stance; an official one moves it further than a celebrity's."""
    return pick(grammar()["posts"][direction][official], u)


def sentences(text: str) -> str:
    """The text with a capital letter at the start of each sentence."""
    return re.sub(r"(^|[.!?] )([a-z])", lambda match: match[1] + match[2].upper(), text)


def comment(labels: Mapping[str, str], slots: Mapping[str, str], domain: str, u: Iterator[float]) -> str:
    """A comment that shows `labels`, about 5 to 18 words; a share is passed on without a word, or says just that.

    `slots` holds place and occupation, `u` yields uniforms (at most 24 are used).
    """
    words, stance = grammar(), labels["stance"]
    if labels["behavior_type"] == "share":
        return pick(words["share"], next(u))
    objective, doubt = labels["subjectivity"] == "objective", labels["belief_degree"] == "doubt"
    feeling, tendency = labels["sentiment_state"], labels["sentiment_tendency"]
    denial = labels["rumor"] == "counter"
    view = "deny" if denial else "object" if stance == "oppose" else stance
    pieces = []
    if not (objective and labels["intent"] == "question" and stance == "neutral" and next(u) < 0.6):
        pieces.append(pick(words["fact"][stance] if objective else words["stance"][view], next(u)))
    if not objective and (next(u) < 0.2 if denial or stance == "support" and not doubt else doubt):
        pieces.append(pick(words["belief"][labels["belief_degree"]], next(u)))
    if feeling != "calm":
        pieces.append(pick(words["state"][feeling], next(u)))
    if feeling in ("calm", "surprise") and tendency != "neutral":
        pieces.append(pick(words["tendency"][tendency], next(u)))
    turn = int(next(u) * max(len(pieces), 1))
    pieces = pieces[turn:] + pieces[:turn]
    text = pieces[0] if pieces else ""
    for piece in pieces[1:]:
        text += (pick((", ", ". ", " and "), next(u)) if len(pieces) == 2 else ". ") + piece
    if text and not objective and len(pieces) < 3 and next(u) < 0.25:
        text = pick(words["openers"], next(u)) + " " + text
    if text:
        text += "." if objective else pick((".", ".", "!"), next(u))
    if labels["intent"] != "opinion":
        appeal = pick(words["intent"][labels["intent"]], next(u))
        text += (" " if text else "") + appeal + ("" if appeal.endswith("?") else ".")
    nouns = words["domains"][domain]
    return sentences(text.format(**slots, it=pick(nouns["it"], next(u)), about=pick(nouns["about"], next(u))))
