"""The cost formulas against what torch counts, against transformers, and against cases worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mfllm_ref import bench, pretrain
from mfllm_ref.arithmetic import Cost, Load, Society, exponent, measured_flops, predict, told_everything

SMALL = pretrain.config_for("qwen2", pretrain.Shape(dim=4, layers=2, heads=2, kv_heads=1, intermediate=3, vocab=5), 5)
QWEN = pretrain.config_for("qwen2", bench.SHAPES["qwen2-1.5b"], 151_936)


@pytest.fixture(scope="module")
def lm():
    args = bench.parser().parse_args(["throughput", "--config", "tiny", "--random-weights"])
    return bench.our_model(args, torch.device("cpu"), end=False)


@pytest.mark.parametrize("load", [Load(8, 120, 20, 6), Load(5, 60, 8, 4, worlds=3), Load(1, 300, 40, 2)])
def test_formula_is_what_torch_counts(lm, load):
    """Generation runs the matrix products that the formula says, for one world and for several."""
    rng, vocab = np.random.default_rng(0), lm.backbone.config.vocab_size
    rows, worlds = [], []
    for world in range(load.worlds):
        shared = rng.integers(1, vocab, load.prefix)
        rows += [np.concatenate((shared, rng.integers(1, vocab, load.suffix))).tolist() for _ in range(load.agents)]
        worlds += [world] * load.agents
    _, counted = bench.count_flops(lambda: lm.generate(rows, load.new, temperature=0, worlds=worlds))
    if load.agents == 1:  # alone in its world, an agent shares all but its last token
        load = Load(1, load.prefix + load.suffix - 1, 1, load.new)
    assert load.cost(lm.backbone.config).flops == pytest.approx(counted, rel=0.03)


@torch.no_grad()
def test_formula_of_full_prompts_is_what_torch_counts_of_transformers(lm):
    full = torch.arange(1, 1 + 4 * 90).view(4, 90)
    model = bench.their_model(lm)
    options = {"attention_mask": torch.ones_like(full), "do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    _, counted = bench.count_flops(lambda: model.generate(full, **options))
    cost = Load(4, 70, 20, 5).cost(lm.backbone.config, computed_once=False, stored_once=False)
    assert cost.flops == pytest.approx(counted, rel=0.03)


def test_formula_by_hand():
    """2 layers of 4 x (4 + 2 + 2 + 4) + 3 x 4 x 3 = 84 numbers, a head of 20; 2 heads of 2, so 32 FLOPs a query and key;
    16 numbers of keys and values a token."""
    cost = Load(agents=2, prefix=10, suffix=4, new=3).cost(SMALL, itemsize=2)
    assert cost.prefill == 0.5 * (2 * 168 * (10 + 8) + 32 * (50 + 8 * 12))
    assert cost.decode == 2 * (2.5 * (2 * 168 + 32 * 15.5) + 2 * 3 * 20)
    assert (cost.weights, cost.keys) == (3 * 2 * 188, 3 * 2 * 8 * (10 + 2 * 5.5))
    apart = Load(agents=2, prefix=10, suffix=4, new=3).cost(SMALL, 2, computed_once=False, stored_once=False)
    assert apart.prefill == 2 * (2 * 168 * 14 + 32 * 98)
    assert apart.decode == 2 * (2 * (2 * 168 + 32 * 15.5) + 2 * 3 * 20)
    assert (apart.weights, apart.keys) == (3 * 2 * 188, 3 * 2 * 8 * 2 * 15.5)


def test_seconds_are_bound_by_the_slower_of_both():
    assert Cost(prefill=6.0, decode=4.0, weights=1.0, keys=2.0).seconds(2.0, 3.0) == 3 + 2
    assert Cost(prefill=6.0, decode=4.0, weights=10.0, keys=2.0).seconds(2.0, 3.0) == 3 + 4


def test_telling_everything_is_quadratic_and_a_mean_field_is_not():
    load = Load(64, 100, 20, 15)
    sizes = [64 * 2**k for k in range(8, 12)]
    assert exponent(sizes, [told_everything(SMALL, load, n) for n in sizes]) > 1.95
    row = {"prefix": 100, "suffix": 20, "new": 15, "listing": 900, "summary": 90, "worlds": 3}
    rows = [row | {"agents": n, "steps": n // 64} for n in sizes]
    ours, told = zip(*(measured_flops(SMALL, row, 64) for row in rows))
    assert exponent(sizes, ours) == pytest.approx(1, abs=0.01)
    assert told[0] == 3 * told_everything(SMALL, load, sizes[0])
    both = Load(64, 100, 20, 15).cost(SMALL).flops + Load(6, 100 + 64 * 15, 20, 15).cost(SMALL).flops
    assert told_everything(SMALL, load, 70) == both


def test_exponent_is_the_slope():
    sizes = [1000, 2000, 8000]
    assert exponent(sizes, [7e-3 * n**1.25 for n in sizes]) == pytest.approx(1.25)


def test_prediction_spreads_worlds_then_agents():
    run = Society(agents=1_000_000, worlds=16, batch=64, prefix=600, suffix=60, new=30, head=300, listed=30, summary=100)
    acting = Load(64, 600, 60, 30, worlds=16).cost(QWEN, 2).seconds(4e14, 1e12)
    writing = Load(1, 0, 300 + 64 * 30, 100, worlds=16).cost(QWEN, 2).seconds(4e14, 1e12)
    alone = predict(QWEN, run, 1, 4e14, 1e12)
    assert alone.rounds == 977 and (alone.acting, alone.writing) == (acting, writing)
    assert alone.seconds == 977 * (acting + writing)
    eight = predict(QWEN, run, 8, 4e14, 1e12)  # every device reads the weights, so more than an eighth
    assert alone.seconds / 8 < eight.seconds < alone.seconds / 2 and eight.flops == pytest.approx(alone.flops)
    few = predict(QWEN, run, 32, 4e14, 1e12)  # two devices a world, whose 64 agents are one chunk: one of the two waits
    assert few.acting == Load(64, 600, 60, 30).cost(QWEN, 2).seconds(4e14, 1e12)
    assert few.writing == Load(1, 0, 2220, 100).cost(QWEN, 2).seconds(4e14, 1e12)
    wide = predict(QWEN, replace(run, batch=512), 32, 4e14, 1e12)  # 512 are five chunks: half on each
    assert wide.acting == Load(256, 600, 60, 30).cost(QWEN, 2).seconds(4e14, 1e12)
    uneven, even = (predict(QWEN, replace(run, worlds=n), 8, 4e14, 1e12) for n in (9, 16))
    assert uneven[1:3] == even[1:3], "a device has two worlds either way, and the others wait for it"


