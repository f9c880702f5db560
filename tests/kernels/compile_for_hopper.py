"""Compiles the kernels for an H100, which needs none, and prints each with its shared memory in bytes: `test_dispatch.py` runs it
in a process of its own, beside the tests before it."""

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
CASES = [
    *losses("bf16", loss.HALF),
    attends("bf16", prefix, 128, 128, 8, 3), attends("bf16", suffix, 16, 16, 1, 3, HAS_PREFIX=True),
    attends("fp16", suffix, 64, 64, 4, 2, HAS_PREFIX=False, **odd), attends("fp32", prefix, 32, 32, 4, 2, **odd),
    attends("bf16", of_keys, *backward.KEYS, PREFIX=True), attends("bf16", of_rows, *backward.ROWS, PREFIX=False),
    attends("fp16", of_keys, *backward.KEYS, PREFIX=False, **odd), attends("fp32", of_rows, *backward.FULL, PREFIX=True, **odd),
]  # fmt: skip
for dtype, kernel, inputs, constants, warps, stages in CASES:
    known = pointers | dict.fromkeys(("slope", "q", "up", "dk", "dv", "dq"), "*" + dtype) | inputs
    types = {name: "constexpr" if name in constants else known.get(name, "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if types[name][0] == "*"}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=places, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.metadata.shared <= 227 * 1024, "more shared memory than an H100 has"
    print(kernel.__name__, made.metadata.shared)
