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
backward pass, which is then a sum of two scaled vectors a token.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import runs_triton

IGNORED = -100  # a target that counts for nothing, as in PyTorch's cross-entropy
TOKENS, CELLS = 512, 2**18  # tokens, and logits of hidden, that the CPU path holds at once (they should fit in cache)
HEAD = 2**22  # numbers of the head that it uses at once: where the head is of another dtype, they are copied
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
    constant to all logits of a token changes nothing, and logits of +-1e4 do not overflow. Raises ValueError for shapes
    that do not fit together and targets outside the vocabulary.
    """
    tokens, dim = hidden.shape
    if prior_hidden.shape != hidden.shape or weight.shape[1:] != (dim,) or targets.shape != (tokens,):
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, prior_hidden {tuple(prior_hidden.shape)}, weight {tuple(weight.shape)} and "
            f"targets {tuple(targets.shape)} must be [tokens, dim], [tokens, dim], [vocab, dim] and [tokens]"
        )
    kept = targets != IGNORED
    wrong = kept & ((targets < 0) | (targets >= weight.shape[0]))
    if wrong.any():
        raise ValueError(f"target {targets[wrong][0]} is neither {IGNORED} nor one of {weight.shape[0]} words")
    differentiable = torch.is_grad_enabled() and hidden.requires_grad
    if runs_triton(hidden):
        from kernels.ib_loss_triton import Fused as function
    else:
        function = _Streamed
    if kept.all():
        return IBTerms(*function.apply(hidden, prior_hidden.detach(), weight.detach(), targets, differentiable))
    some = kept.nonzero()[:, 0]  # ignored tokens are not computed at all
    terms = function.apply(hidden[some], prior_hidden.detach()[some], weight.detach(), targets[some], differentiable)
    return IBTerms(*(term.new_zeros(tokens).index_put((some,), term) for term in terms))


class _Streamed(torch.autograd.Function):
    """The CPU path: a few hundred tokens at a time, against one piece of the vocabulary after the other."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, prior_hidden: Tensor, weight: Tensor, targets: Tensor, differentiable: bool
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        (tokens, dim), compute = hidden.shape, torch.promote_types(hidden.dtype, torch.float32)
        terms = hidden.new_empty(3, tokens, dtype=compute)
        gradients = hidden.new_empty(2, tokens if differentiable else 0, dim, dtype=compute)
        for start in range(0, tokens, TOKENS):
            some = slice(start, start + TOKENS)
            pair = torch.stack((hidden[some], prior_hidden[some])).to(compute)
            terms[:, some] = _stream(pair, weight, targets[some], gradients[:, some] if differentiable else None)
        log_prob, prior_log_prob, kl = terms.unbind()
        ctx.dtype = hidden.dtype
        ctx.save_for_backward(gradients)
        ctx.mark_non_differentiable(prior_log_prob)
        return log_prob, prior_log_prob, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, log_prob: Tensor, _: Tensor, kl: Tensor) -> tuple[Tensor | None, ...]:
        (gradients,) = ctx.saved_tensors
        hidden = (gradients[0] * log_prob[:, None]).addcmul_(gradients[1], kl[:, None])
        return hidden.to(ctx.dtype), None, None, None, None


def _stream(pair: Tensor, weight: Tensor, targets: Tensor, gradients: Tensor | None) -> Tensor:
    """The three terms, [3, tokens], of pair = (hidden, prior_hidden), [2, tokens, dim], in one pass over the vocabulary.
    gradients [2, tokens, dim], if wanted, is filled with those of log_prob and kl."""
    _, tokens, dim = pair.shape
    vocab, pieces = weight.shape[0], max(1, min(CELLS // tokens, HEAD // max(1, dim)))
    logits, work = pair.new_empty(2 * tokens * pieces), pair.new_empty(tokens * pieces)
    top = sums = chosen = excess = pair.new_zeros(2, tokens)  # running maximum a, b; sums of e^(z-a), e^(y-b); z, y
    averages = pair.new_zeros(2 if gradients is not None else 0, tokens, dim)  # sums of the weights times W_v
    rows = torch.arange(tokens, device=pair.device)
    for start in range(0, vocab, pieces):
        head = weight[start : start + pieces].to(pair.dtype)
        size = head.shape[0]
        both = logits[: 2 * tokens * size].view(2 * tokens, size)
        torch.mm(pair.view(-1, dim), head.T, out=both)
        both = both.view(2, tokens, size)
        here = (targets >= start) & (targets < start + size)
        at = (targets - start).clamp(0, size - 1)
        chosen = torch.where(here, both[:, rows, at], chosen)
        new = both.amax(dim=-1)
        if start == 0:
            top, excess = new, excess[0]
        elif (new > top + SLACK).any():
            new = torch.maximum(new, top)
            decay, shift = (top - new).exp(), (top[0] - new[0]) - (top[1] - new[1])
            excess = (excess + shift * sums[0]) * decay[0]
            sums, top = sums * decay, new
            if gradients is not None:
                averages[1].addcmul_(averages[0], shift[:, None]).mul_(decay[0, :, None])
                averages[0].mul_(decay[0, :, None])
        z, y = both.sub_(top[:, :, None])
        scratch = torch.exp(y, out=work[: tokens * size].view(tokens, size))
        torch.sub(z, y, out=y)
        prior_sum = scratch.sum(dim=-1)
        sums = sums + torch.stack((z.exp_().sum(dim=-1), prior_sum))
        excess = excess + y.mul_(z).sum(dim=-1)
        if gradients is not None:
            averages.view(-1, dim).addmm_(both.view(2 * tokens, size), head)
    log_sums, mean = sums.log(), excess / sums[0]
    log_prob, prior_log_prob = chosen - top - log_sums
    if gradients is not None:
        expected = averages[0].div_(sums[0, :, None])
        torch.sub(weight[targets].to(pair.dtype), expected, out=gradients[0])
        torch.addcmul(averages[1].div_(sums[0, :, None]), expected, mean[:, None], value=-1, out=gradients[1])
    return torch.stack((log_prob, prior_log_prob, mean - log_sums[0] + log_sums[1]))
