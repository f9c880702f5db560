"""agent_attention in bfloat16 on PyTorch's path, and under autocast: what nobody may see, and what all of a row's scores share,
is of no account."""

import pytest
import torch

from kernels import agent_attention
from kernels.agent_attention import Plan, agent_attention_reference

BF16 = torch.bfloat16


def case(q_len=1, dim=32, dtype=BF16):
    """Two worlds, the first with a prefix of eight keys and the second with none; an agent each, with eight own keys."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, q_len, dim, generator=g)
    prefix, own = torch.randn(2, 2, 2, 8, dim, generator=g), torch.randn(2, 2, 2, 8, dim, generator=g)
    lengths = torch.tensor([8, 0], dtype=torch.int32), torch.tensor([8, 8], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    q, prefix, own = (x.to(dtype) for x in (q, prefix, own))
    return [q, *prefix, lengths[0], *own, *lengths[1:]]


def error(given, window=None, **options):
    """Norm of the error to norm, worst agent, against the reference in float64."""
    exact = agent_attention_reference(*(x.double() if x.is_floating_point() else x for x in given), window)
    found = agent_attention(*given, window, **options)
    return float(((found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).max())


@pytest.mark.parametrize("q_len", [1, 5])
@pytest.mark.parametrize("fill", [0.0, 100.0, 1e4, 1e30, torch.nan])
def test_unused_slots_of_an_empty_prefix_may_hold_anything(fill, q_len):
    given = case(q_len)
    given[1][1], given[2][1] = fill, fill
    assert error(given) < 0.01


@pytest.mark.parametrize("nats", [0.0, 50.0, 1000.0])
def test_a_key_that_a_window_hides_is_of_no_account(nats):
    """The prefix's last key is far above all others, and four positions before any row."""
    given = [x[:1] for x in case()]
    row = given[0].float()
    given[1][0, :, 7] = (nats * 32**0.5 * row[0, ::2, 0] / row[0, ::2, 0].square().sum(-1, keepdim=True)).to(BF16)
    assert error(given, window=4) < 0.01


@pytest.mark.parametrize("q_len", [1, 5])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("nats", [0.0, 100.0, 1000.0])
@pytest.mark.parametrize("autocast", [False, True])
def test_what_all_scores_share_is_of_no_account(nats, window, gradients, autocast, q_len):
    """One more dimension, in which all keys are equal, shifts all scores of a row; under autocast numbers are float32."""
    given = case(q_len, dtype=torch.float32)
    up = (nats / given[0][:, :, :, :1].abs().max() * 33**0.5).round()
    for i, x in enumerate(given):
        if x.is_floating_point():
            more = 0.0 if i in (2, 5) else 1.0 if i == 0 else float(up)
            given[i] = torch.nn.functional.pad(x, (0, 1), value=more).to(torch.float32 if autocast else BF16)
    given[0].requires_grad_(gradients)
    with torch.autocast("cpu", BF16, enabled=autocast):
        assert error(given, window) < 0.015
        assert agent_attention(*given, window).dtype == given[0].dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, BF16])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_plans_lengths_count(dtype, gradients):
    given = case(dtype=dtype)
    given[1][1] = torch.nan
    given[0].requires_grad_(gradients)
    plan = Plan(4, 1, given[3], 8, given[6], 8, given[7])
    expected = agent_attention(*given)
    others = [*given[:3], torch.tensor([8, 8], dtype=torch.int32), *given[4:6], torch.zeros(2, dtype=torch.int32), given[7]]
    assert torch.equal(agent_attention(*others, plan=plan), expected) and expected.isfinite().all()


def test_float64_stays_float64_under_autocast():
    given = case(dtype=torch.float64)
    with torch.autocast("cpu", BF16):
        assert error(given) < 1e-12


@pytest.mark.parametrize("q_len", [1, 4])
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("place", ["prefix", "own"])
@pytest.mark.parametrize("nats", [-300.0, -20.0, 20.0])
def test_no_single_key_decides_how_exact_the_others_are(nats, place, window, q_len):
    """One key far below or above all others: the last of a prefix, or an agent's last but four."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(4, 2, q_len, 64, generator=g)
    prefix, own = torch.randn(2, 1, 2, 60, 64, generator=g), torch.randn(2, 4, 2, 20, 64, generator=g)
    q[..., 0], prefix[0, ..., 0], own[0, ..., 0] = 8.0, 0.0, 0.0  # a score is the first number, in nats, and what is random
    (prefix if place == "prefix" else own)[0, :, :, -1 if place == "prefix" else -5, 0] = nats
    q, prefix, own = (x.to(BF16) for x in (q, prefix, own))
    lengths = torch.tensor([60]), torch.full((4,), 20), torch.zeros(4, dtype=torch.int64)
    assert error([q, *prefix, lengths[0], *own, *lengths[1:]], window) < 0.006


def test_float16_is_computed_in_float32_under_autocast_too():
    given = case(5, dtype=torch.float16)
    given[0][..., 0] = 8.0
    for keys in (given[1], given[4]):
        keys[..., 0] = 212.0  # 300 nats that all scores of a row share
    with torch.autocast("cpu", torch.float16):
        assert error(given) < 0.001
