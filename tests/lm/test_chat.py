"""Chat templates see stand-ins: what they do to those must not be taken for what they write."""

from pathlib import Path

import pytest

from mfllm_ref.errors import InputError
from mfllm_ref.lm.chat import ChatTemplate

CHAT = [{"role": "user", "content": " Is it true? "}, {"role": "assistant", "content": "Yes."}]


@pytest.mark.parametrize("change", ["upper", "title", "wordwrap(20)", "truncate(12, True)", "replace('0', 'o')", "reverse"])
def test_a_template_that_changes_contents_is_refused(change):
    """Its prompt would hold a piece of a stand-in, another one in every call, and not what was said."""
    template = ChatTemplate("{% for m in messages %}<{{ m.content | " + change + " }}>{% endfor %}", Path("folder"))
    with pytest.raises(InputError, match="folder: the chat template changes what a message says"):
        template.render(CHAT, {})


def test_a_template_may_leave_contents_out_and_repeat_them():
    template = ChatTemplate("<{{ messages[0].content | trim }}|{{ messages[0].content }}>", Path("folder"))
    assert template.render(CHAT, {}) == ["<", "Is it true?", "| ", "Is it true?", " >"]


def test_the_day_is_always_the_same():
    """A run that is resumed or repeated on another day must see the same prompts."""
    template = ChatTemplate("{{ strftime_now('%d %b %Y %H:%M:%S') }}", Path("folder"))
    assert template.render([], {}) == ["26 Jul 2024 00:00:00"]


def test_white_space_is_a_content():
    template = ChatTemplate("[{{ messages[0].content }}]", Path("folder"))
    assert "".join(template.render([{"role": "user", "content": " \n "}], {})) == "[ \n ]"
