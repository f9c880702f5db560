"""Tokens that are a label and its share have one place for the label and one for the percentage, while a backbone is trained."""

from pathlib import Path

import pytest
import torch

from mfllm_ref import pretrain
from mfllm_ref.lm.backbone import Backbone
from mfllm_ref.lm.tokenizer import Tokenizer
from mfllm_ref.share_tokens import ShareTokens, settle_embeddings, share_embeddings


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(Path(__file__).resolve().parents[1] / "checkpoints" / "tiny")


def shared(tokenizer: Tokenizer, seed: int = 1) -> tuple[Backbone, ShareTokens]:
    shape = pretrain.Shape(dim=64, layers=1, heads=2, kv_heads=1, intermediate=16, vocab=tokenizer.vocab_size)
    backbone = Backbone(pretrain.config_for("qwen2", shape, tokenizer.vocab_size))
    pretrain.initialise(backbone, torch.Generator().manual_seed(0))
    tokens = ShareTokens(tokenizer, shape.dim, pretrain.EMBEDDING, torch.Generator().manual_seed(seed))
    share_embeddings(backbone, tokens)
    return backbone, tokens


def ids_by_text(tokenizer: Tokenizer) -> dict[str, int]:
    return {tokenizer.decode([id]): id for id in range(tokenizer.vocab_size)}


def test_a_share_token_begins_near_those_of_its_label_and_of_its_percentage(tokenizer):
    """Of ` oppose 40%`: nearer to ` oppose 50%` than to ` oppose 90%`, and to ` neutral 50%` than to ` neutral 90%`; all are as long
    as any token; the same seed gives the same places."""
    (backbone, _), (again, _) = shared(tokenizer), shared(tokenizer)
    weight, one = backbone.model.embed_tokens.weight, ids_by_text(tokenizer)
    assert torch.equal(weight, again.model.embed_tokens.weight)

    def near(a: str, b: str) -> float:
        return torch.nn.functional.cosine_similarity(weight[one[a]], weight[one[b]], dim=0).item()

    assert near(" oppose 40%", " oppose 50%") > 0.8 > near(" oppose 40%", " oppose 90%")
    assert near(" oppose 40%", " neutral 50%") > near(" oppose 40%", " neutral 90%") + 0.1
    shares = [id for text, id in one.items() if text.endswith("0%") and len(text) > 4]
    assert len(shares) > 100 and weight[shares].std().item() == pytest.approx(pretrain.EMBEDDING, rel=0.1)


def test_only_share_tokens_are_shared_and_input_and_head_see_the_same(tokenizer):
    """A label with its share is its label's place plus its percentage's, a heading before it making another label; every other
    token keeps a row of its own; the head's rows are the embedding's."""
    backbone, tokens = shared(tokenizer)
    weight, own = backbone.model.embed_tokens.weight, backbone.model.embed_tokens.parametrizations.weight.original
    one, shares = ids_by_text(tokenizer), set(tokens.ids.tolist())
    assert {one[" oppose 40%"], one["; stance: support 40%"]} <= shares and one[" post"] not in shares and 0 not in shares
    plain = [id for id in range(tokenizer.vocab_size) if id not in shares]
    assert torch.equal(weight[plain], own[plain]) and torch.equal(backbone.lm_head.weight, weight)
    difference = weight[one[" oppose 40%"]] - weight[one[" oppose 90%"]]
    torch.testing.assert_close(difference, tokens.places[40] - tokens.places[90])
    torch.testing.assert_close(weight[one[" neutral 40%"]] - weight[one[" neutral 90%"]], difference)


def test_what_one_share_token_learns_its_neighbours_know(tokenizer):
    """A step that makes ` oppose 40%` likelier moves ` oppose 90%` and ` neutral 40%` too, and no token without a share of it."""
    backbone, tokens = shared(tokenizer)
    one, before = ids_by_text(tokenizer), backbone.model.embed_tokens.weight.detach().clone()
    backbone.model.embed_tokens.weight[one[" oppose 40%"]].sum().backward()
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad
    moved = (backbone.model.embed_tokens.weight - before).abs().sum(1) > 0
    texts = {text for text, id in one.items() if moved[id]}
    assert {" oppose 40%", " oppose 90%", " neutral 40%"} <= texts and " neutral 90%" not in texts
    assert all(text.startswith(" oppose") or text.endswith("40%") for text in texts)


def test_sums_that_were_settled_are_found_again(tokenizer):
    """Pretraining can go on from a finished backbone: its rows are the same sums, and a place is still shared."""
    backbone, _ = shared(tokenizer)
    weight = backbone.model.embed_tokens.weight.detach().clone()
    settle_embeddings(backbone)
    again = ShareTokens(tokenizer, 64, pretrain.EMBEDDING, torch.Generator().manual_seed(2))
    again.fit(weight)
    torch.testing.assert_close(again(weight), weight, atol=1e-6, rtol=0)
    with torch.no_grad():
        again.places[40] += 1.0
    moved, one = (again(weight) - weight).abs().sum(1) > 1e-3, ids_by_text(tokenizer)
    assert moved[one[" oppose 40%"]] and not moved[one[" oppose 42%"]] and not moved[one[" post"]]


def test_settled_the_backbone_is_the_same_and_ordinary(tokenizer):
    """Afterwards the logits are the same bits, the head is the embedding's own weight, and the names are a checkpoint's."""
    backbone, _ = shared(tokenizer)
    ids = torch.arange(0, tokenizer.vocab_size, 7)[None]
    expected = backbone(ids)
    settle_embeddings(backbone)
    assert torch.equal(backbone(ids), expected) and backbone.lm_head.weight is backbone.model.embed_tokens.weight
    config = backbone.config
    assert [name for name, _ in backbone.named_parameters()] == [name for name, _ in Backbone(config).named_parameters()]
