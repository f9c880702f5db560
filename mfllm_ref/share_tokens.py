"""Embeddings of the tokens that are a label and its share (` oppose 45%`), while a backbone is pretrained.

Each is the sum of a place of its label and a place of its percentage, which all tokens of that label or that percentage
share: what a gradient teaches of one token holds for hundreds, though each is rare. Learned one by one, the rare ones never
became certain of their label, and one sampled summary in ten went on with a wrong one and lost a dimension or more.
"""

import re

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mfllm_ref.lm.backbone import Backbone
from mfllm_ref.lm.tokenizer import Tokenizer

SHARE = re.compile(r"(.*[^\W\d]) ?(\d{2,3})%", re.DOTALL)  # such a token: its label, with any heading, and its percentage
WAVES = 4.0, 64.0  # percentage points: the shortest and the longest wave of a first place


class ShareTokens(nn.Module):
    """Replaces the rows of such tokens in an embedding [vocab, dim] by `labels` [labels, dim] + `places` [101, dim].

    Labels begin normal, places as random cosines of the percentage whose lengths run over WAVES, so that neighbours begin
    alike; both with half of the variance `std`**2.
    """

    ids: Tensor  # of share tokens; of each, the place of its label and its percentage
    label: Tensor
    percent: Tensor

    def __init__(self, tokenizer: Tokenizer, dim: int, std: float, generator: torch.Generator) -> None:
        super().__init__()
        found = {id: match for id in range(tokenizer.vocab_size) if (match := SHARE.fullmatch(tokenizer.decode([id])))}
        names = sorted({match[1] for match in found.values()})
        self.register_buffer("ids", torch.tensor(list(found), dtype=torch.long))
        self.register_buffer("label", torch.tensor([names.index(match[1]) for match in found.values()], dtype=torch.long))
        self.register_buffer("percent", torch.tensor([int(match[2]) for match in found.values()], dtype=torch.long))
        shortest, longest = WAVES
        length, phase = torch.rand(2, dim, generator=generator)
        waves = torch.randn(dim, generator=generator) / (shortest * (longest / shortest) ** length)
        angles = torch.arange(101)[:, None] * waves + 2 * torch.pi * phase
        self.places = nn.Parameter(std * torch.cos(angles))
        self.labels = nn.Parameter(std * 0.5**0.5 * torch.randn(len(names), dim, generator=generator))

    @torch.no_grad()
    def fit(self, weight: Tensor) -> None:
        """Go on from an embedding [vocab, dim] whose rows of such tokens are sums already, up to rounding: least squares."""
        labels, rows = len(self.labels), torch.arange(len(self.ids))
        design = torch.zeros(len(self.ids), labels + 101, dtype=torch.float64)
        design[rows, self.label] = design[rows, labels + self.percent] = 1.0
        found = (torch.linalg.pinv(design) @ weight[self.ids].double()).float()
        self.labels.copy_(found[:labels])
        self.places.copy_(found[labels:])

    def forward(self, weight: Tensor) -> Tensor:
        return weight.index_copy(0, self.ids, self.labels[self.label] + self.places[self.percent])


def share_embeddings(backbone: Backbone, tokens: ShareTokens) -> None:
    """Let the embedding of `backbone`, and the head tied to it, take the rows of share tokens from `tokens` from now on."""
    for module in (backbone.model.embed_tokens, backbone.lm_head):
        parametrize.register_parametrization(module, "weight", tokens)


def settle_embeddings(backbone: Backbone) -> None:
    """End `share_embeddings`: the rows stay as they are now, in an ordinary tied weight."""
    weight = backbone.model.embed_tokens.weight.detach()
    for module in (backbone.model.embed_tokens, backbone.lm_head):
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    with torch.no_grad():
        backbone.model.embed_tokens.weight.copy_(weight)  # the head's too: they were tied before and are again
