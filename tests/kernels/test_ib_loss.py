"""ib_loss against an independent oracle (float64 softmaxes written out, analytic gradients) and its own properties.

Tests that take `path` run in PyTorch and in Triton: on CUDA if there is one, else in Triton's interpreter.
"""

import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import ib_loss
from kernels.ib_loss import IGNORED, ib_loss_reference

MODULE = sys.modules["kernels.ib_loss"]
FUSED = pytest.importorskip("kernels.ib_loss_triton")
# What hypothesis draws for Triton: bfloat16 where it is multiplied, not in the interpreter.
FLOATS = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def make(tokens, dim, vocab, dtype=torch.float64, seed=0, scale=1.0, ignored=0.2):
    """Random inputs: hidden, prior_hidden, weight, targets; upstream gradients of log_prob and kl, one each a token."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden, prior = (normal(tokens, dim).mul(scale / max(1, dim) ** 0.5).to(dtype) for _ in range(2))
    targets = torch.randint(vocab, (tokens,), generator=g)
    targets[torch.rand(tokens, generator=g) < ignored] = IGNORED
    return (hidden, prior, normal(vocab, dim).to(dtype), targets), (normal(tokens), normal(tokens))


def oracle(hidden, prior, weight, targets, up_log_prob, up_kl):
    """Terms and gradient, token by token in float64, by the formulas in the kernel's own header."""
    hidden, prior, weight = hidden.double(), prior.double(), weight.double()
    terms, gradient = torch.zeros(3, len(targets), dtype=torch.float64), torch.zeros_like(hidden)
    for i, target in enumerate(targets.tolist()):
        if target == IGNORED:
            continue
        z, y = weight @ hidden[i], weight @ prior[i]
        log_mu, log_r = z - z.logsumexp(0), y - y.logsumexp(0)
        mu, ratio = log_mu.exp(), log_mu - log_r
        kl = mu @ ratio
        terms[:, i] = torch.stack((log_mu[target], log_r[target], kl))
        gradient[i] = up_log_prob[i] * (weight[target] - mu @ weight) + up_kl[i] * ((mu * (ratio - kl)) @ weight)
    return terms, gradient


def run(function, case, upstream, device="cpu"):
    """Terms [3, tokens] and the gradient to hidden, for one upstream gradient a token and differentiable term."""
    hidden, *rest = (x.to(device) for x in case)
    hidden = hidden.clone().requires_grad_()
    terms = function(hidden, *rest)
    total = sum((term * up.to(term)).sum() for term, up in zip((terms.log_prob, terms.kl), upstream, strict=True))
    return torch.stack(terms).detach().cpu(), torch.autograd.grad(total, hidden)[0].cpu()


def close(case, upstream, result, tolerance):
    """Whether terms and gradient are right up to rounding. A logit as large as `size` is rounded by about eps * size; a
    term moves as much, a gradient by that times the largest difference of logits, times the largest word of the head."""
    size = max([1.0] + [float((x.double() @ case[2].double().T).abs().max()) for x in case[:2] if len(x)])
    up = max([1.0] + [float(x.abs().max()) for x in upstream if len(x)])
    scales = size, size**2 * float(case[2].double().abs().max()) * up
    for got, expected, scale in zip(result, oracle(*case, *upstream), scales, strict=True):
        assert got.shape == expected.shape and got.isfinite().all()
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * scale)


@given(
    tokens=st.integers(0, 9),
    dim=st.integers(1, 20),
    vocab=st.integers(1, 70),
    cells=st.sampled_from([1, 40, 2**18]),
    chunk=st.sampled_from([1, 4, 512]),
    kept=st.sampled_from([0, 2**23]),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=150, derandomize=True, deadline=None)
def test_any_shape_equals_the_oracle(tokens, dim, vocab, cells, chunk, kept, scale, dtype, seed):
    """Invariant: whatever the shapes, the pieces the work is cut into, whether gradients are kept or logits made again, and the
    size of the logits, the terms are the dense formulas' and so is the gradient, with an upstream gradient of its own for every
    token and term."""
    case, upstream = make(tokens, dim, vocab, dtype, seed, scale)
    before = MODULE.CELLS, MODULE.TOKENS, MODULE.KEPT
    MODULE.CELLS, MODULE.TOKENS, MODULE.KEPT = cells, chunk, kept
    try:
        close(case, upstream, run(ib_loss, case, upstream), TOLERANCE[dtype])
    finally:
        MODULE.CELLS, MODULE.TOKENS, MODULE.KEPT = before
    close(case, upstream, run(ib_loss_reference, case, upstream), TOLERANCE[dtype])


@given(
    tokens=st.integers(1, 150),
    dim=st.sampled_from([1, 16, 40, 70, 130]),
    vocab=st.sampled_from([1, 2, 64, 65, 300, 900]),
    buffer=st.sampled_from([1, 2**15, 2**26]),
    scale=st.sampled_from([1.0, 30.0, 1e4]),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 10_000),
)
@settings(
    max_examples=12, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_shape_equals_the_oracle_in_triton(triton_device, tokens, dim, vocab, buffer, scale, dtype, seed):
    """Invariant: the same of the Triton kernels, whatever tiles and pieces of the vocabulary are left ragged."""
    case, upstream = make(tokens, dim, vocab, dtype, seed, scale, ignored=0.1)
    before, FUSED.BUFFER = FUSED.BUFFER, buffer
    try:
        close(case, upstream, run(ib_loss, case, upstream, triton_device), TOLERANCE[dtype])
    finally:
        FUSED.BUFFER = before


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_dtype_is_computed_in_float32_or_better(path, dtype):
    case, upstream = make(20, 48, 300, dtype)
    terms, gradient = run(ib_loss, case, upstream, path)
    assert terms.dtype == torch.promote_types(dtype, torch.float32) and gradient.dtype == dtype
    close(case, upstream, (terms, gradient), TOLERANCE[dtype])
    assert (terms - oracle(*case, *upstream)[0]).abs().max() < 1e-4  # the terms themselves are not rounded to dtype


def test_gradients_equal_finite_differences():
    (hidden, prior, weight, targets), _ = make(5, 3, 11, ignored=0.3)

    def terms(hidden):
        log_prob, _, kl = ib_loss(hidden, prior, weight, targets)
        return log_prob, kl

    assert torch.autograd.gradcheck(terms, hidden.requires_grad_())


@pytest.mark.parametrize("function", [ib_loss, ib_loss_reference])
def test_only_hidden_has_a_gradient_and_only_from_log_prob_and_kl(path, function):
    hidden, prior, weight, targets = (x.to(path) for x in make(5, 3, 11, torch.float32)[0])
    for x in (hidden, prior, weight):
        x.requires_grad_()
    terms = function(hidden, prior, weight, targets)
    assert not terms.prior_log_prob.requires_grad
    gradients = torch.autograd.grad((terms.log_prob + terms.kl).sum(), (hidden, prior, weight), allow_unused=True)
    assert gradients[0].abs().sum() > 0 and gradients[1:] == (None, None)
    with torch.no_grad():
        assert not function(hidden, prior, weight, targets).kl.requires_grad
    with pytest.raises(ValueError, match="neither"):
        ib_loss(hidden, prior, weight, targets.clamp(max=0) + 11)


def test_ignored_tokens_are_zero_and_harmless_whatever_they_hold(path):
    (hidden, prior, weight, targets), upstream = make(12, 4, 30, torch.float32, ignored=0.5)
    ignored = targets == IGNORED
    assert 0 < ignored.sum() < 12
    dirty = hidden.masked_fill(ignored[:, None], torch.nan)
    terms, gradient = run(ib_loss, (dirty, prior, weight, targets), upstream, path)
    clean, clean_gradient = run(ib_loss, (hidden, prior, weight, targets), upstream, path)
    assert (terms[:, ignored] == 0).all() and (gradient[ignored] == 0).all()
    assert torch.equal(terms, clean) and torch.equal(gradient, clean_gradient)


@pytest.mark.parametrize("constant", [-1e4, 1e4])
def test_a_constant_added_to_all_logits_changes_nothing(path, constant):
    """A column of ones in the head multiplies a number in the hidden states; both logits move, by different amounts. With
    logits that float32 still holds exactly after the move, not even rounding differs much."""
    g = torch.Generator().manual_seed(3)
    hidden, prior = (torch.randint(-2, 3, (6, 4), generator=g).float() for _ in range(2))
    weight, targets = torch.randint(-2, 3, (50, 4), generator=g).float(), torch.randint(50, (6,), generator=g)
    upstream = torch.randn(2, 6, generator=g)
    plain, gradient = run(ib_loss, (hidden, prior, weight, targets), upstream, path)
    moved = torch.cat((hidden, torch.full((6, 1), constant)), 1), torch.cat((prior, torch.full((6, 1), -constant)), 1)
    case = (*moved, torch.cat((weight, torch.ones(50, 1)), 1), targets)
    moved, moved_gradient = run(ib_loss, case, upstream, path)
    torch.testing.assert_close(moved, plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(moved_gradient[:, :4], gradient, rtol=0, atol=1e-4)
    assert moved_gradient[:, 4].abs().max() < 1e-4


def test_maxima_that_grow_along_the_vocabulary_are_followed():
    """Logits that rise from -1e4 to 1e4 word by word move the running maxima at every piece."""
    before, MODULE.CELLS = MODULE.CELLS, 8
    try:
        weight = torch.linspace(-1e4, 1e4, 40, dtype=torch.float64)[:, None]
        hidden, prior = torch.tensor([[1.0], [-1.0]]).double(), torch.tensor([[-1.0], [0.999]]).double()
        case, upstream = (hidden, prior, weight, torch.tensor([39, 3])), torch.ones(2, 2)
        close(case, upstream, run(ib_loss, case, upstream), 1e-13)
    finally:
        MODULE.CELLS = before


def test_equal_distributions_have_no_divergence_and_no_gradient_of_it(path):
    (hidden, _, weight, targets), _ = make(8, 16, 200, torch.float32)
    terms, gradient = run(ib_loss, (hidden, hidden.clone(), weight, targets), (torch.zeros(8), torch.ones(8)), path)
    assert terms[2].abs().max() < 1e-5 and gradient.abs().max() < 1e-5


@pytest.mark.parametrize("dim", [192, 448])
@pytest.mark.parametrize("ignored", [0, 0.01, 0.9])
def test_extra_memory_is_a_small_share_of_the_logits(monkeypatch, dim, ignored):
    """Under 5% of the materialised logits, forward and backward: 2,048 tokens of dim 1,536 and 3,584 against 152,064 words, but
    for time's sake a quarter of the tokens, an eighth of dim and words, and pieces that are smaller by no more than that."""
    monkeypatch.setattr(MODULE, "TOKENS", MODULE.TOKENS // 4)
    monkeypatch.setattr(MODULE, "CELLS", MODULE.CELLS // 8)
    monkeypatch.setattr(MODULE, "KEPT", MODULE.KEPT // 32)
    case, _ = make(512, dim, 19_008, torch.float32, ignored=ignored)
    most = peak(case)
    assert 512 * dim * 4 < most < 0.05 * 512 * 19_008 * 4, most


@pytest.mark.parametrize("tokens, vocab", [(1, 10), (5, 1), (1, 1)])
def test_one_token_or_word_may_be_a_slice_or_a_transpose(path, tokens, vocab):
    """What is contiguous though its only row's stride is any number."""
    hidden, prior, weight = (torch.randn(n + 2, 65)[:n, :64] for n in (tokens, tokens, vocab))
    hidden, prior = (x if tokens > 1 else torch.randn(64, 1).T for x in (hidden, prior))
    case, upstream = (hidden, prior, weight, torch.zeros(tokens, dtype=torch.int64)), torch.ones(2, tokens)
    given = tuple(x.to(path) for x in case)
    for one, other in zip(ib_loss(*given), ib_loss_reference(*given), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    close(case, upstream, run(ib_loss, case, upstream, path), TOLERANCE[torch.float32])


@pytest.mark.parametrize("change", [
    {0: torch.zeros(3, 4, dtype=torch.int64)}, {1: torch.zeros(3, 4, dtype=torch.int32)}, {2: torch.zeros(7, 4, dtype=torch.complex64)},
    {3: torch.zeros(3)}, {3: torch.zeros(3, dtype=torch.bool)}, {2: torch.zeros(7, 4, device="meta")}, {0: torch.zeros(4)},
    {0: torch.zeros(1, 3, 4), 1: torch.zeros(1, 3, 4)}, {2: torch.zeros(())}, {2: torch.zeros(4)}, {3: torch.zeros(3, 1).long()},
])  # fmt: skip
def test_what_does_not_fit_together_is_refused(path, change):
    case = [torch.randn(3, 4), torch.randn(3, 4), torch.randn(7, 4), torch.zeros(3, dtype=torch.int64)]
    for i, x in change.items():
        case[i] = x
    with pytest.raises(ValueError, match="must be"):
        ib_loss(*(x if x.is_meta else x.to(path) for x in case))


def test_pieces_are_no_larger_than_vocabulary_and_tokens():
    """Two tokens and ten words need no room for 2**18 logits."""
    assert peak(make(2, 4, 10, torch.float32, ignored=0)[0]) < 10_000


def peak(case):
    """The most bytes that ib_loss and its gradient hold beyond the case itself."""
    hidden, *rest = case
    hidden.requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        terms = ib_loss(hidden, *rest)
        (terms.log_prob + terms.kl).sum().backward()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("sizes", [(3, 4, 152_064), (4, 8192, 70)], ids=["large vocabulary", "large dim"])
@pytest.mark.parametrize("kept", [0, 2**23])
def test_the_largest_sizes_equal_the_oracle(monkeypatch, sizes, kept):
    """Where PyTorch computes, and on CUDA; in the interpreter a vocabulary takes minutes."""
    monkeypatch.setattr(MODULE, "KEPT", kept)
    case, upstream = make(*sizes, torch.float32, ignored=0)
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        close(case, upstream, run(ib_loss, case, upstream, device), TOLERANCE[torch.float32])


def test_a_large_dim_equals_the_oracle_in_triton(triton_device):
    case, upstream = make(3, 8192, 20, torch.float32, ignored=0)
    close(case, upstream, run(ib_loss, case, upstream, triton_device), TOLERANCE[torch.float32])


@pytest.mark.parametrize("function, vocab", [(ib_loss, 0), (ib_loss, 7), (ib_loss_reference, 7)])
def test_nothing_but_ignored_targets_is_legal(path, function, vocab):
    """Invariant: no token, no word is asked for: terms and gradient are 0, even where there are no words."""
    case = torch.randn(3, 4), torch.randn(3, 4), torch.randn(vocab, 4), torch.full((3,), IGNORED)
    terms, gradient = run(function, case, torch.ones(2, 3), path)
    assert terms.shape == (3, 3) and gradient.shape == (3, 4)
    assert (terms == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("term", ["log_prob", "prior_log_prob", "kl"])
def test_a_term_may_be_changed_in_place(term):
    """No term is a view of the others', with gradients or without."""
    g = torch.Generator().manual_seed(0)
    hidden, prior, weight = torch.randn(5, 8, generator=g), torch.randn(5, 8, generator=g), torch.randn(20, 8, generator=g)
    terms = ib_loss(hidden.requires_grad_(), prior, weight, torch.arange(5))
    others = [x.clone() for x in terms]
    getattr(terms, term).mul_(2)
    for name, x, before in zip(terms._fields, terms, others, strict=True):
        assert torch.equal(x, 2 * before if name == term else before)
    (terms.log_prob + terms.kl).sum().backward()
    assert hidden.grad.isfinite().all()
