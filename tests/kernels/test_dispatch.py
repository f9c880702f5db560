"""The dispatchers run Triton's kernels where they say: here in a process of its own, under Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.dispatch import runs_triton

ROOT = Path(__file__).parents[2]
PROGRAM = """
import torch
from torch.testing import assert_close
from triton.runtime.interpreter import InterpretedFunction
from kernels import agent_attention, ib_loss
from kernels.agent_attention import agent_attention_reference
from kernels.ib_loss import ib_loss_reference
import kernels.agent_attention_backward as backward
import kernels.agent_attention_triton as attention
import kernels.ib_loss_triton as loss

launched = []


class Spy:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        launched.append(self.kernel.__name__)
        return self.kernel[grid]


for module, names in ((loss, ("_terms", "_slope", "_gather")), (attention, ("_prefix", "_suffix")), (backward, ("_key", "_query"))):
    for name in names:
        kernel = getattr(module, name + "_kernel")
        assert isinstance(kernel, InterpretedFunction)
        setattr(module, name + "_kernel", Spy(kernel))

hidden, prior, weight = torch.randn(5, 16, requires_grad=True), torch.randn(5, 16), torch.randn(30, 16)
case = hidden, prior, weight, torch.arange(5)
gradients = []
for function in (ib_loss, ib_loss_reference):
    terms = function(*case)
    gradients.append(torch.autograd.grad((terms.log_prob - terms.kl).sum(), hidden)[0])
assert_close(*gradients, rtol=1e-4, atol=1e-4)
assert launched == ["_terms_kernel", "_slope_kernel", "_gather_kernel"], launched
launched.clear()
ib_loss(*(x.double() for x in case[:3]), case[3])
assert not launched, "float64 is PyTorch's"

q, k, length, world = torch.randn(3, 2, 1, 16), torch.randn(3, 1, 4, 16), torch.full((3,), 4), torch.arange(3)
case = q, k, k.flip(0), length, k.flip(1), k.flip(2), length, world
assert_close(agent_attention(*case), agent_attention_reference(*case), rtol=1e-4, atol=1e-4)
assert launched == ["_prefix_kernel", "_suffix_kernel"], launched
launched.clear()
agent_attention(q.requires_grad_(), *case[1:]).sum().backward()
assert launched == ["_prefix_kernel", "_suffix_kernel"] + 2 * ["_key_kernel", "_query_kernel"], launched
"""


def test_under_the_interpreter_the_dispatchers_launch_triton_kernels():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("value", ["1", "true", "YES", "On", "y", "0", "no", "2", "", " 1", None])
def test_the_dispatchers_and_triton_agree_on_who_interprets(monkeypatch, value):
    """Otherwise kernels made for the interpreter would wait for a GPU, or compiled ones be given a CPU's tensors."""
    knobs = pytest.importorskip("triton.knobs")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value is not None:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert runs_triton(torch.zeros(1)) == knobs.runtime.interpret


def test_kernels_compile_for_hopper_without_a_gpu(hopper):
    """What the interpreter cannot see: types that the compiler refuses, and tiles too large for shared memory."""
    said, errors = hopper.communicate()
    assert hopper.returncode == 0 and len(said.splitlines()) == 11, errors
