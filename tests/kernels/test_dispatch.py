"""The dispatchers run Triton's kernels where they say: here in a process of its own, under Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import torch
from torch.testing import assert_close
from triton.runtime.interpreter import InterpretedFunction
from kernels import ib_loss
from kernels.ib_loss import ib_loss_reference
import kernels.ib_loss_triton as fused

launched = []


class Spy:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        launched.append(self.kernel.__name__)
        return self.kernel[grid]


for name in ("_terms_kernel", "_slope_kernel", "_gather_kernel"):
    assert isinstance(getattr(fused, name), InterpretedFunction)
    setattr(fused, name, Spy(getattr(fused, name)))

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
"""


def test_under_the_interpreter_the_dispatchers_launch_triton_kernels():
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
