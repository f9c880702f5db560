"""agent_attention's backward pass in Triton: from the log-sum-exps of the forward pass, probabilities are made again.

    p = exp(s - lse),   dv_j = sum_i p_ij dout_i,   ds_ij = p_ij (dout_i . v_j - delta_i),   delta_i = dout_i . out_i
    dk_j = scale sum_i ds_ij q_i,   dq_i = scale sum_j ds_ij k_j

lse and delta are of the whole softmax, over prefix and suffix together. Given them, a key's gradient depends on no other
key: the two sides need not know of each other, and one kernel serves both. A program has a tile of keys and goes through all
query rows that see it: those of all the world's agents for a prefix, the agent's own for its suffix. A second kernel has a
block of query rows and goes through the keys: first the prefix's, then, on top of that, the suffix's.

Cost: seven products of scores' size, 2 h d t (P + S) FLOPs each an agent and layer, where the forward pass has two and the least
is five: both kernels make scores and dout . v for themselves. Nothing of scores' size is in memory.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.agent_attention_plan import Plan
from kernels.agent_attention_triton import LOG2E, fused_attention, rows_of, tiles_of
from kernels.dispatch import processors


class Tiles(NamedTuple):
    """Query rows and keys of a tile of scores; warps of a program, stages of its loads."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        return {"BLOCK_M": self.rows, "BLOCK_N": self.keys, "num_warps": self.num_warps, "num_stages": self.num_stages}


# Of the programs that hold keys, and of those that hold rows; in float32, without tensor cores, of both.
KEYS, ROWS, FULL = Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(32, 32, 4, 2)


@triton.jit
def _load(x, place, d, real, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of x [..., head_dim], 0 where not real."""
    mask = real[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (d < HEAD_DIM)[None, :]
    return tl.load(x + place[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)


@triton.jit
def _keys(x, owner, head, n, end, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Keys or values [BLOCK_N, BLOCK_D] from slot n on, 0 from slot `end` on, where slots may hold NaN."""
    slots = n + tl.arange(0, BLOCK_N)
    return tl.where((slots < end)[:, None], x.load([owner, head, n, 0]).reshape(BLOCK_N, BLOCK_D), 0.0)


@triton.jit
def _slopes(query, up, lse, delta, keys, values, key, end, position, real, scale, window, WINDOWED: tl.constexpr):
    """(p, ds) of a tile, float32 [rows, keys], 0 where a row does not see a key. Nor does it see one behind the end of a prefix,
    whose score of 0 can be so far above the others, e^88 and more of their sum, that 0 times its probability is NaN."""
    seen = real[:, None] & (key <= tl.minimum(position, end - 1)[:, None])
    if WINDOWED:
        seen = seen & (key > position[:, None] - window)
    scores = tl.dot(query, keys.to(query.dtype).T, input_precision="ieee")
    p = tl.where(seen, tl.exp2(scores * scale - lse[:, None]), 0.0)
    ds = p * (tl.dot(up, values.to(up.dtype).T, input_precision="ieee") - delta[:, None])
    return p, ds


@triton.jit
def _key_kernel(
    q, k, v, up, lse, delta, tiles, lengths, own, dk, dv, scale, factor, window, q_len, rows, slots, owners,
    PREFIX: tl.constexpr, WINDOWED: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv [shares, owners, kv_heads, slots, head_dim]: a share of the rows' part in a tile of keys' gradients. tiles int32
    [tiles, 4]: owner (a world or an agent), its first agent, its query rows, first key of the tile."""
    tiles += tl.program_id(0) * 4
    head, heads = tl.program_id(1), tl.num_programs(1)
    owner, total, n = tl.load(tiles), tl.load(tiles + 2), tl.load(tiles + 3)
    end = tl.load((lengths if PREFIX else own) + owner)
    key, d = n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    keys = _keys(k, owner, head, n, end, BLOCK_N, BLOCK_D)
    values = _keys(v, owner, head, n, end, BLOCK_N, BLOCK_D)
    k_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    v_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(tl.program_id(2) * BLOCK_M, total, tl.num_programs(2) * BLOCK_M):
        real, row, place = rows_of(tiles, own, heads, head, start + tl.arange(0, BLOCK_M), total, q_len, rows)
        query = _load(q, place, d, real, HEAD_DIM, BLOCK_D)
        above = _load(up, place, d, real, HEAD_DIM, BLOCK_D)
        p, ds = _slopes(
            query, above, tl.load(lse + place, mask=real, other=0.0), tl.load(delta + place, mask=real, other=0.0), keys,
            values, key[None, :], end, row + end if PREFIX else row, real, scale, window, WINDOWED,
        )  # fmt: skip
        v_sum = tl.dot(p.to(above.dtype).T, above, v_sum, input_precision="ieee")
        k_sum = tl.dot(ds.to(query.dtype).T, query, k_sum, input_precision="ieee")
    owner += tl.program_id(2) * owners
    place = ((owner.to(tl.int64) * heads + head) * slots + key)[:, None] * HEAD_DIM + d[None, :]
    stored = (key < end)[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(dk + place, (k_sum * factor).to(dk.dtype.element_ty), mask=stored)
    tl.store(dv + place, v_sum.to(dv.dtype.element_ty), mask=stored)


@triton.jit
def _query_kernel(
    q, k, v, up, lse, delta, blocks, lengths, own, state, dq, scale, factor, window, q_len, rows,
    PREFIX: tl.constexpr, WINDOWED: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of a prefix: what its keys add to the rows' gradient, into state, float32. Of a suffix: the same on top of state, into
    dq. blocks int32 [blocks, 4]: owner, its first agent, its query rows, first row of the block."""
    blocks += tl.program_id(0) * 4
    head, heads = tl.program_id(1), tl.num_programs(1)
    owner, total = tl.load(blocks), tl.load(blocks + 2)
    end, r = tl.load((lengths if PREFIX else own) + owner), tl.load(blocks + 3) + tl.arange(0, BLOCK_M)
    real, row, place = rows_of(blocks, own, heads, head, r, total, q_len, rows)
    d = tl.arange(0, BLOCK_D)
    query = _load(q, place, d, real, HEAD_DIM, BLOCK_D)
    above = _load(up, place, d, real, HEAD_DIM, BLOCK_D)
    row_lse, row_delta = tl.load(lse + place, mask=real, other=0.0), tl.load(delta + place, mask=real, other=0.0)
    if PREFIX:
        sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    else:
        sums = _load(state, place, d, real, HEAD_DIM, BLOCK_D)
    for n in range(0, end, BLOCK_N):
        keys, values = _keys(k, owner, head, n, end, BLOCK_N, BLOCK_D), _keys(v, owner, head, n, end, BLOCK_N, BLOCK_D)
        _, ds = _slopes(
            query, above, row_lse, row_delta, keys, values, (n + tl.arange(0, BLOCK_N))[None, :], end,
            row + end if PREFIX else row, real, scale, window, WINDOWED,
        )  # fmt: skip
        sums = tl.dot(ds.to(query.dtype), keys.to(query.dtype), sums, input_precision="ieee")
    place, stored = place[:, None] * HEAD_DIM + d[None, :], (r < total)[:, None] & (d < HEAD_DIM)[None, :]
    if PREFIX:
        tl.store(state + place, sums, mask=stored)
    else:
        tl.store(dq + place, (tl.where(real[:, None], sums, 0.0) * factor).to(dq.dtype.element_ty), mask=stored)


class Fused(torch.autograd.Function):
    """`agent_attention` in Triton, differentiable once."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, prefix_k: Tensor, prefix_v: Tensor, suffix_k: Tensor, suffix_v: Tensor, plan: Plan
    ) -> Tensor:  # fmt: skip
        out, lse = fused_attention(q, prefix_k, prefix_v, suffix_k, suffix_v, plan)
        ctx.plan = plan
        ctx.save_for_backward(q, prefix_k, prefix_v, suffix_k, suffix_v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, up: Tensor) -> tuple[Tensor | None, ...]:
        q, prefix_k, prefix_v, suffix_k, suffix_v, out, lse = ctx.saved_tensors
        shape, dtype, plan = q.shape, q.dtype, ctx.plan
        if not q.is_cuda and dtype == torch.bfloat16:  # the interpreter cannot multiply it
            q = q.float()
        q, out, up = (x.to(q.dtype).contiguous().view(*lse.shape, shape[3]) for x in (q, out, up))
        delta, (_, kv_heads, rows, head_dim) = (up.float() * out.float()).sum(dim=-1), q.shape
        half, wide = q.element_size() == 2, max(16, triton.next_power_of_2(head_dim))
        by_keys, by_rows = (KEYS, ROWS) if half else (FULL, FULL)
        state, dq, made = torch.zeros_like(q, dtype=torch.float32), torch.zeros_like(q), []
        numbers = head_dim**-0.5 * LOG2E, head_dim**-0.5, plan.window or 0, plan.shape[2], rows
        fixed = {"HEAD_DIM": head_dim, "BLOCK_D": wide, "WINDOWED": plan.window is not None}
        for prefix, keys in ((True, (prefix_k, prefix_v)), (False, (suffix_k, suffix_v))):
            tiles, blocks = plan.key_tiles(prefix, rows, by_keys.keys), plan.row_blocks(prefix, rows, by_rows.rows)
            shares = 1
            if prefix:  # Few tiles of many rows: shares of them, added up afterwards, so that every multiprocessor has work.
                most = -(-int(plan.counts.max()) * rows // by_keys.rows)
                shares = max(1, min(most, 2 * processors(q.device) // max(1, len(tiles) * kv_heads)))
            sums = [x.new_zeros(shares, *x.shape, dtype=torch.float32 if shares > 1 else x.dtype) for x in keys]
            if len(tiles):
                lengths, rest = plan.lengths[:2], {"PREFIX": prefix, **fixed}
                _key_kernel[len(tiles), kv_heads, shares](
                    q, *(tiles_of(x, by_keys.keys, wide) for x in keys), up, lse, delta, tiles, *lengths, *sums, *numbers,
                    keys[0].shape[2], keys[0].shape[0], **by_keys.options(), **rest,
                )  # fmt: skip
                _query_kernel[len(blocks), kv_heads](
                    q, *(tiles_of(x, by_rows.keys, wide) for x in keys), up, lse, delta, blocks, *lengths, state, dq, *numbers,
                    **by_rows.options(), **rest,
                )  # fmt: skip
            made += [x.sum(dim=0).to(y.dtype) if shares > 1 else x[0] for x, y in zip(sums, keys, strict=True)]
        return dq.view(shape).to(dtype), *made, None
