"""What a model is told: prompts of the policy pi(a | c, s, m) and of the mean-field model mu(m_t | c, X_t), in zh and en.

A policy prompt is a shared part (topic, public posts, signal), the same for all agents of a step, then a private part (the
profile and the instruction): the language model computes the shared part once. Every piece of text that comes from people is
put on one line behind a marker that only counts at the start of a line, so a post can neither end a prompt nor forge one of
its sections. Texts are cut here, and only here; files keep them whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# Characters that enter a prompt, by what the text is. A post of 100,000 characters is legal and must not fill the context.
TOPIC_CHARS, POST_CHARS, PROFILE_CHARS, ACTION_CHARS = 160, 140, 100, 140
# A summary's tokens are drawn from the likeliest that have this probability together; an action's are drawn from all there are.
# All later steps believe what is wrong in a summary, so unlikely tokens are left out (README, Results, has the numbers).
SUMMARY_TOP_P = 0.9
MANY = 200  # from so many posts on a prompt states only "200+": by then each new step weighs about the same


@dataclass(frozen=True, slots=True)
class Signal:
    """What the agents of a step are told of the population: a `kind` of WORDING's headings and its lines."""

    kind: str  # "recent", "popular" or "population"
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wording:
    """The fixed words of both prompts in one language."""

    policy: str
    mean_field: str
    topic: str
    post: str
    recent: str
    popular: str
    population: str
    user: str
    action: str
    newest: str
    summary: str
    share: str


WORDING = {
    "en": Wording(
        policy="A topic and how people react to it. Write the user's next post, or nothing to share it as it is.",
        mean_field="A topic and how people react to it. Write the share of each reaction, in percent.",
        topic="Topic: ",
        post="News: ",
        recent="Recent posts:",
        popular="Popular posts:",
        population="Population: ",
        user="User: ",
        action="Post:",
        newest="Newest of {} posts:",
        summary="Summary:",
        share="(share)",
    ),
    "zh": Wording(
        policy="一个话题和人们的反应。写出该用户的下一条发言，不写则为直接转发。",
        mean_field="一个话题和人们的反应。写出各种反应所占的百分比。",
        topic="话题：",
        post="新闻：",
        recent="最近发言：",
        popular="热门发言：",
        population="群体：",
        user="用户：",
        action="发言：",
        newest="{}条发言中最新的：",
        summary="总结：",
        share="（转发）",
    ),
}


def one_line(text: str, limit: int) -> str:
    """`text` on one line (every run of whitespace becomes one space), at most `limit` characters of it."""
    line = " ".join(text.split(maxsplit=limit)[:limit])  # no word has less than a character
    return line if len(line) <= limit else line[:limit].rstrip()


def continuation(text: str) -> str:
    """An action as the policy writes it: one line, cut; a plain share is the empty string."""
    return one_line(text, ACTION_CHARS)


def _listed(text: str, wording: Wording) -> str:
    return one_line(text, ACTION_CHARS) or wording.share


def _context(wording: Wording, topic: str, posts: Sequence[str]) -> list[str]:
    return [wording.topic + one_line(topic, TOPIC_CHARS)] + [wording.post + one_line(p, POST_CHARS) for p in posts]


def policy_shared(language: str, topic: str, posts: Sequence[str] = (), signal: Signal | None = None) -> str:
    """The part of a policy prompt that all agents of a step share: topic c, public posts, signal m. Ends with a newline."""
    wording = WORDING[language]
    lines = [wording.policy, *_context(wording, topic, posts)]
    if signal is not None and signal.kind == "population":
        lines.append(wording.population + " ".join(signal.lines[0].split()))
    elif signal is not None:
        lines.append(getattr(wording, signal.kind))
        lines += ["- " + _listed(line, wording) for line in signal.lines]
    return "\n".join(lines) + "\n"


def policy_private(language: str, profile: str) -> str:
    """The part of a policy prompt that is one agent's own: profile s_i, then the instruction to act."""
    wording = WORDING[language]
    profile = one_line(profile, PROFILE_CHARS)
    return (f"{wording.user}{profile}\n" if profile else "") + wording.action + "\n"


def mean_field_context(language: str, topic: str, posts: Sequence[str]) -> str:
    """The instruction to the mean-field model, topic c and public posts. Ends with a newline."""
    wording = WORDING[language]
    return "\n".join([wording.mean_field, *_context(wording, topic, posts)]) + "\n"


def mean_field_newest(language: str, actions: Sequence[tuple[str, str]], acted: int) -> str:
    """The newest `actions`, (profile, text) each in canonical order.

    acted: posts so far, these included. It tells how much the newest weigh beside the summary before, which speaks for the others.
    """
    wording = WORDING[language]
    lines = [wording.newest.format(acted if acted < MANY else f"{MANY}+")]
    for profile, text in actions:
        profile = one_line(profile, PROFILE_CHARS)
        lines.append("- " + (profile + ": " if profile else "") + _listed(text, wording))
    return "\n".join(lines) + "\n"


def mean_field_private(language: str, previous: str) -> str:
    """The summary before, m_{t-1}, if there is one, then the instruction to write the next."""
    wording = WORDING[language]
    return (wording.population + " ".join(previous.split()) + "\n" if previous else "") + wording.summary + "\n"


def mean_field_prompt(
    language: str, topic: str, posts: Sequence[str], previous: str, actions: Sequence[tuple[str, str]], acted: int
) -> str:
    """The prompt of mu(m_t | c, X_t), X_t = (m_{t-1}, s_{t-1}, a_{t-1}): context, newest actions, summary before."""
    context, newest = mean_field_context(language, topic, posts), mean_field_newest(language, actions, acted)
    return context + newest + mean_field_private(language, previous)


def prior_prompt(language: str) -> str:
    """The prompt of the prior r(m): the bare instruction, neither topic nor history."""
    wording = WORDING[language]
    return wording.mean_field + "\n" + wording.summary + "\n"
