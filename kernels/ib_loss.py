"""The information bottleneck's terms of every token, without ever holding its logits over the whole vocabulary.

    z = W hidden,  y = W prior_hidden,  mu = softmax(z),  r = softmax(y)
    log_prob = log mu(target),  prior_log_prob = log r(target),  kl = KL(mu || r) = sum_v mu_v (log mu_v - log r_v)

    d log_prob / d hidden = W[target] - E_mu[W_v]
    d kl / d hidden       = E_mu[((z_v - y_v) - E_mu[z - y]) W_v]

The head W is frozen, so both gradients are averages over the vocabulary, just as the terms are. One pass can therefore
gather everything, as in online softmax: sums of e^(z-a), e^(y-b), e^(z-a) (z-a - (y-b)), and the first and the last of
them times W_v, where a and b are running maxima.

Cost, with n tokens, v words, dim d and e bytes a number: a matrix product of hidden states and head is 2 n v d FLOPs.
Materialised logits take three products (two forward, one backward) and 2 n v numbers of memory, written and read many
times. The CPU path takes four, all in the forward pass (z, y, and W under both weights), and 2 n d numbers until the
backward pass, which is then a sum of two scaled vectors a token. Where these would be much memory even beside logits, it
takes five: the backward pass makes the logits again, and needs n d numbers for its result and no others as large.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import runs_triton

IGNORED = -100  # a target that counts for nothing, as in PyTorch's cross-entropy
TOKENS, CELLS = 512, 2**18  # tokens, and logits of hidden, that the CPU path holds at once (they should fit in cache)
HEAD = 2**22  # numbers of the head that it uses at once: where the head is of another dtype, they are copied
# Both gradients are kept from the forward pass where they are at most KEPT numbers, or at most SHARE of the logits; elsewhere the
# backward pass makes the logits again.
KEPT, SHARE = 2**23, 1 / 40
SLACK = 20.0  # e^(z-a) may grow to e^SLACK before the maximum a is moved: sums over any vocabulary stay far from overflow


class IBTerms(NamedTuple):
    """Per token, in nats, [tokens]: log mu(target), log r(target), KL(mu || r)."""

    log_prob: Tensor
    prior_log_prob: Tensor
    kl: Tensor


def ib_loss_reference(hidden: Tensor, prior_hidden: Tensor, weight: Tensor, targets: Tensor) -> IBTerms:
    """`ib_loss` as its definition reads, with all logits in memory. Differentiable by autograd."""
    compute = torch.promote_types(hidden.dtype, torch.float32)
    head = weight.detach().to(compute).T
    log_mu = (hidden.to(compute) @ head).log_softmax(dim=-1)
    log_r = (prior_hidden.detach().to(compute) @ head).log_softmax(dim=-1)
    ignored = targets == IGNORED
    target = targets.masked_fill(ignored, 0)[:, None]
    log_prob, prior_log_prob = (x.gather(1, target)[:, 0].masked_fill(ignored, 0) for x in (log_mu, log_r))
    kl = (log_mu.exp() * (log_mu - log_r)).sum(dim=-1).masked_fill(ignored, 0)
    return IBTerms(log_prob, prior_log_prob, kl)


def ib_loss(hidden: Tensor, prior_hidden: Tensor, weight: Tensor, targets: Tensor) -> IBTerms:
    """log mu(target), log r(target) and the exact KL(mu || r) in nats, mu = softmax(hidden W^T) and
    r = softmax(prior_hidden W^T), for every token; no [tokens, vocab] tensor is ever materialised.

    hidden [tokens, dim]; prior_hidden [tokens, dim]; weight [vocab, dim]; targets int64 [tokens], -100 = ignored: all
    three terms are 0. Each term is float32 [tokens], computed in float32; float64 hidden states give float64 terms.
    Differentiable (once) in log_prob and kl with respect to hidden alone: prior and head are frozen. Adding one
    constant to all logits of a token changes nothing, and logits of +-1e4 do not overflow. Triton's products are of
    hidden's dtype, to which prior_hidden and weight are converted. Raises ValueError for shapes, dtypes and devices that
    do not fit together and targets outside the vocabulary.
    """
    shape, inputs = hidden.shape, (hidden, prior_hidden, weight)
    fits = len(shape) == 2 and shape[1] > 0 and prior_hidden.shape == shape and weight.shape[1:] == shape[1:]
    if not fits or targets.shape != shape[:1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, prior_hidden {tuple(prior_hidden.shape)}, weight {tuple(weight.shape)} and "
            f"targets {tuple(targets.shape)} must be [tokens, dim], [tokens, dim], [vocab, dim] and [tokens], with dim over 0"
        )
    integer = targets.dtype in (torch.int32, torch.int64)
    if not integer or not all(map(torch.is_floating_point, inputs)) or len({x.device for x in (*inputs, targets)}) > 1:
        found = ", ".join(f"{x.dtype} on {x.device}" for x in (*inputs, targets))
        raise ValueError(f"hidden, prior_hidden and weight must be floats, targets int32 or int64, on one device, not {found}")
    kept = targets != IGNORED
    wrong = kept & ((targets < 0) | (targets >= weight.shape[0]))
    if wrong.any():
        raise ValueError(f"target {targets[wrong][0]} is neither {IGNORED} nor one of {weight.shape[0]} words")
    differentiable = torch.is_grad_enabled() and hidden.requires_grad
    if not runs_triton(hidden):
        return IBTerms(*_Streamed.apply(hidden, prior_hidden.detach(), weight.detach(), targets, differentiable))
    from kernels.ib_loss_triton import Fused

    if kept.all():
        return IBTerms(*Fused.apply(hidden, prior_hidden.detach(), weight.detach(), targets, differentiable))
    some = kept.nonzero()[:, 0]  # ignored tokens are not computed at all
    terms = Fused.apply(hidden[some], prior_hidden.detach()[some], weight.detach(), targets[some], differentiable)
    return IBTerms(*(term.new_zeros(shape[:1]).index_put((some,), term) for term in terms))


class _Streamed(torch.autograd.Function):
    """The CPU path: a few hundred tokens at a time, against one piece of the vocabulary after the other. Ignored tokens are not
    computed at all."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, prior_hidden: Tensor, weight: Tensor, targets: Tensor, differentiable: bool
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        (tokens, dim), compute = hidden.shape, torch.promote_types(hidden.dtype, torch.float32)
        terms, stats = hidden.new_zeros(3, tokens, dtype=compute), hidden.new_empty(5, tokens, dtype=compute)
        keep = differentiable and (2 * tokens * dim <= KEPT or 2 * dim <= SHARE * weight.shape[0])
        gradients = []
        for some in _groups(targets):
            averages = hidden.new_zeros(2 if keep else 0, len(some), dim, dtype=compute)
            terms[:, some], stats[:, some] = _stream(_pair(hidden, prior_hidden, some), weight, targets[some], averages)
            gradients.append(averages)
        ctx.keep, ctx.shape, ctx.dtype = keep, hidden.shape, hidden.dtype
        if differentiable:
            ctx.save_for_backward(targets, *(gradients if keep else (hidden, prior_hidden, weight, stats)))
        log_prob, prior_log_prob, kl = map(torch.clone, terms)  # no views of one tensor: a caller may change them in place
        ctx.mark_non_differentiable(prior_log_prob)
        return log_prob, prior_log_prob, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, log_prob: Tensor, _: Tensor, kl: Tensor) -> tuple[Tensor | None, ...]:
        targets, *saved = ctx.saved_tensors
        gradient = log_prob.new_zeros(ctx.shape, dtype=ctx.dtype)
        for i, some in enumerate(_groups(targets)):
            up = log_prob[some, None], kl[some, None]
            if ctx.keep:
                gradient[some] = (saved[i][0] * up[0]).addcmul_(saved[i][1], up[1]).to(ctx.dtype)
            else:
                hidden, prior_hidden, weight, stats = saved
                gradient[some] = _again(
                    _pair(hidden, prior_hidden, some), weight, targets[some], stats[:, some, None], *up
                ).to(ctx.dtype)
        return gradient, None, None, None, None


def _groups(targets: Tensor) -> tuple[Tensor, ...]:
    """Which tokens to compute together: int64 indices of up to TOKENS that are not ignored."""
    kept = (targets != IGNORED).nonzero()[:, 0]
    return kept.split(TOKENS) if len(kept) else ()


def _pair(hidden: Tensor, prior_hidden: Tensor, some: Tensor) -> Tensor:
    """Both of some tokens, one below the other: [2, tokens, dim], in float32 at least."""
    pair = hidden.new_empty(2, len(some), hidden.shape[1], dtype=torch.promote_types(hidden.dtype, torch.float32))
    for x, target in zip((hidden, prior_hidden), pair, strict=True):
        target.copy_(x[some])
    return pair


def _logits(pair: Tensor, weight: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Piece by piece of the vocabulary: (its first word, its part of the head [size, dim], logits of both [2, tokens, size],
    which the next piece overwrites)."""
    _, tokens, dim = pair.shape
    pieces = min(weight.shape[0], max(1, min(CELLS // tokens, HEAD // max(1, dim))))
    buffer = pair.new_empty(2 * tokens * pieces)
    for start in range(0, weight.shape[0], pieces):
        head = weight[start : start + pieces].to(pair.dtype)
        both = buffer[: 2 * tokens * len(head)].view(2 * tokens, len(head))
        yield start, head, torch.mm(pair.view(-1, dim), head.T, out=both).view(2, tokens, -1)


def _stream(pair: Tensor, weight: Tensor, targets: Tensor, averages: Tensor) -> tuple[Tensor, Tensor]:
    """Of pair = (hidden, prior_hidden), [2, tokens, dim], in one pass over the vocabulary: the three terms, [3, tokens]; maxima
    of z and y, log-sum-exps above them, and the KL, [5, tokens]. averages: zeros [2, tokens, dim], to which the gradients of
    log_prob and kl are written, or [0, tokens, dim] where they are not wanted."""
    _, tokens, dim = pair.shape
    top, sums, chosen = (pair.new_zeros(2, tokens) for _ in range(3))  # running maximum a, b; sums of e^(z-a), e^(y-b); z, y
    excess = pair.new_zeros(tokens)  # sum of e^(z-a) (z-a - (y-b))
    rows, work = torch.arange(tokens, device=pair.device), pair.new_empty(0)
    for start, head, both in _logits(pair, weight):
        size = len(head)
        here = (targets >= start) & (targets < start + size)
        at = (targets - start).clamp(0, size - 1)
        chosen = torch.where(here, both[:, rows, at], chosen)
        new = both.amax(dim=-1)
        if start == 0:
            top, work = new, torch.empty_like(both[0])
        elif (new > top + SLACK).any():
            new = torch.maximum(new, top)
            decay, shift = (top - new).exp(), (top[0] - new[0]) - (top[1] - new[1])
            excess = (excess + shift * sums[0]) * decay[0]
            sums, top = sums * decay, new
            if len(averages):
                averages[1].addcmul_(averages[0], shift[:, None]).mul_(decay[0, :, None])
                averages[0].mul_(decay[0, :, None])
        z, y = both.sub_(top[:, :, None])
        scratch = torch.exp(y, out=work.view(-1)[: tokens * size].view(tokens, size))
        torch.sub(z, y, out=y)
        prior_sum = scratch.sum(dim=-1)
        sums = sums + torch.stack((z.exp_().sum(dim=-1), prior_sum))
        excess = excess + y.mul_(z).sum(dim=-1)
        if len(averages):
            averages.view(-1, dim).addmm_(both.view(2 * tokens, size), head)
    log_sums, mean = sums.log(), excess / sums[0]
    log_prob, prior_log_prob = chosen - top - log_sums
    kl = mean - log_sums[0] + log_sums[1]
    if len(averages):
        expected, tilted = averages.div_(sums[0, :, None])
        tilted.addcmul_(expected, mean[:, None], value=-1)
        torch.sub(weight[targets].to(pair.dtype), expected, out=expected)
    return torch.stack((log_prob, prior_log_prob, kl)), torch.cat((top, log_sums, kl[None]))


def _again(pair: Tensor, weight: Tensor, targets: Tensor, stats: Tensor, log_prob: Tensor, kl: Tensor) -> Tensor:
    """The gradient to hidden, [tokens, dim], from logits made again. stats [5, tokens, 1] as from `_stream`; upstream gradients
    of log_prob and kl [tokens, 1]."""
    gradient = weight[targets].to(pair.dtype).mul_(log_prob)
    for _, head, both in _logits(pair, weight):
        z, y = both.sub_(stats[:2]).sub_(stats[2:4])
        torch.sub(z, y, out=y).sub_(stats[4]).mul_(kl).sub_(log_prob)
        gradient.addmm_(z.exp_().mul_(y), head)
    return gradient
