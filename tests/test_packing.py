from functools import partial

import pytest
import torch

from mfllm_ref import pretrain
from mfllm_ref.lm import LanguageModel
from mfllm_ref.lm.backbone import Backbone
from mfllm_ref.packing import batches, collate
from mfllm_ref.society import agora
from mfllm_ref.society.annotate import RuleAnnotator
from mfllm_ref.society.corpus import Corpus, Document, Mixture

DOCUMENTS = [
    ("empirical", Document("A topic.\nPopulation: 43%\n", (("User: a\nPost:\n", "I agree."), ("Post:\n", ""), ("Post:\n", "No!")))),
    ("mean-field", Document("A longer topic than that.\nSummary:\n", (("", "stance: support 43%"),))),
]  # fmt: skip


@pytest.mark.parametrize("model_type", ["qwen2", "mistral"])
def test_the_block_mask_gives_every_branch_its_own_prompt(random_lm, monkeypatch, model_type):
    """The loss of packed branches is the sum of what each would have alone behind the prefix: log_prob's own value. A sliding
    window counts positions, not places in the row."""
    monkeypatch.setitem(pretrain.WINDOWS, "mistral", 5)
    shape = pretrain.Shape(32, 2, 4, 2, 48, 0)
    lm = LanguageModel(Backbone(pretrain.config_for(model_type, shape, random_lm.tokenizer.vocab_size)), random_lm.tokenizer)
    pretrain.initialise(lm.backbone, torch.Generator().manual_seed(0))
    batch = collate(DOCUMENTS, lm.tokenizer, end=0, length=256)
    sums, counts = pretrain.loss_sums(lm.backbone, batch)
    lm.backbone.double()
    for (_, document), nll, count in zip(DOCUMENTS, sums, counts, strict=True):
        prefix = lm.tokenizer.encode(document.prefix)
        prompts = [prefix + lm.tokenizer.encode(private) for private, _ in document.branches]
        targets = [lm.tokenizer.encode(target) for _, target in document.branches]
        expected = -lm.log_prob(prompts, targets, end_of_text=True).sum()
        assert nll.item() == pytest.approx(expected.item(), abs=1e-4)
        assert count == sum(len(target) + 1 for target in targets)


def test_collate_fills_rows_and_never_drops_the_first_branch(random_lm):
    many = Document("prefix\n", tuple(("Post:\n", f"text {i}") for i in range(40)))
    long = Document("word " * 50, (("Post:\n", "yes"), ("Post:\n", "no" * 200)))
    batch = collate([("none", many), ("none", long)], random_lm.tokenizer, end=0, length=32)
    assert batch.ids.shape == batch.targets.shape and batch.ids.shape[1] % 16 == 0
    needed = len(random_lm.tokenizer.encode("word " * 50 + "")) + len(random_lm.tokenizer.encode("Post:\n")) + 3
    assert abs(batch.ids.shape[1] - needed) < 20
    assert batch.segments[1].max() == 1 and 1 < batch.segments[0].max() < 40
    assert ((batch.targets == -100) | (batch.segments >= 0)).all()


def test_batches_are_a_function_of_seed_and_step_whoever_draws_them(random_lm):
    """Processes that begin in the middle draw what one that began at the start would have drawn."""
    corpus = Corpus(3, RuleAnnotator(), 10, Mixture(), partial(agora.event, "train"))
    whole, rest, other = (
        list(batches(corpus, random_lm.tokenizer, 2, seed, range(start, 6), workers))
        for seed, start, workers in ((0, 0, 0), (0, 2, 2), (1, 2, 0))
    )
    assert len(whole) == 6 and len(rest) == 4
    for one, two, three in zip(whole[2:], rest, other, strict=True):
        assert one.sorts == two.sorts
        for name in ("ids", "positions", "segments", "targets"):
            assert torch.equal(getattr(one, name), getattr(two, name))
        assert not torch.equal(one.ids, three.ids)
