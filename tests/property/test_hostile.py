"""Damaged files raise documented errors and nothing else; what people write cannot leave its place in a prompt.

The targets are those of tests/fuzz.py, which damages them for a minute in CI; here a few hundred examples know what they damage.
"""

import importlib.util
import json
import struct
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mfllm_ref.errors import InputError
from mfllm_ref.lm import LanguageModel
from mfllm_ref.society import prompts
from mfllm_ref.society.prompts import WORDING, Signal

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("fuzz", ROOT / "tests" / "fuzz.py")
fuzz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)


def check(examples: int) -> settings:
    phases = (Phase.explicit, Phase.generate)
    return settings(deadline=None, derandomize=True, database=None, max_examples=examples, phases=phases)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def found(place):
    return fuzz.targets(place)


STRANGE = st.sampled_from(
    [None, True, -1, 0, 2**70, 1e300, 0.5, "", "\ud800", "../../../etc/passwd", "/dev/zero", "\0", "a\nb", "x" * 3000, [], {}, [[]],
     {"": None}, ["q_proj", 3], {"content": None}]
)  # fmt: skip


def altered(value, data):
    """A parsed JSON value with one item, somewhere in it, replaced, removed, renamed or moved."""
    if not isinstance(value, dict | list) or not value or data.draw(st.integers(0, 5)) == 0:
        return data.draw(STRANGE)
    key = data.draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
    how = data.draw(st.sampled_from(["into", "into", "into", "remove", "rename"]))
    out = dict(value) if isinstance(value, dict) else list(value)
    if how == "into":
        out[key] = altered(out[key], data)
    else:
        item = out.pop(key)
        if how == "rename" and isinstance(out, dict):
            out[data.draw(STRANGE.map(str))] = item
    return out




@check(600)
@given(st.data(), st.randoms(use_true_random=False))
def test_a_damaged_file_is_an_input_error_or_is_read(found, place, data, random):
    """Events of all formats, interventions, configurations, headers of weights and adapters, indexes, tokenizers, templates and
    records of runs: with an item replaced, removed or renamed, or with bytes damaged, reading ends, or raises InputError."""
    target = found[data.draw(st.sampled_from(sorted(found)))]
    whole = target.whole
    if data.draw(st.booleans()):
        content = fuzz.damaged(whole, random)
    elif target.file.endswith(".safetensors"):
        (size,) = struct.unpack("<Q", whole[:8])
        header = json.dumps(altered(json.loads(whole[8 : 8 + size]), data)).encode()
        content = struct.pack("<Q", len(header)) + header + whole[8 + size :]
    elif target.file.endswith((".json", ".jsonl")):
        lines = [json.dumps(altered(json.loads(line), data)) for line in whole.decode().splitlines()[: 1 if target.file[-1] == "l" else 0]]
        content = ("\n".join(lines) or json.dumps(altered(json.loads(whole), data))).encode()
    else:
        content = fuzz.damaged(whole, random)
    fuzz.attempt(target, content, place)
