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


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import kernels.agent_attention_backward as backward
import kernels.agent_attention_triton as attention
import kernels.ib_loss_triton as loss

def tiles(dtype, *shape):
    return f"tensordesc<{dtype}[{', '.join(map(str, shape))}]>"


def losses(dtype, size):
    rows, sizes = tiles(dtype, size.tokens, size.dims), {"BLOCK_T": size.tokens, "BLOCK_V": size.words, "BLOCK_D": size.dims}
    logits = {"hidden": rows, "prior": rows, "weight": tiles(dtype, size.words, size.dims)}
    gather = {"slope": rows, "weight": tiles(dtype, size.dims, size.words)}
    swapped = {"BLOCK_T": size.tokens, "BLOCK_V": size.dims, "BLOCK_D": size.words}
    cases = (loss._terms_kernel, logits, sizes), (loss._slope_kernel, logits, sizes), (loss._gather_kernel, gather, swapped)
    return [(dtype, *case, size.num_warps, 4) for case in cases]


def attends(dtype, kernel, rows, keys, warps, stages, head_dim=128, windowed=False, **constants):
    shape = {"HEAD_DIM": head_dim, "BLOCK_D": 128, "BLOCK_M": rows, "BLOCK_N": keys, "WINDOWED": windowed, **constants}
    inputs = {"k": tiles(dtype, 1, 1, keys, 128), "v": tiles(dtype, 1, 1, keys, 128), "out": "*" + dtype}
    return dtype, kernel, inputs, shape, warps, stages


prefix, suffix, of_keys, of_rows = (
    attention._prefix_kernel, attention._suffix_kernel, backward._key_kernel, backward._query_kernel)
odd = {"head_dim": 80, "windowed": True}
pointers = {"targets": "*i64", "out": "*fp32", "stats": "*fp32", "gradient": "*fp32", "state": "*fp32", "own": "*i32",
            "state_lse": "*fp32", "lengths": "*i32", "blocks": "*i32", "world_of": "*i32", "scale": "fp32"}
pointers |= {"lse": "*fp32", "delta": "*fp32", "tiles": "*i32", "factor": "fp32"}
for dtype, kernel, inputs, constants, warps, stages in {
    "loss": losses("bf16", loss.HALF),
    "attention": [attends("bf16", prefix, 128, 128, 8, 3), attends("bf16", suffix, 16, 16, 1, 3, HAS_PREFIX=True),
                  attends("fp16", suffix, 64, 64, 4, 2, HAS_PREFIX=False, **odd), attends("fp32", prefix, 32, 32, 4, 2, **odd)],
    "backward": [attends("bf16", of_keys, *backward.KEYS, PREFIX=True), attends("bf16", of_rows, *backward.ROWS, PREFIX=False),
                 attends("fp16", of_keys, *backward.KEYS, PREFIX=False, **odd),
                 attends("fp32", of_rows, *backward.FULL, PREFIX=True, **odd)],
}[sys.argv[1]]:
    known = pointers | dict.fromkeys(("slope", "q", "up", "dk", "dv", "dq"), "*" + dtype) | inputs
    types = {name: "constexpr" if name in constants else known.get(name, "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if types[name][0] == "*"}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=places, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.metadata.shared <= 227 * 1024, "more shared memory than an H100 has"
    print(kernel.__name__, made.metadata.shared)
"""


def test_kernels_compile_for_hopper_without_a_gpu(tmp_path):
    """What the interpreter cannot see: types that the compiler refuses, and tiles too large for shared memory."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    run = [sys.executable, "-c", COMPILE]
    both = [
        subprocess.Popen([*run, name], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name in ("loss", "attention", "backward")
    ]
    for job, kernels in zip(both, (3, 4, 4), strict=True):
        said, errors = job.communicate()
        assert job.returncode == 0 and len(said.splitlines()) == kernels, errors
