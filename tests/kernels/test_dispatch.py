"""The dispatchers run Triton's kernels where they say: here in a process of its own, under Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

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


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import kernels.agent_attention_backward as backward
import kernels.agent_attention_triton as attention
import kernels.ib_loss_triton as loss

def tiles(*shape):
    return f"tensordesc<bf16[{', '.join(map(str, shape))}]>"

rows, sizes = tiles(128, 64), {"BLOCK_T": 128, "BLOCK_V": 128, "BLOCK_D": 64}
logits = {"hidden": rows, "prior": rows, "weight": rows}
gather = {"slope": rows, "weight": tiles(64, 128)}, {"BLOCK_T": 128, "BLOCK_V": 64, "BLOCK_D": 128}
pointers = {"targets": "*i64", "out": "*fp32", "stats": "*fp32", "gradient": "*fp32", "state": "*fp32", "own": "*i32",
            "state_lse": "*fp32", "lengths": "*i32", "blocks": "*i32", "world_of": "*i32", "scale": "fp32"}
pointers |= {"lse": "*fp32", "delta": "*fp32", "tiles": "*i32", "factor": "fp32"}
pointers |= dict.fromkeys(("slope", "q", "up", "dk", "dv", "dq"), "*bf16")
shape = {"HEAD_DIM": 128, "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_D": 128, "WINDOWED": False}
keys, few = {x: tiles(1, 1, 128, 128) for x in "kv"}, {x: tiles(1, 1, 16, 128) for x in "kv"}
for kernel, inputs, constants in {
    "loss": ((loss._terms_kernel, logits, sizes), (loss._slope_kernel, logits, sizes), (loss._gather_kernel, *gather)),
    "attention": ((attention._prefix_kernel, keys, shape),
                  (attention._suffix_kernel, few, {**shape, "BLOCK_M": 16, "BLOCK_N": 16, "HAS_PREFIX": True})),
    "backward": tuple(
        (kernel, {x: tiles(1, 1, size.keys, 128) for x in "kv"},
         {**shape, "BLOCK_M": size.rows, "BLOCK_N": size.keys, "PREFIX": prefix})
        for kernel, size, prefix in ((backward._key_kernel, backward.KEYS, True), (backward._query_kernel, backward.ROWS, False))
    ),
}[sys.argv[1]]:
    known = pointers | inputs
    types = {name: "constexpr" if name in constants else known.get(name, "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if types[name][0] == "*"}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=places, attrs=aligned)
    options = {"num_warps": 1 if constants.get("BLOCK_M") == 16 else 8, "num_stages": 3 if "BLOCK_M" in constants else 4}
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
    for job, kernels in zip(both, (3, 2, 2), strict=True):
        said, errors = job.communicate()
        assert job.returncode == 0 and len(said.splitlines()) == kernels, errors
