"""The plan: valid for every call with the same lengths, however it came about; nothing but whole numbers make one."""

import time

import numpy as np
import pytest
import torch

from kernels import agent_attention
from kernels.agent_attention_plan import Plan, _runs

LENGTHS = torch.tensor([5, 3]), torch.tensor([4, 1, 4]), torch.tensor([0, 0, 1])


def plan(**options) -> Plan:
    return Plan(2, 2, LENGTHS[0], 5, LENGTHS[1], 4, LENGTHS[2], **options)


@pytest.mark.parametrize("window", [None, 3])
def test_a_plan_made_in_inference_mode_serves_training(window):
    g = torch.Generator().manual_seed(0)
    q, *kv = (torch.randn(shape, generator=g) for shape in ((3, 2, 2, 32), *[(2, 2, 5, 32)] * 2, *[(3, 2, 4, 32)] * 2))
    given = [q, *kv[:2], LENGTHS[0], *kv[2:], *LENGTHS[1:], window]
    made = plan(window=window)
    with torch.inference_mode():
        agent_attention(*given, plan=made)
    q.requires_grad_()
    agent_attention(*given, plan=made).sum().backward()
    assert q.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["window", "grain"])
@pytest.mark.parametrize("value", [0, -3, 1.5, True])
def test_what_is_no_size_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, not {value}"):
        plan(**{name: value})


def test_worlds_are_cut_in_linear_time():
    """Every world in one run, in order, none twice; twice as many worlds take about twice as long."""
    taken = []
    for worlds in (10_000, 40_000):
        counts, prefix = np.full(worlds, 64), np.full(worlds, 600)
        start = time.process_time()
        runs = list(_runs(counts, prefix, 6, 60, 2**19))
        taken.append(time.process_time() - start)
        assert [some.start for some, _ in runs[1:]] == [some.stop for some, _ in runs[:-1]]
        assert runs[0][0].start == 0 and runs[-1][0].stop == worlds and runs[-1][1].stop == 64 * worlds
    assert taken[1] < 10 * taken[0]


@pytest.mark.parametrize(("heads", "dim"), [(0, 32), (2, 0)])
def test_no_heads_or_numbers_are_refused(heads, dim):
    q = torch.zeros(3, heads, 2, dim)
    prefix, own = torch.zeros(2, 2, 5, dim), torch.zeros(3, 2, 4, dim)
    with pytest.raises(ValueError, match=rf"q \(3, {heads}, 2, {dim}\), prefix_k .* none of heads, kv_heads and head_dim 0"):
        agent_attention(q, prefix, prefix, LENGTHS[0], own, own, *LENGTHS[1:])
