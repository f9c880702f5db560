"""A checkpoint's own chat template, rendered so that the template's words and the users' words stay apart.

Notable: contents are not shown to the template. It sees an unguessable word for each, and the contents take the words'
places in what it wrote. The stand-in keeps the content's own leading and trailing white space (so stripping works, and
an empty content is empty) but none of its inner features: a template that looks for "</think>" in a content finds none.
"""

import atexit
import json
import re
import secrets
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mfllm_ref.errors import InputError
from mfllm_ref.lm.checkpoint import read_object

PATIENCE = 10  # seconds that a template may run: those of real checkpoints take milliseconds
_worker: subprocess.Popen | None = None  # the process that renders, from the first chat on


class ChatTemplate:
    """A jinja2 template, run in its sandbox and in a process of its own (see chat_worker.py)."""

    def __init__(self, source: str, where: Path) -> None:
        self.source, self.where = source, where

    @classmethod
    def find(cls, folder: Path, config: Mapping[str, Any]) -> "ChatTemplate | None":
        """The template in chat_template.jinja, chat_template.json or `config`, the parsed tokenizer_config.json (there
        perhaps several by name; then the one called default). None without one. Raises InputError."""
        file = folder / "chat_template.jinja"
        if file.is_file():
            try:
                return cls(file.read_text(encoding="utf-8"), folder)
            except UnicodeDecodeError:
                raise InputError(f"{file}: not valid UTF-8") from None
        source = read_object(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
        if isinstance(source, list):
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
        if source is not None and not isinstance(source, str):
            raise InputError(f"{folder}: chat_template must be text")
        return None if source is None else cls(source, folder)

    def render(self, messages: Sequence[Mapping[str, str]], variables: Mapping[str, Any]) -> list[str]:
        """The rendered chat in parts: what the template wrote in even places, contents (without white space at their
        ends) in odd ones. messages: {"role", "content"} each. Raises InputError for whatever the template refuses, and where it
        changes a content, which it may place or leave out."""
        parts, whole = self._render(messages, variables)
        if not whole and self._render(messages, variables)[0][::2] != parts[::2]:  # a piece of a stand-in is in them
            raise InputError(f"{self.where}: the chat template changes what a message says")
        return parts

    def _render(self, messages: Sequence[Mapping[str, str]], variables: Mapping[str, Any]) -> tuple[list[str], bool]:
        """(`render`'s parts, whether every content is among them)."""
        contents: dict[str, str] = {}
        stand_ins = []
        for message in messages:
            word, core = f"content{secrets.token_hex(16)}x", message["content"].strip()
            contents[word] = core
            stand_ins.append({**message, "content": message["content"].replace(core, word, 1) if core else message["content"]})
        text = self._run({"tools": None, "documents": None, **variables, "messages": stand_ins})
        parts = re.split(f"({'|'.join(contents)})", text) if contents else [text]
        whole = contents.keys() <= set(parts[1::2])
        parts[1::2] = [contents[word] for word in parts[1::2]]
        return parts, whole

    def _run(self, variables: Mapping[str, Any]) -> str:
        global _worker
        if _worker is None or _worker.poll() is not None:
            script = Path(__file__).with_name("chat_worker.py")
            _worker = subprocess.Popen([sys.executable, "-P", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        late = threading.Timer(PATIENCE, _worker.kill)
        late.start()
        try:
            assert _worker.stdin is not None and _worker.stdout is not None  # both are pipes
            _worker.stdin.write(json.dumps([self.source, variables]).encode() + b"\n")
            _worker.stdin.flush()
            answer = json.loads(_worker.stdout.readline())
        except BaseException as error:
            _stop()  # an answer that is not waited for would be taken for the next chat's
            if not isinstance(error, (OSError, ValueError)):
                raise
            answer = {"error": f"it ran for over {PATIENCE} s, or out of memory"}  # it ended without an answer
        finally:
            late.cancel()
        if "error" in answer:
            raise InputError(f"{self.where}: the chat template failed: {answer['error']}")
        return answer["text"]


@atexit.register
def _stop() -> None:
    """End the process that renders."""
    if _worker is not None:
        _worker.kill()
        _worker.communicate()
