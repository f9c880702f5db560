"""Checked reading of JSON: whatever is wrong with a file or a field is one InputError that says where and why.

`where` is always the start of the message: the file, and the line, event or action in it.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mfllm_ref.errors import InputError


def read_json(path: Path, unique: bool = True, largest: int | None = None) -> Any:
    """What the file holds, see `parse_json`. largest: bytes; a file that has more is refused unread."""
    if largest is not None and path.is_file() and path.stat().st_size > largest:
        raise InputError(f"{path}: larger than {largest} bytes; no genuine file of this kind is")
    return parse_json(read_text(path), str(path), unique)


def read_text(path: Path) -> str:
    """The whole file as text, a byte order mark left out."""
    if not path.is_file():
        raise InputError(f"{path}: {'not a regular file' if path.exists() else 'no such file or folder'}")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start})") from None


def parse_json(text: str, where: str, unique: bool = True) -> Any:
    """Strict JSON: NaN, infinities and, if `unique`, keys that occur twice in an object are malformed too."""

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if unique and len(result) < len(items):
            keys = [key for key, _ in items]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {show(twice)} occurs twice in one object")
        return result

    try:
        return json.loads(text, parse_constant=constant, object_pairs_hook=pairs)
    except RecursionError:
        raise InputError(f"{where}: JSON nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{where}: malformed JSON: {error}") from None


def an_object(value: Any, where: str, name: str) -> dict[str, Any]:
    """`value`, if it is a JSON object; `name` says what it stands for."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: {name} must be a JSON object, not {kind(value)}")
    return value


def a_list(value: Any, where: str, name: str) -> list[Any]:
    """`value`, if it is a JSON list; `name` says what it stands for."""
    if not isinstance(value, list):
        raise InputError(f"{where}: {name} must be a JSON list, not {kind(value)}")
    return value


def text_field(item: Mapping[str, Any], key: str, where: str, default: str | None = None) -> str:
    """The string `item[key]`; an absent or null one is the default, or an error where there is none."""
    value = item.get(key)
    if value is None and default is not None:
        return default
    if type(value) is int and key in ("id", "agent", "uid", "mid", "parent"):  # ids are often numbers
        return str(value)
    if not isinstance(value, str):
        raise InputError(f"{where}: {key!r} must be a string, not {kind(value) if key in item else 'missing'}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: {key!r} holds a lone surrogate at character {error.start}") from None
    return value


def number_field(item: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    """The finite number `item[key]`; an absent or null one is the default, or an error where there is none."""
    value: Any = item.get(key)
    if value is None and default is not None:
        return default
    if type(value) not in (int, float):
        raise InputError(f"{where}: {key!r} must be a number, not {kind(value) if key in item else 'missing'}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InputError(f"{where}: {key!r} is not a finite number")
    return number


def kind(value: Any) -> str:
    """The JSON type of a value, for an error message."""
    return {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}.get(
        type(value), "a number")


def show(value: Any) -> str:
    """A value for an error message: short, on one line, printable anywhere."""
    text = ascii(value) if not isinstance(value, str) or not value.isprintable() else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
