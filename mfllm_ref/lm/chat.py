"""A checkpoint's own chat template, rendered so that the template's words and the users' words stay apart.

Notable: contents are not shown to the template. It sees an unguessable word for each, and the contents take the words'
places in what it wrote. The stand-in keeps the content's own leading and trailing white space (so stripping works, and
an empty content is empty) but none of its inner features: a template that looks for "</think>" in a content finds none.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from mfllm_ref.errors import InputError
from mfllm_ref.lm.checkpoint import read_json


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file that a checkpoint may do without. Raises InputError if it is there but damaged."""
    value = read_json(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON object was expected")
    return value


class ChatTemplate:
    """A jinja2 template, run in its sandbox with the settings and functions that transformers gives it."""

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
        ends) in odd ones. messages: {"role", "content"} each. Raises InputError for whatever the template refuses."""
        contents: dict[str, str] = {}
        stand_ins = []
        for message in messages:
            word, core = f"content{secrets.token_hex(16)}x", message["content"].strip()
            contents[word] = core
            stand_ins.append({**message, "content": message["content"].replace(core, word, 1) if core else core})
        text = self._run({"tools": None, "documents": None, **variables, "messages": stand_ins})
        parts = re.split(f"({'|'.join(contents)})", text) if contents else [text]
        parts[1::2] = [contents[word] for word in parts[1::2]]
        return parts

    def _run(self, variables: Mapping[str, Any]) -> str:
        import jinja2  # here: most runs have no chat, and start sooner without
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:  # jinja2's own escapes HTML
            return json.dumps(value, ensure_ascii=ensure_ascii, **options)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return environment.from_string(self.source).render(**variables)
        except Exception as error:  # the template is a program of the checkpoint's: it may fail in any way
            raise InputError(f"{self.where}: the chat template failed: {error or type(error).__name__}") from None
