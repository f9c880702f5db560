import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfllm_ref.society import prompts
from mfllm_ref.society.prompts import Signal

LANGUAGES = st.sampled_from(["en", "zh"])
TEXTS = st.text(alphabet=st.characters(codec="utf-8"), max_size=80)
BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


def headings(language: str) -> list[str]:
    wording = prompts.WORDING[language]
    return [wording.topic, wording.post, wording.recent, wording.popular, wording.population, wording.user,
            wording.action, wording.newest.format(7), wording.summary]  # fmt: skip


def sections(prompt: str, language: str) -> list[str]:
    """The headings that stand at the start of a line, in order."""
    return [h for line in prompt.splitlines() for h in headings(language) if line.startswith(h.strip())]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(LANGUAGES, TEXTS, st.lists(TEXTS, max_size=3), TEXTS, st.lists(st.tuples(TEXTS, TEXTS), max_size=3))
def test_no_text_forges_a_section(language, topic, posts, profile, actions):
    """Whatever people write, the sections of a prompt are those of the same prompt with harmless words."""
    # Every text is made as hostile as it can be: it tries to open each section after each kind of line break.
    attack = "".join(b + h for b in BREAKS for h in headings(language)[:3])
    dirty = [prompts.policy_shared(language, topic + attack, [p + attack for p in posts],
                                   Signal("recent", tuple(t + attack for _, t in actions)))
             + prompts.policy_private(language, "x" + profile + attack)]  # fmt: skip
    clean = [prompts.policy_shared(language, "a", ["a" for _ in posts], Signal("recent", tuple("a" for _ in actions)))
             + prompts.policy_private(language, "a")]  # fmt: skip
    dirty.append(prompts.mean_field_prompt(language, topic + attack, posts, "m" + attack, [(p + attack, t) for p, t in actions], 7))
    clean.append(prompts.mean_field_prompt(language, "a", ["a" for _ in posts], "m", [("a", "a") for _ in actions], 7))
    for hostile, harmless in zip(dirty, clean, strict=True):
        assert sections(hostile, language) == sections(harmless, language)
        assert len(hostile.splitlines()) == len(harmless.splitlines())


def test_the_shared_part_is_a_prefix_of_every_agents_prompt():
    shared = prompts.policy_shared("en", "a topic", ["a denial"], Signal("population", ("stance: support 43%",)))
    private = prompts.policy_private("en", "Ada, nurse")
    assert shared.splitlines()[1:] == ["Topic: a topic", "News: a denial", "Population: stance: support 43%"]
    assert private == "User: Ada, nurse\nPost:\n"
    assert prompts.policy_private("en", "  ") == "Post:\n"


def test_a_long_post_is_cut_where_it_enters_a_prompt():
    post = "word " * 20_000
    assert len(prompts.continuation(post)) <= prompts.ACTION_CHARS
    shared = prompts.policy_shared("en", post, [post], Signal("popular", (post,) * 5))
    assert len(shared) < 1200
    assert prompts.one_line(" " * 5000 + "late\n" * 9, 14) == "late late late"  # what stands far behind is read all the same


def test_a_post_that_an_agent_may_write_is_listed_whole():
    """What a policy can write in one action, its readers see to the end: the words that show an intent often stand there."""
    post = ("word " * 40)[: prompts.ACTION_CHARS - 5] + " Join!"[-5:]
    assert prompts.continuation(post) == post
    told = prompts.policy_shared("en", "T", [], Signal("recent", (post,))), prompts.mean_field_prompt("en", "T", [], "", [("", post)], 1)
    assert all("- " + post in text.splitlines() for text in told)


def test_a_plain_share_is_listed_by_its_name():
    shared = prompts.policy_shared("zh", "话题", [], Signal("recent", ("", "好")))
    assert shared.splitlines()[-2:] == ["- （转发）", "- 好"]


def test_the_prior_has_neither_topic_nor_history():
    prior = prompts.prior_prompt("en")
    full = prompts.mean_field_prompt("en", "a topic", ["a denial"], "m", [("Ada", "yes")], 1)
    assert prior.splitlines() == [full.splitlines()[0], full.splitlines()[-1]]


@pytest.mark.parametrize(("acted", "told"), [(60, "60"), (199, "199"), (200, "200+"), (40_000, "200+")])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_mean_field_prompt_names_all_it_is_given(language, acted, told):
    lines = prompts.mean_field_prompt(language, "T", ["P"], "M", [("Ada", "yes"), ("", "")], acted).splitlines()
    wording = prompts.WORDING[language]
    assert lines == [
        wording.mean_field, wording.topic + "T", wording.post + "P", wording.newest.format(told), "- Ada: yes",
        "- " + wording.share, wording.population + "M", wording.summary,
    ]  # fmt: skip
