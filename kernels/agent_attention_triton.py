"""agent_attention's forward pass in Triton: two launches for any number of worlds, one over prefixes, one over suffixes.

Prefix: a program takes a block of query rows of one world and key head, whatever agents they belong to, and walks along
the world's prefix: matrix products of [BLOCK_M, head_dim] with [head_dim, BLOCK_N] on tensor cores, where every key is
read once a block and, thanks to the second-level cache, about once a world from memory. It leaves, per row, the average
of the values and the log-sum-exp of the scores.

Suffix: a program takes the rows of one agent and key head and starts its online softmax from what the prefix left, as if
it had walked there itself: the state (maximum, sum, average) = (log-sum-exp, 1, average) is the join of the two parts.

Cost: 4 h d t P FLOPs an agent on the prefixes; bytes of q and out, of all suffixes, and 8 h d t an agent for the state
between the launches, float32, written and read.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.agent_attention_plan import Plan
from kernels.dispatch import processors, shared_memory

LOG2E = 1.4426950408889634  # scores are kept in units of log 2: 2^x is one instruction
LOW = tl.constexpr(-1e30)  # below any score, yet finite: a difference of two infinities is not a number


@triton.jit
def _walk(
    q, k, v, owner, head, start, end, low, high, scale, top, total, average,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax along the keys [start, end) of k[owner, head], seen by a row where low <= key < high; without MASKED by
    all rows. Scores and their maximum `top` are of unscaled products: scaled, they are in units of log 2."""
    for n in range(start, end, BLOCK_N):
        keys = k.load([owner, head, n, 0]).reshape(BLOCK_N, BLOCK_D).to(q.dtype)
        values = v.load([owner, head, n, 0]).reshape(BLOCK_N, BLOCK_D).to(q.dtype)
        scores = tl.dot(q, keys.T, input_precision="ieee")
        if MASKED:
            key = n + tl.arange(0, BLOCK_N)
            values = tl.where((key < end)[:, None], values, 0.0)  # unused slots may hold NaN
            seen = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, axis=1))
        decay = tl.exp2((top - new) * scale)
        e = tl.exp2(scores * scale - (new * scale)[:, None])
        total = total * decay + tl.sum(e, axis=1)
        average = tl.dot(e.to(q.dtype), values, average * decay[:, None], input_precision="ieee")
        top = new
    return top, total, average


@triton.jit
def rows_of(table, own, heads, head, r, total, q_len, rows):
    """Of query rows r, counted from an agent on through those after it: (whether they exist and are no padding, their
    suffix positions, their places in [agents, kv_heads, rows])."""
    agent = tl.load(table + 1) + r // rows
    inside = r < total
    row = tl.load(own + agent, mask=inside, other=0) - q_len + r % q_len
    return inside & (row >= 0), row, (agent.to(tl.int64) * heads + head) * rows + r % rows


@triton.jit
def _prefix_kernel(
    q, k, v, lengths, own, blocks, state, state_lse, scale, window, q_len, rows,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """state [agents, kv_heads, rows, head_dim] and state_lse [agents, kv_heads, rows], both float32: the average of the
    prefix's values, and the log-sum-exp of its scores (base 2). rows = group * q_len query rows an agent and key head."""
    blocks += tl.program_id(0) * 4
    head, heads = tl.program_id(1), tl.num_programs(1)
    world, total, r = tl.load(blocks), tl.load(blocks + 2), tl.load(blocks + 3) + tl.arange(0, BLOCK_M)
    real, row, place = rows_of(blocks, own, heads, head, r, total, q_len, rows)
    length = tl.load(lengths + world)
    d = tl.arange(0, BLOCK_D)
    inside = real[:, None] & (d[None, :] < HEAD_DIM)
    query = tl.load(q + place[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0)
    top = tl.full((BLOCK_M,), LOW, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    average = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    low, high = tl.zeros((BLOCK_M,), tl.int32), tl.zeros((BLOCK_M,), tl.int32) + length
    start = 0
    whole = length // BLOCK_N * BLOCK_N
    if WINDOWED:
        low = tl.where(real, length + row - window + 1, length)
        start = tl.maximum(tl.min(low, axis=0), 0) // BLOCK_N * BLOCK_N
        whole = start
    else:
        top, total, average = _walk(
            query, k, v, world, head, 0, whole, low, high, scale, top, total, average, BLOCK_N, BLOCK_D, False
        )  # fmt: skip
    top, total, average = _walk(
        query, k, v, world, head, whole, length, low, high, scale, top, total, average, BLOCK_N, BLOCK_D, True
    )  # fmt: skip
    some = total > 0
    total = tl.where(some, total, 1.0)
    tl.store(state + place[:, None] * HEAD_DIM + d[None, :], average / total[:, None], mask=inside)
    tl.store(state_lse + place, tl.where(some, top * scale + tl.log2(total), LOW), mask=real)


@triton.jit
def _suffix_kernel(
    q, k, v, lengths, world_of, own, state, state_lse, out, scale, window, q_len, rows,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOWED: tl.constexpr, HAS_PREFIX: tl.constexpr,
):  # fmt: skip
    """out [agents, kv_heads, rows, head_dim]: attention over the suffix, going on from the state of the prefix."""
    head, heads = tl.program_id(1), tl.num_programs(1)
    agent = tl.program_id(0)
    r = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.load(own + agent) - q_len + r % q_len
    real = (r < rows) & (row >= 0)
    place = (agent.to(tl.int64) * heads + head) * rows + r
    d = tl.arange(0, BLOCK_D)
    inside = real[:, None] & (d[None, :] < HEAD_DIM)
    query = tl.load(q + place[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0)
    top = tl.full((BLOCK_M,), LOW, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    average = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if HAS_PREFIX:
        if tl.load(lengths + tl.load(world_of + agent)) > 0:
            lse = tl.load(state_lse + place, mask=real, other=LOW)
            top = tl.where(lse > LOW, lse / scale, LOW)
            total = tl.where(lse > LOW, 1.0, 0.0)
            average = tl.load(state + place[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0)
    start = 0
    low = tl.zeros((BLOCK_M,), tl.int32)
    if WINDOWED:
        low = tl.where(real, row - window + 1, tl.maximum(tl.max(row, axis=0), 0))
        start = tl.maximum(tl.min(low, axis=0), 0) // BLOCK_N * BLOCK_N
    top, total, average = _walk(
        query, k, v, agent, head, start, tl.max(tl.where(real, row + 1, 0), axis=0), low, tl.where(real, row + 1, 0),
        scale, top, total, average, BLOCK_N, BLOCK_D, True,
    )  # fmt: skip
    average = tl.where(real[:, None], average / tl.where(real, total, 1.0)[:, None], 0.0)  # padding rows return 0
    tl.store(state_lse + place, top * scale + tl.log2(tl.where(real, total, 1.0)), mask=real)  # now of both sides
    stored = (r < rows)[:, None] & (d[None, :] < HEAD_DIM)
    tl.store(out + place[:, None] * HEAD_DIM + d[None, :], average.to(out.dtype.element_ty), mask=stored)


def tiles_of(x: Tensor, block_n: int, block_d: int) -> TensorDescriptor | None:
    """How a kernel reads [block_n, block_d] tiles of x [owners, kv_heads, slots, head_dim]; None where x has no slots. Rows
    must begin at multiples of 16 bytes: where they do not, of a copy."""
    size = 16 // x.element_size()
    if x.stride(3) != 1 or x.data_ptr() % 16 or any(stride % size or not stride for stride in x.stride()[:3]):
        x = F.pad(x, (0, -x.shape[3] % size)).clone(memory_format=torch.contiguous_format)
    return TensorDescriptor.from_tensor(x, [1, 1, block_n, block_d]) if x.numel() else None


def fused_attention(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, suffix_k: Tensor, suffix_v: Tensor, plan: Plan
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(`agent_attention` of at least one query row and suffix slot, by its plan, without a gradient; log-sum-exps of its scores,
    in units of log 2, float32 [agents, kv_heads, rows])."""
    dtype = q.dtype
    if not q.is_cuda and dtype == torch.bfloat16:  # the interpreter cannot multiply it
        q = q.float()
    q = q.contiguous()
    agents, heads, q_len, head_dim = q.shape
    kv_heads = suffix_k.shape[1]
    rows = heads // kv_heads * q_len
    lengths, own, world = plan.lengths
    half = q.element_size() == 2
    scale, window, wide = head_dim**-0.5 * LOG2E, plan.window or 0, max(16, triton.next_power_of_2(head_dim))
    fixed = {"HEAD_DIM": head_dim, "BLOCK_D": wide, "WINDOWED": plan.window is not None}
    state = q.new_empty(agents, kv_heads, rows, head_dim, dtype=torch.float32)
    state_lse = q.new_empty(agents, kv_heads, rows, dtype=torch.float32)
    size = _block(plan, rows, kv_heads, half, q.device)
    blocks = plan.row_blocks(True, rows, size)
    if len(blocks):
        width, stages = _tile(size, wide, half, q.device)
        k, v = (tiles_of(x, width, wide) for x in (prefix_k, prefix_v))
        _prefix_kernel[len(blocks), kv_heads](
            q, k, v, lengths, own, blocks, state, state_lse, scale, window, q_len, rows, BLOCK_M=size, BLOCK_N=width,
            num_warps=8 if size == 128 else 4, num_stages=stages, **fixed,
        )  # fmt: skip
    out = torch.empty_like(q, dtype=dtype)
    size = min(64 if half else 32, max(16, triton.next_power_of_2(rows)))
    # An agent's few rows in decode wait for memory alone: narrow tiles keep many programs on a multiprocessor.
    width = 16 if size == 16 else 64 if half else 32
    k, v = (tiles_of(x, width, wide) for x in (suffix_k, suffix_v))
    _suffix_kernel[agents, kv_heads, triton.cdiv(rows, size)](
        q, k, v, lengths, world, own, state, state_lse, out, scale, window, q_len, rows, BLOCK_M=size, BLOCK_N=width,
        HAS_PREFIX=len(blocks) > 0, num_warps=1 if size == 16 else 4, num_stages=3 if size == 16 else 2, **fixed,
    )  # fmt: skip
    return out, state_lse


def _block(plan: Plan, rows: int, kv_heads: int, half: bool, device: torch.device) -> int:
    """Query rows of a prefix program. A block of 128 keeps tensor cores busy; float32, without them, has registers for 32. Few
    rows in all: smaller blocks, so that every multiprocessor gets one."""
    size = min(128 if half else 32, max(16, triton.next_power_of_2(int(plan.counts.max()) * rows)))
    while size > 32 and len(plan.row_blocks(True, rows, size)) * kv_heads < processors(device):
        size //= 2
    return size


def _tile(size: int, wide: int, half: bool, device: torch.device) -> tuple[int, int]:
    """(keys of a prefix program's tile, stages of its loads) that shared memory holds beside the block's queries."""
    if not half:
        return 32, 2
    choices = ((128, 3), (64, 3), (64, 2)) if size == 128 else ((64, 3), (64, 2))
    held = ((width, stages) for width, stages in choices if 2 * wide * (size + 2 * width * stages) < shared_memory(device))
    return next(held, (32, 2))
