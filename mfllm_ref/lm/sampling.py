"""From logits to tokens: repetition penalty, temperature, top-k, top-p, and one uniform a token.

Notable: the noise is a pure function of (seed, position among the generated tokens). There is no generator and no
state, so a token does not depend on who else is in the batch, nor on how the batch was cut. Everything is vectorised
over agents.
"""

from collections.abc import Sequence
from operator import index

import numpy as np
import torch
from torch import Tensor

_WEYL = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd
LIKELY = 512  # tokens among which a nucleus is looked for first


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014) on uint64, arithmetic modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_seeds(seeds: Sequence[int]) -> np.ndarray:
    """Whole numbers of any size or sign, taken modulo 2^64 -> uint64 [agents], scrambled."""
    return _mix(np.array([index(seed) & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64) + _WEYL)


def uniforms(hashed: np.ndarray, position: int) -> np.ndarray:
    """float64 [agents] in [0, 1), multiples of 2^-53: the noise of `hash_seeds`' agents for their position-th token."""
    step = _mix(np.array([position], dtype=np.uint64) * _WEYL + _WEYL)
    # The sum keeps seed 0 at position 0, whose scrambled halves are equal, away from _mix(0) = 0.
    return (_mix((hashed ^ step) + _WEYL) >> np.uint64(11)) * 2.0**-53


def square(rows: list[list[int]], spare: int, device: torch.device) -> Tensor:
    """int64 [rows, longest + spare]: rows filled up with their last token, for `penalise`."""
    width = max(len(row) for row in rows) + spare
    return torch.tensor([row + [row[-1]] * (width - len(row)) for row in rows], device=device)


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """CTRL's repetition penalty (arXiv 1909.05858, section 4.1) as transformers applies it: positive logits of seen
    tokens are divided, negative ones multiplied. logits [agents, vocab]; seen int64 [agents, n], repeats allowed."""
    scores = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(scores < 0, scores * penalty, scores / penalty))


def truncate(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """-inf for all but the top_k largest logits (0: all; ties with the last stay), then for all tokens that have at least
    top_p of the remaining probability above them (of equals the first are above). The largest always stays.
    logits [agents, vocab]."""
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    return _nucleus(logits, top_p) if top_p < 1 else logits


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """`truncate` by top_p. Mostly the likeliest few hold it, and then only they are sorted."""
    total = logits.logsumexp(dim=-1, keepdim=True)
    for size in (min(LIKELY, logits.shape[1]), logits.shape[1]):
        ordered = logits.topk(size).values
        shares = (ordered - total).exp()
        kept = shares.cumsum(dim=-1) - shares < top_p
        kept[:, 0] = True  # of a row without a distribution too, which `sample` will refuse
        if not kept[:, -1].any():
            break
    count = kept.sum(dim=-1, keepdim=True)
    last = ordered.gather(1, count - 1)
    stays = logits >= last
    if (stays.sum(dim=-1, keepdim=True) > count).any():  # more tokens equal the last than there is room for
        above, equal = logits > last, logits == last
        stays = above | equal & (equal.cumsum(dim=-1) <= count - above.sum(dim=-1, keepdim=True))
    return logits.masked_fill(~stays, -torch.inf)


def sample(logits: Tensor, noise: np.ndarray | None, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """One token an agent, int64 [agents]: the first whose cumulative probability passes the agent's uniform; the
    largest logit if temperature is 0 (noise is then not read). logits [agents, vocab], float32 or float64.

    Raises FloatingPointError if the logits have no distribution (NaN, or all -inf).
    """
    if temperature != 1:
        largest, where = logits.max(dim=-1, keepdim=True)
        if temperature == 0:
            check_finite(largest)
            return where[:, 0]
        logits = (logits - largest) / max(temperature, 1e-30)  # at most 0, so it cannot overflow; float32 has no 1e-46
    cumulative = truncate(logits, top_k, top_p).softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    check_finite(total)
    # Strictly below the total, so that the token found has a probability above 0.
    target = torch.from_numpy(noise).to(total.device)[:, None] * total
    target = target.minimum(total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def check_finite(x: Tensor) -> None:
    """FloatingPointError where a number that the language model is about to give is NaN or infinite."""
    if not x.isfinite().all():
        raise FloatingPointError("the model's logits are not finite")
