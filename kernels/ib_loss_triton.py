"""ib_loss in Triton: terms and gradient to the hidden states from tiles of logits that never leave the chip.

Forward, one kernel: a program has a block of tokens and a share of the vocabulary. For each of its tiles of words it
multiplies hidden and prior_hidden with the same tile of the head, read once for both, and folds the two tiles of logits
into running maxima and sums. A share's results (two log-sum-exps, its own KL) are joined exactly afterwards.

Backward, two kernels a piece of the vocabulary, as many words as BUFFER holds for all tokens: the logits are made
again and become d loss / d z, z = W hidden, in hidden's dtype; that times the head is added to the gradient, kept in
float32. d loss / d z = mu_v (up_kl (log mu_v - log r_v - kl) - up_log_prob) + up_log_prob [v = target].

Tiles are read through tensor descriptors, which Hopper's copy engine (TMA) serves: no thread spends registers on addresses
or masks, and what lies outside of a tensor reads as 0.

Cost: five matrix products of 2 n v d FLOPs (two forward, three backward), where materialised logits take three. Bytes:
the head is read twice, and (n / BLOCK_T) times from the second-level cache; the buffer is written and read once, and the
gradient, in float32, once a piece.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.dispatch import processors, shared_memory

BUFFER = 3 * 2**24  # bytes of d loss / d z held at once
WAVES = 8  # programs of the forward kernel for every multiprocessor: more even out their ends, fewer join less


class Tiles(NamedTuple):
    """Tokens, words and dimensions of a tile, and warps of a program."""

    tokens: int
    words: int
    dims: int
    num_warps: int


# Two float32 accumulators of [128, 128] over 8 warps take half of the registers. float32 has no tensor cores at full
# precision, so its tiles are smaller.
HALF, FULL = Tiles(128, 128, 64, 8), Tiles(64, 64, 32, 4)


@triton.jit
def _logits(
    hidden, prior, weight, token, word, dim,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Two tiles of logits, [BLOCK_T, BLOCK_V] in float32: hidden and prior from row `token` on, the head from row `word` on."""
    z = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    y = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for start in range(0, dim, BLOCK_D):
        h = hidden.load([token, start])
        p = prior.load([token, start])
        w = weight.load([word, start]).to(h.dtype).T
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
    token, split = tl.program_id(0) * BLOCK_T, tl.program_id(1)
    at = token + tl.arange(0, BLOCK_T)
    inside = at < tokens
    target = tl.load(targets + at, mask=inside, other=-1)
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
        z, y = _logits(hidden, prior, weight, token, tile * BLOCK_V, dim, BLOCK_T, BLOCK_V, BLOCK_D)
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
    step = tl.num_programs(1) * tokens
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
    hidden, prior, weight, targets, stats, slope, slope_row, tokens, dim, first, size,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """slope [tokens, size]: d loss / d z of the words first .. first + size - 1. stats float32 [7, tokens]: maxima of z
    and y, log-sum-exps above them, KL, upstream gradients of log_prob and kl."""
    token, start = tl.program_id(0) * BLOCK_T, tl.program_id(1) * BLOCK_V
    at, column = token + tl.arange(0, BLOCK_T), start + tl.arange(0, BLOCK_V)
    z, y = _logits(hidden, prior, weight, token, first + start, dim, BLOCK_T, BLOCK_V, BLOCK_D)
    row = tl.minimum(at, tokens - 1)  # rows past the end take the last one's numbers and are not stored
    stats += row
    z_max, y_max = tl.load(stats), tl.load(stats + tokens)
    z_log_sum, y_log_sum = tl.load(stats + 2 * tokens), tl.load(stats + 3 * tokens)
    kl, up_log_prob = tl.load(stats + 4 * tokens), tl.load(stats + 5 * tokens)
    up_kl = tl.load(stats + 6 * tokens)
    log_mu = z - z_max[:, None] - z_log_sum[:, None]
    ratio = log_mu - (y - y_max[:, None] - y_log_sum[:, None]) - kl[:, None]
    target = tl.load(targets + row)
    out = tl.exp(log_mu) * (up_kl[:, None] * ratio - up_log_prob[:, None])
    out += tl.where((first + column)[None, :] == target[:, None], up_log_prob[:, None], 0.0)
    place = slope + at.to(tl.int64)[:, None] * slope_row + column[None, :]
    tl.store(place, out.to(slope.dtype.element_ty), mask=(at < tokens)[:, None] & (column < size)[None, :])


@triton.jit
def _gather_kernel(
    slope, weight, gradient, tokens, dim, first, size,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """gradient [tokens, dim] += slope [tokens, size] times the head's rows first .. first + size - 1."""
    token, start = tl.program_id(0) * BLOCK_T, tl.program_id(1) * BLOCK_D
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for word in range(0, size, BLOCK_V):
        s = slope.load([token, word])
        total = tl.dot(s, weight.load([first + word, start]).to(s.dtype), total, input_precision="ieee")
    at, column = token + tl.arange(0, BLOCK_T), start + tl.arange(0, BLOCK_D)
    place = gradient + at.to(tl.int64)[:, None] * dim + column[None, :]
    stored = (at < tokens)[:, None] & (column < dim)[None, :]
    tl.store(place, tl.load(place, mask=stored, other=0.0) + total, mask=stored)


def _options(x: Tensor, tiles: Tiles, rows: int) -> dict[str, int]:
    """Warps, and as many stages of a loop's loads, `rows` rows of tiles.dims numbers each, as shared memory holds; four are
    enough."""
    stages = (shared_memory(x.device) - 1024) // (rows * tiles.dims * x.element_size())
    return {"num_warps": tiles.num_warps, "num_stages": max(1, min(4, stages))}


def _read(tiles: Tiles, hidden: Tensor, prior: Tensor, weight: Tensor) -> tuple[TensorDescriptor, ...]:
    rows = (tiles.tokens, tiles.tokens, tiles.words)
    return tuple(
        TensorDescriptor.from_tensor(x, [n, tiles.dims]) for x, n in zip((hidden, prior, weight), rows, strict=True)
    )


def _aligned(x: Tensor) -> Tensor:
    """x with rows that a descriptor can read, which begin at multiples of 16 bytes: where they do not, a copy padded with 0."""
    missing = -x.shape[1] % (16 // x.element_size())
    x = F.pad(x, (0, missing)) if missing else x.contiguous()
    neat = x.data_ptr() % 16 == 0 and x.stride() == (x.shape[1], 1)  # one row alone is contiguous whatever its stride says
    return x if neat else x.clone(memory_format=torch.contiguous_format)


class Fused(torch.autograd.Function):
    """The three terms of every token: the interface of the CPU path's function, which says what the arguments are."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, prior_hidden: Tensor, weight: Tensor, targets: Tensor, differentiable: bool
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        ctx.dtype, ctx.dim = hidden.dtype, hidden.shape[1]
        if not hidden.is_cuda and torch.bfloat16 in (hidden.dtype, weight.dtype):  # the interpreter cannot multiply it
            hidden, weight = hidden.float(), weight.float()
        hidden, prior, weight = (_aligned(x) for x in (hidden, prior_hidden.to(hidden.dtype), weight))
        (tokens, dim), vocab = hidden.shape, weight.shape[0]
        tiles = FULL if hidden.dtype == torch.float32 else HALF
        blocks, pieces = triton.cdiv(tokens, tiles.tokens), max(1, triton.cdiv(vocab, tiles.words))
        each = triton.cdiv(pieces, max(1, min(pieces, WAVES * processors(hidden.device) // max(1, blocks))))
        out = hidden.new_empty(7, triton.cdiv(pieces, each), tokens, dtype=torch.float32)
        targets = targets.contiguous()
        if tokens:
            _terms_kernel[blocks, out.shape[1]](
                *_read(tiles, hidden, prior, weight), targets, out, tokens, vocab, dim, each, *tiles[:3],
                **_options(hidden, tiles, 2 * tiles.tokens + tiles.words),
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
        log_prob, prior_log_prob = map(torch.clone, chosen - top - log_sums)  # no views: a caller may change them in place
        ctx.mark_non_differentiable(prior_log_prob)
        return log_prob, prior_log_prob, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, log_prob: Tensor, _: Tensor, kl: Tensor) -> tuple[Tensor | None, ...]:
        hidden, prior, weight, targets, stats = ctx.saved_tensors
        (tokens, dim), vocab = hidden.shape, weight.shape[0]
        if not tokens:
            return hidden.new_zeros(0, ctx.dim, dtype=ctx.dtype), None, None, None, None
        tiles = FULL if hidden.dtype == torch.float32 else HALF
        # Slopes are computed for upstream gradients of about 1, as float16 has no room for those of a mean over tokens.
        scale = (log_prob.abs() + kl.abs()).clamp_min(torch.finfo(torch.float32).tiny)
        stats = torch.cat((stats, (log_prob / scale)[None], (kl / scale)[None]))
        gradient = hidden.new_zeros(tokens, dim, dtype=torch.float32)
        most = max(1, BUFFER // (tokens * hidden.element_size() * tiles.words)) * tiles.words
        most = min(most, triton.cdiv(vocab, tiles.words) * tiles.words)
        slope = hidden.new_empty(tokens, most)
        blocks, inputs = triton.cdiv(tokens, tiles.tokens), _read(tiles, hidden, prior, weight)
        head = TensorDescriptor.from_tensor(weight, [tiles.dims, tiles.words])
        for first in range(0, vocab, most):
            size = min(most, vocab - first)
            _slope_kernel[blocks, triton.cdiv(size, tiles.words)](
                *inputs, targets, stats, slope, most, tokens, dim, first, size, *tiles[:3],
                **_options(hidden, tiles, 2 * tiles.tokens + tiles.words),
            )  # fmt: skip
            made = TensorDescriptor(slope, [tokens, size], [most, 1], [tiles.tokens, tiles.dims])
            _gather_kernel[blocks, triton.cdiv(dim, tiles.words)](
                made, head, gradient, tokens, dim, first, size, tiles.tokens, tiles.dims, tiles.words,
                **_options(hidden, tiles, tiles.tokens + tiles.words),
            )  # fmt: skip
        return gradient.mul_(scale[:, None])[:, : ctx.dim].to(ctx.dtype), None, None, None, None
