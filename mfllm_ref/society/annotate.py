"""What an action's own words say, one label a dimension: rules and a lexicon, or a language model.

Notable: the lexicon is data (lexicon.json): classes of zh and en cues, an underscore for a space, `^` for a cue that
counts only as the whole text. A class adds weights to a few axes (EFFECTS), a negation just before a cue turns them,
and thresholds make the labels. One regular expression a language, longest cue first, passes once over the text.

Only the writer's own words count: `//@` chains, the name in a reply, 《titles》 and retweeted quotes are cut first.
Emoticons such as [怒] are the writer's own sentiment label. What has no own word (an empty text, 转发微博, only
mentions, links or a quote) is a share. A text without a cue gets the defaults below: a plain share passes the claim
on, as told, without a word of its own, hence spread, calm, neutral, neutral, believe, objective, opinion.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from mfllm_ref.errors import InputError
from mfllm_ref.society.events import DIMENSIONS, LANGUAGES

if TYPE_CHECKING:
    from mfllm_ref.lm import LanguageModel

STATES = ("angry", "happy", "sad", "fear", "surprise")
AXES = (*STATES, "tendency", "stance", "doubt", "counter", "question", "promotion", "subjective")
EFFECTS: dict[str, dict[str, float]] = {
    "angry": {"angry": 1, "tendency": -1, "subjective": 1},
    "happy": {"happy": 1, "tendency": 1, "subjective": 1},
    "sad": {"sad": 1, "tendency": -1, "subjective": 1},
    "fear": {"fear": 1, "tendency": -1, "subjective": 1},
    "surprise": {"surprise": 1, "subjective": 1},
    "positive": {"tendency": 1, "stance": 0.5, "subjective": 1},
    "negative": {"tendency": -1, "stance": -0.5, "subjective": 1},
    "support": {"stance": 1, "subjective": 1},
    "oppose": {"stance": -1, "subjective": 1},
    "believe": {"doubt": -1},
    "affirm": {"doubt": -1, "stance": 1, "subjective": -1},
    "doubt": {"doubt": 1, "counter": 0.5},  # a lone doubt is private, two counter the claim
    "deny": {"doubt": 1, "counter": 1, "stance": -1.5},
    "proof": {"doubt": 1, "counter": 1},
    "question": {"question": 1},
    "ask": {"question": 0.5},
    "promotion": {"promotion": 1},
    "plug": {"promotion": 0.5, "stance": 0.2},  # a link or hashtag invites only with another; it also is evidence
    "report": {"subjective": -1, "stance": 0.4},  # who reports a claim as news stands behind it
    "opinion": {"subjective": 1},
    "emphasis": {"subjective": 0.5},
    "emoticon": {"subjective": 0.5},  # one that the lexicon does not know
}
# What a negation leaves of a cue: stance and belief turn, a negated feeling is no feeling, a question stays one.
NEGATED = {"tendency": -0.5, "stance": -1.0, "doubt": -1.0, "question": 1.0, "subjective": 1.0}
TOKENS = {  # what is not a word; also keeps words inside links, names and titles from counting
    "plug": r"https?:[^\s\u4e00-\u9fff]*|#[^#\s]{1,60}#|#\w+",
    "name": r"@[^\s:：,，。@]{0,40}",
    "title": r"《[^》]{0,80}》",
    "emoticon": r"\[[^\[\]\s]{1,8}\]",
    "question": r"\?+",
    "emphasis": r"!+",
    "happy": r"[哈嘿嘻]{2,}|2?333+|\b(?:ha|he){2,}h?\b|\blo+l\b",
}
# \u00ad to \ufeff show nothing; all other white space counts as filler, too.
FILLER = " \t\r\n\u00ad\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\ufe0f\ufeff.。,、…·~:;-—_/\\|()\"'“”‘’@#&*=><【】[]`^"
# A leading marker makes a share too; the words after it are the sharer's unless they are quoted from @somebody.
SHARED = re.compile(r"\s*(?:rt\b|(?:re-?post(?:ing)?|shar(?:ed|ing)(?: this)?|passing this on|fwd|转发?) ?:)")
FULLWIDTH = str.maketrans("？！，～：；（）［］’＠＃", "?!,~:;()[]'@#")
QUOTED_ZH = re.compile(r"/\s{0,3}@.*|\bRT\s{0,3}@.*", re.DOTALL)
REPLY_ZH = re.compile(r"\A\s*回[复復覆]\s*@?[^\s:：]{1,40}\s*[:：]")
QUOTED_EN = re.compile(r"""[“"]\s*@\w+:?[^”"]{0,300}[”"]?|\b[RMQ]T\b[\s:]*[“"]?\.?@.*""", re.DOTALL)


class _Rules:
    """The compiled lexicon of one language."""

    def __init__(self, language: str) -> None:
        data = json.loads(Path(__file__).with_name("lexicon.json").read_text(encoding="utf-8"))
        self.chinese = language == "zh"
        self.table = dict(FULLWIDTH)
        if self.chinese:
            pairs = data["traditional"]
            self.table.update(str.maketrans(pairs[::2], pairs[1::2]))
        classes = {name: [cue.replace("_", " ").translate(self.table) for cue in cues.split()]
                   for name, cues in data[language].items()}
        share = classes.pop("share")
        self.negations = frozenset(classes.pop("negation"))
        self.effects: dict[str, dict[str, float]] = {cue: {} for cue in (*classes.pop("skip"), *self.negations)}
        for name, cues in classes.items():
            for cue in cues:
                self._add(cue, name)
                if cue.endswith(("?", "吗")) and name != "question":  # the cue swallows what asks
                    self._add(cue, "question")
        tokens = "|".join(f"(?P<{name}>{pattern})" for name, pattern in TOKENS.items())
        literals = [cue for cue in self.effects if cue[0] not in "^["]
        self.pattern = re.compile(f"{tokens}|{self._alternation(literals)}")
        # Possessive, so that a long text cannot make the matcher backtrack.
        own = "|".join((TOKENS["plug"], TOKENS["name"], self._alternation(share), rf"[\s{re.escape(FILLER)}]"))
        self.no_own_word = re.compile(f"(?:{own})*+")

    def _add(self, cue: str, name: str) -> None:
        axes = self.effects.setdefault(cue, {})
        for axis, weight in EFFECTS[name].items():
            axes[axis] = axes.get(axis, 0.0) + weight

    def _alternation(self, cues: Iterable[str]) -> str:
        """Longest first, grouped by first character so that the matcher tries few of the cues at each position."""
        groups: dict[str, list[str]] = {}
        for cue in sorted(cues, key=lambda cue: (-len(cue), cue)):
            edge = r"(?![a-z0-9_])" if cue[-1].isascii() and cue[-1].isalnum() else ""
            groups.setdefault(cue[0], []).append(re.escape(cue[1:]) + edge)
        parts = []
        for first, rests in groups.items():
            edge = r"(?<![a-z0-9_'])" if first.isascii() and first.isalnum() else ""
            parts.append(f"{edge}{re.escape(first)}(?:{'|'.join(rests)})")
        return "|".join(parts)

    def own_words(self, text: str) -> str:
        if self.chinese:
            return QUOTED_ZH.sub("", REPLY_ZH.sub("", text, count=1))
        return QUOTED_EN.sub(" ", text)

    def labels(self, text: str) -> tuple[str, ...]:
        own = self.own_words(text).lower().translate(self.table)
        bare = own.strip("! ") or own  # "!!!" alone is a reaction
        share = bool(self.no_own_word.fullmatch(bare) or SHARED.match(own))
        score = dict.fromkeys(AXES, 0.0)
        negation = -1  # where the last negation ended
        for match in self.pattern.finditer(own):
            kind, cue = match.lastgroup, match.group()
            effect = self.effects[cue] if kind in (None, "emoticon") and cue in self.effects else EFFECTS.get(kind or "", {})
            if match.start() > negation + 24:
                negation = -1
            negated = negation >= 0 and effect and self._reaches(own[negation:match.start()])
            for axis, weight in effect.items():
                score[axis] += weight * NEGATED.get(axis, 0.0) if negated else weight
            if negated:
                negation = -1
            if cue in self.negations:
                negation = match.end()
        for axis, weight in self.effects.get("^" + own.strip(FILLER + "!?"), {}).items():
            score[axis] += weight
        return _decide(share, score)

    def _reaches(self, gap: str) -> bool:
        """Whether a negation still governs a cue that begins `gap` after it."""
        near = len(gap) <= 2 if self.chinese else gap.count(" ") <= 3
        return near and not any(mark in gap for mark in ".,;:!?。、")


def _decide(share: bool, score: Mapping[str, float]) -> tuple[str, ...]:
    state = max(STATES, key=lambda name: score[name])
    tendency, stance = score["tendency"], score["stance"]
    question = score["question"] >= 1 and score["question"] >= score["promotion"]
    return (
        "counter" if score["counter"] >= 1 or (score["doubt"] > 0 and stance <= -0.8) else "spread",
        state if score[state] > 0 else "calm",
        "positive" if tendency > 0 else "negative" if tendency < 0 else "neutral",
        "share" if share else "comment",
        "support" if stance >= 0.8 else "oppose" if stance <= -0.8 else "neutral",
        "doubt" if score["doubt"] > 0 else "believe",
        "subjective" if score["subjective"] > 0 else "objective",
        "question" if question else "promotion" if score["promotion"] >= 1 else "opinion",
    )


@cache
def _rules(language: str) -> _Rules:
    if language not in LANGUAGES:
        raise InputError(f"unknown language {language!r}: the annotator knows {', '.join(LANGUAGES)}")
    return _Rules(language)


@lru_cache(maxsize=1 << 17)
def _short(text: str, language: str) -> tuple[str, ...]:
    return _rules(language).labels(text)


def annotate(text: str, language: str) -> dict[str, str]:
    """The label of every dimension of DIMENSIONS for one action's text. Raises InputError for an unknown language."""
    labels = _short(text, language) if len(text) <= 280 else _rules(language).labels(text)
    return dict(zip(DIMENSIONS, labels))


class RuleAnnotator:
    """The annotator every measure uses by default: rules, the same for real, simulated and floor texts."""

    def __call__(self, texts: Sequence[str], language: str) -> list[dict[str, str]]:
        return [annotate(text, language) for text in texts]


LABELS_ZH = dict(zip((label for labels in DIMENSIONS.values() for label in labels), (
    "传播 反驳 愤怒 平静 高兴 悲伤 恐惧 惊讶 积极 消极 中立 评论 转发 支持 反对 中立 相信 怀疑 主观 客观 提问 宣传 观点").split()))
QUESTIONS = {
    "en": dict(zip(DIMENSIONS, (
        "Does the author spread the claim or counter it?", "What does the author feel?",
        "What is the tone of the post?", "Is this a comment in the author's own words or only a share?",
        "What is the author's stance?",
        "Does the author believe the claim or doubt it?", "Is the post subjective or objective?",
        "Does the author ask a question, promote something or give an opinion?"))),
    "zh": dict(zip(DIMENSIONS, (
        "作者在传播这个说法，还是在反驳它？", "作者的情绪是什么？", "这条微博的倾向是什么？", "这是作者自己的评论，还是单纯的转发？",
        "作者的立场是什么？", "作者相信这个说法，还是怀疑它？", "这条微博是主观的还是客观的？", "作者是在提问、宣传，还是表达观点？"))),
}
PROMPTS = {
    "en": ("Classify a social media post.\nQuestion: {question} Answer with one of: {options}.\n"
           'Post: "{post}"\nAnswer:', ", ", " "),
    "zh": ("请给一条微博分类。\n问题：{question}只回答其中一个词：{options}。\n微博：“{post}”\n回答：", "、", ""),
}
CONTENT_FREE = "N/A"
PROMPT_CHARACTERS = 500


class LMAnnotator:
    """Asks a language model: the label whose word gains most from the post, a dimension at a time.

    score(label) = log p(word | prompt with the post) - log p(word | prompt with the post "N/A"). The second term takes
    out how likely and how long the word is by itself (contextual calibration), so no length normalisation is needed.
    Worth its price with a large model only. A post enters as one line, cut to 500 characters and half of the backbone's
    positions, so that it cannot leave its place in the prompt; a blank one gets the rules' labels, there being nothing to read.
    """

    def __init__(self, lm: "LanguageModel", batch: int = 8) -> None:
        self.lm, self.batch = lm, batch
        self._free: dict[str, list[float]] = {}

    def __call__(self, texts: Sequence[str], language: str) -> list[dict[str, str]]:
        results = [annotate(text, language) for text in texts]
        if language not in self._free:
            self._free[language] = self._log_probs([CONTENT_FREE], language)[0]
        written = [index for index, text in enumerate(texts) if text.strip()]
        for start in range(0, len(written), self.batch):
            chunk = written[start:start + self.batch]
            for index, row in zip(chunk, self._log_probs([texts[index] for index in chunk], language)):
                gains = iter([log_prob - free for log_prob, free in zip(row, self._free[language])])
                for dimension, labels in DIMENSIONS.items():
                    scores = {label: next(gains) for label in labels}
                    results[index][dimension] = max(scores, key=scores.__getitem__)
        return results

    def _log_probs(self, texts: Sequence[str], language: str) -> list[list[float]]:
        """For each text, log p of each label of each dimension, in the order of DIMENSIONS, natural log."""
        import torch  # here, because whoever uses the rules alone needs none of it

        template, comma, lead = PROMPTS[language]
        prompts: list[str] = []
        continuations: list[str] = []
        for text in texts:
            post = " ".join(text[:PROMPT_CHARACTERS].split())
            while len(self.lm.tokenizer.encode(post)) > self.lm.backbone.config.max_positions // 2:
                post = post[: 3 * len(post) // 4]  # the other half is the question's
            for dimension, labels in DIMENSIONS.items():
                words = [LABELS_ZH[label] if language == "zh" else label for label in labels]
                prompt = template.format(question=QUESTIONS[language][dimension], options=comma.join(words), post=post)
                prompts += [prompt] * len(words)
                continuations += [lead + word for word in words]
        with torch.no_grad():  # labels of one question share their whole prompt, so it is their world
            found = self.lm.log_prob(prompts, continuations, worlds=prompts)
        return found.view(len(texts), -1).tolist()
