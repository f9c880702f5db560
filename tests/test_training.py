"""The state of an interrupted training: what is read is what was written, or nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mfllm_ref.errors import InputError
from mfllm_ref.training import load_state, save_state

FACTS = {"job": "policy", "step": 7, "best": 0.25, "chains": [[1, 2, "stance: support 50%"]]}
GROUPS = {
    "adapter": {"0": torch.arange(6.0).view(2, 3), "1": torch.ones(2, dtype=torch.bfloat16)},
    "optimizer": {"0.0.step": torch.tensor(7.0), "0.0.exp_avg": torch.zeros(0, 3)},
}


def test_what_is_read_is_what_was_written(tmp_path):
    save_state(tmp_path / "state.safetensors", FACTS, **GROUPS)
    facts, groups = load_state(tmp_path / "state.safetensors", torch.device("cpu"))
    assert facts == FACTS and groups.keys() == GROUPS.keys()
    for group, tensors in GROUPS.items():
        for name, tensor in tensors.items():
            assert torch.equal(groups[group][name], tensor) and groups[group][name].dtype == tensor.dtype
    assert load_state(tmp_path / "none", torch.device("cpu")) is None


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    save_state(path, FACTS, **GROUPS)
    return path, path.read_bytes()


@settings(derandomize=True, deadline=None, max_examples=200)
@given(data=st.data())
def test_no_bit_can_change_unseen(data, state):
    """One flipped bit anywhere, in a number, a name or a fact, and the file is refused in one line; a training that went on from it
    would end with another adapter."""
    path, whole = state
    at, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
    try:
        facts, groups = load_state(path, torch.device("cpu"))
    except InputError as error:
        assert str(error).startswith(f"{path}: damaged, cannot resume") and "\n" not in str(error)
    else:  # white space between the parts of the header says nothing
        assert facts == FACTS and all(torch.equal(groups[g][n], t) for g, some in GROUPS.items() for n, t in some.items())
