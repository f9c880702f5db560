"""ib_loss in Triton: terms and gradient to the hidden states from tiles of logits that never leave the chip.

Forward, one kernel: a program has a block of tokens and a share of the vocabulary. For each of its tiles of words it
multiplies hidden and prior_hidden with the same tile of the head, read once for both, and folds the two tiles of logits
into running maxima and sums. A share's results (two log-sum-exps, its own KL) are joined exactly afterwards.

Backward, two kernels a piece of the vocabulary, as many words as BUFFER holds for all tokens: the logits are made
again and become d loss / d z, z = W hidden, in the head's dtype; that times the head is added to the gradient, kept in
float32. d loss / d z = mu_v (up_kl (log mu_v - log r_v - kl) - up_log_prob) + up_log_prob [v = target].

Cost: five matrix products of 2 n v d FLOPs (two forward, three backward), where materialised logits take three. Bytes:
the head is read twice, and (n / BLOCK_T) times from the second-level cache; the buffer is written and read once.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import processors

BUFFER = 2**26  # bytes of d loss / d z held at once
WAVES = 8  # programs of the forward kernel for every multiprocessor: more even out their ends, fewer join less


class Tiles(NamedTuple):
    """Tokens, words and dimensions of a tile; warps of a program, stages of the loads' pipeline."""

    tokens: int
    words: int
    dims: int
    num_warps: int
    num_stages: int


# Two float32 accumulators of [128, 128] over 8 warps take half of the registers, and three stages of three [128, 64] tiles
# 144 KiB of shared memory. float32 has no tensor cores at full precision, so its tiles are smaller.
HALF, FULL = Tiles(128, 128, 64, 8, 3), Tiles(64, 64, 32, 4, 2)


@triton.jit
def _logits(
    hidden, prior, weight, row, word, dim,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Two tiles of logits, [BLOCK_T, BLOCK_V] in float32, from rows `row` of hidden and prior and of the head `word`."""
    z = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    y = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    column = tl.arange(0, BLOCK_D)
    across = row[:, None] * dim + column[None, :]
    down = word[None, :] * dim + column[:, None]
    for start in range(0, dim, BLOCK_D):
        inside = column < dim - start
        h = tl.load(hidden + across + start, mask=inside[None, :], other=0.0)
        p = tl.load(prior + across + start, mask=inside[None, :], other=0.0)
        w = tl.load(weight + down + start, mask=inside[:, None], other=0.0).to(h.dtype)
        z = tl.dot(h, w, z, input_precision="ieee")
        y = tl.dot(p, w, y, input_precision="ieee")
    return z, y


@triton.jit
def _terms_kernel(
    hidden, prior, weight, targets, out, tokens, vocab, dim, tiles_each,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [7, splits, tokens]: over a share of tiles_each tiles of words, the maxima of z and y, the log-sum-exps above
    them, the KL between softmaxes over the share, and z and y of the target (0 if it is elsewhere)."""
    at, split = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.program_id(1)
    row = tl.minimum(at, tokens - 1)  # rows past the end compute the last one again, unmasked, and are not stored
    target = tl.load(targets + row)
    z_max = tl.full((BLOCK_T,), -1e30, tl.float32)  # finite: a difference of two infinities is not a number
    y_max = tl.full((BLOCK_T,), -1e30, tl.float32)
    z_sum = tl.zeros((BLOCK_T,), tl.float32)
    y_sum = tl.zeros((BLOCK_T,), tl.float32)
    excess = tl.zeros((BLOCK_T,), tl.float32)  # sum of e^(z-z_max) (z-z_max - (y-y_max))
    z_target = tl.zeros((BLOCK_T,), tl.float32)
    y_target = tl.zeros((BLOCK_T,), tl.float32)
    first = split * tiles_each
    for tile in range(first, tl.minimum(first + tiles_each, tl.cdiv(vocab, BLOCK_V))):
        word = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        z, y = _logits(
            hidden, prior, weight, row.to(tl.int64), tl.minimum(word, vocab - 1).to(tl.int64), dim,
            BLOCK_T, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        here = word[None, :] == target[:, None]
        z_target += tl.sum(tl.where(here, z, 0.0), axis=1)
        y_target += tl.sum(tl.where(here, y, 0.0), axis=1)
        real = (word < vocab)[None, :]
        z_new = tl.maximum(z_max, tl.max(tl.where(real, z, -1e30), axis=1))
        y_new = tl.maximum(y_max, tl.max(tl.where(real, y, -1e30), axis=1))
        z_decay = tl.exp(z_max - z_new)
        shift = (z_max - z_new) - (y_max - y_new)
        z, y = z - z_new[:, None], y - y_new[:, None]
        e = tl.where(real, tl.exp(z), 0.0)
        excess = (excess + shift * z_sum) * z_decay + tl.sum(e * (z - y), axis=1)
        z_sum = z_sum * z_decay + tl.sum(e, axis=1)
        y_sum = y_sum * tl.exp(y_max - y_new) + tl.sum(tl.where(real, tl.exp(y), 0.0), axis=1)
        z_max, y_max = z_new, y_new
    inside, step = at < tokens, tl.num_programs(1) * tokens
    place = out + split * tokens + at
    tl.store(place, z_max, mask=inside)
    tl.store(place + step, y_max, mask=inside)
    tl.store(place + 2 * step, tl.log(z_sum), mask=inside)
    tl.store(place + 3 * step, tl.log(y_sum), mask=inside)
    tl.store(place + 4 * step, excess / z_sum - tl.log(z_sum) + tl.log(y_sum), mask=inside)
    tl.store(place + 5 * step, z_target, mask=inside)
    tl.store(place + 6 * step, y_target, mask=inside)


@triton.jit
def _slope_kernel(
    hidden, prior, weight, targets, stats, slope, tokens, vocab, dim, first, size,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """slope [tokens, size]: d loss / d z of the words first .. first + size - 1. stats float32 [7, tokens]: maxima of z
    and y, log-sum-exps above them, KL, upstream gradients of log_prob and kl."""
    at = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = tl.minimum(at, tokens - 1)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    word = first + column
    z, y = _logits(
        hidden, prior, weight, row.to(tl.int64), tl.minimum(word, vocab - 1).to(tl.int64), dim,
        BLOCK_T, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    stats += row
    z_max, y_max = tl.load(stats), tl.load(stats + tokens)
    z_log_sum, y_log_sum = tl.load(stats + 2 * tokens), tl.load(stats + 3 * tokens)
    kl, up_log_prob = tl.load(stats + 4 * tokens), tl.load(stats + 5 * tokens)
    up_kl = tl.load(stats + 6 * tokens)
    log_mu = z - z_max[:, None] - z_log_sum[:, None]
    ratio = log_mu - (y - y_max[:, None] - y_log_sum[:, None]) - kl[:, None]
    target = tl.load(targets + row)
    out = tl.exp(log_mu) * (up_kl[:, None] * ratio - up_log_prob[:, None])
    out += tl.where(word[None, :] == target[:, None], up_log_prob[:, None], 0.0)
    place = slope + at.to(tl.int64)[:, None] * size + column[None, :]
    tl.store(place, out.to(slope.dtype.element_ty), mask=(at < tokens)[:, None] & (column < size)[None, :])


@triton.jit
def _gather_kernel(
    slope, weight, gradient, tokens, dim, first, size,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """gradient [tokens, dim] += slope [tokens, size] times the head's rows first .. first + size - 1."""
    at, column = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    word = tl.arange(0, BLOCK_V)
    row = tl.minimum(at, tokens - 1).to(tl.int64)
    left = slope + row[:, None] * size + word[None, :]
    right = weight + (first + word).to(tl.int64)[:, None] * dim + tl.minimum(column, dim - 1)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(0, size, BLOCK_V):
        inside = word < size - start
        s = tl.load(left + start, mask=inside[None, :], other=0.0)
        w = tl.load(right, mask=inside[:, None], other=0.0).to(s.dtype)
        total = tl.dot(s, w, total, input_precision="ieee")
        right += BLOCK_V * dim
    place = gradient + row[:, None] * dim + column[None, :]
    stored = (at < tokens)[:, None] & (column < dim)[None, :]
    tl.store(place, tl.load(place, mask=stored, other=0.0) + total, mask=stored)


class Fused(torch.autograd.Function):
    """The three terms of every token: the interface of the CPU path's function, which says what the arguments are."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, prior_hidden: Tensor, weight: Tensor, targets: Tensor, differentiable: bool
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        ctx.dtype = hidden.dtype
        if not hidden.is_cuda and torch.bfloat16 in (hidden.dtype, weight.dtype):  # the interpreter cannot multiply it
            hidden, weight = hidden.float(), weight.float()
        hidden, prior, weight = (x.contiguous() for x in (hidden, prior_hidden.to(hidden.dtype), weight))
        (tokens, dim), vocab = hidden.shape, weight.shape[0]
        tiles = FULL if hidden.dtype == torch.float32 else HALF
        blocks, pieces = triton.cdiv(tokens, tiles.tokens), triton.cdiv(vocab, tiles.words)
        each = triton.cdiv(pieces, max(1, min(pieces, WAVES * processors(hidden.device) // max(1, blocks))))
        out = hidden.new_empty(7, triton.cdiv(pieces, each), tokens, dtype=torch.float32)
        targets = targets.contiguous()
        if tokens:
            _terms_kernel[blocks, out.shape[1]](
                hidden, prior, weight, targets, out, tokens, vocab, dim, each, *tiles[:3],
                num_warps=tiles.num_warps, num_stages=tiles.num_stages,
            )  # fmt: skip
        # Join the shares. Maxima stay apart from log-sum-exps, so that a constant in the logits costs no precision. The KL
        # obeys the chain rule of relative entropy: each share's own, and that between the shares' probabilities.
        top, parts, kls, chosen = out[:2].amax(dim=1), out[2:4], out[4], out[5:].sum(dim=1)
        parts += out[:2] - top[:, None]
        log_sums = parts.logsumexp(dim=1)
        share, prior_share = parts - log_sums[:, None]
        kl = (share.exp() * (kls + share - prior_share)).sum(dim=0)
        if differentiable:
            ctx.save_for_backward(hidden, prior, weight, targets, torch.cat((top, log_sums, kl[None])))
        log_prob, prior_log_prob = chosen - top - log_sums
        ctx.mark_non_differentiable(prior_log_prob)
        return log_prob, prior_log_prob, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, log_prob: Tensor, _: Tensor, kl: Tensor) -> tuple[Tensor | None, ...]:
        hidden, prior, weight, targets, stats = ctx.saved_tensors
        (tokens, dim), vocab = hidden.shape, weight.shape[0]
        tiles = FULL if hidden.dtype == torch.float32 else HALF
        # Slopes are computed for upstream gradients of about 1, as float16 has no room for those of a mean over tokens.
        scale = (log_prob.abs() + kl.abs()).clamp_min(torch.finfo(torch.float32).tiny)
        stats = torch.cat((stats, (log_prob / scale)[None], (kl / scale)[None]))
        gradient = hidden.new_zeros(tokens, dim, dtype=torch.float32)
        most = max(1, BUFFER // (max(1, tokens) * hidden.element_size() * tiles.words)) * tiles.words
        slope = hidden.new_empty(tokens * min(most, vocab))
        options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
        blocks = triton.cdiv(tokens, tiles.tokens)
        for first in range(0, vocab if tokens else 0, most):
            size = min(most, vocab - first)
            _slope_kernel[blocks, triton.cdiv(size, tiles.words)](
                hidden, prior, weight, targets, stats, slope, tokens, vocab, dim, first, size, *tiles[:3], **options
            )
            _gather_kernel[blocks, triton.cdiv(dim, tiles.words)](
                slope, weight, gradient, tokens, dim, first, size, tiles.tokens, tiles.dims, tiles.words, **options
            )
        return gradient.mul_(scale[:, None]).to(ctx.dtype), None, None, None, None
