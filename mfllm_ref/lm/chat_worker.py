"""Renders chat templates, a request a line: run by chat.py as a process of its own.

A template is a program that came with the weights. Jinja2's sandbox keeps it from the interpreter and the disk, but not from
looping for ever or doubling a text until memory is full: that only the operating system can end. Nothing of the library is
imported here, so that the process starts in a tenth of a second.
"""

import contextlib
import functools
import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

TODAY = datetime(2024, 7, 26)  # always: a run must not depend on its day (this one is Llama 3's own default)
MEMORY = 2**29  # bytes of address space
LONGEST = 2**20  # characters that it may write, contents not counted: who encodes them needs 300 times the memory


@functools.lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    """A template with the settings and functions that transformers gives it."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:  # jinja2's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = TODAY.strftime
    return environment.from_string(source)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who asked; this process ends with its input
    with contextlib.suppress(ValueError, OSError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        try:
            source, variables = json.loads(line)
            answer = {"text": compiled(source).render(**variables)}
            if len(answer["text"]) > LONGEST:
                raise ValueError(f"it wrote {len(answer['text'])} characters")
        except Exception as error:  # a program may fail in any way
            answer = {"error": str(error) or type(error).__name__}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
