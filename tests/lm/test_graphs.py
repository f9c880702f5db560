"""Decode steps that are laid out once and then moved on; on a GPU, recorded and replayed."""

import numpy as np
import pytest
import torch

from mfllm_ref import pretrain
from mfllm_ref.lm import LanguageModel
from mfllm_ref.lm.backbone import Backbone
from mfllm_ref.lm.graphs import Replay
from mfllm_ref.lm.worlds import Step, World, prefill

SHAPE = pretrain.Shape(dim=32, layers=2, heads=4, kv_heads=2, intermediate=48, vocab=700)


def prefilled(backbone, slots):
    """Two worlds of three and two agents, whose own tokens are of different numbers: what `Step` takes but the lengths."""
    rng = np.random.default_rng(0)
    chunk = [World(rng.integers(1, 700, 21).tolist(), [0, 1, 2]), World(rng.integers(1, 700, 9).tolist(), [3, 4])]
    inputs = [rng.integers(1, 700, n).tolist() for n in (1, 5, 3, 2, 7)]
    world = np.array([0, 0, 0, 1, 1])
    prefixes, _, (cache_k, cache_v) = prefill(backbone, chunk, inputs, world, slots, lambda name: None)
    return np.array([len(row) for row in inputs]), (world, prefixes, cache_k, cache_v)


@pytest.mark.parametrize("model_type", ["qwen2", "mistral"])
@torch.no_grad()
def test_steps_that_move_on_are_the_steps_laid_out_anew(model_type, triton_device, monkeypatch):
    """Token after token, a replay's hidden states and caches are those of a `Step` made for each token; windows included."""
    monkeypatch.setitem(pretrain.WINDOWS, "mistral", 12)
    torch.manual_seed(0)
    backbone = Backbone(pretrain.config_for(model_type, SHAPE, SHAPE.vocab)).to(triton_device).eval()
    pretrain.initialise(backbone, torch.Generator(triton_device).manual_seed(0))
    lengths, anew = prefilled(backbone, 13)
    _, moved = prefilled(backbone, 13)
    replay = Replay(backbone, lengths + 1, *moved)
    for token in range(5):
        ids = torch.randint(1, 700, (5,), device=triton_device)
        expected = Step(backbone, lengths + token + 1, *anew)(ids)
        torch.testing.assert_close(replay(ids), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moved[2:], anew[2:], atol=1e-5, rtol=1e-5)
    assert (replay.graph is not None) == (triton_device == "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("options", [{"temperature": 0}, {"seeds": range(24)}, {"repetition_penalty": 1.3, "top_p": 0.9}])
def test_graphs_change_no_token(random_folder, options, monkeypatch):
    """Texts end at different steps, so batches are compacted, under one adapter and under several."""
    lm = LanguageModel.load(random_folder, "cuda", torch.float32)
    for seed, name in enumerate(("a", "b")):
        lm.add_adapter(name, targets="all-linear", seed=seed)
        for parameter in lm.adapters.parameters(name):
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator("cuda").manual_seed(seed))
    prompts = [f"What does {name} say of the dam?" * (1 + i % 3) for i, name in enumerate("abcdefgh" * 3)]
    worlds, adapters = [i % 3 for i in range(24)], [(None, "a", "b")[i % 3] for i in range(24)]
    replays, call = [], Replay.__call__
    monkeypatch.setattr(Replay, "__call__", lambda self, ids: replays.append(self) or call(self, ids))
    for some in (None, adapters):
        given = {"max_new_tokens": 40, "worlds": worlds, "adapters": some, "stop": ("e",), **options}
        lm.graphs = True
        graphs = lm.generate(prompts, **given)
        assert any(replay.graph is not None for replay in replays)
        lm.graphs = False
        count = len(replays)
        assert lm.generate(prompts, **given) == graphs and len(replays) == count
