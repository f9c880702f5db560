"""Documents as rows of tokens: one prefix and as many of its branches as fit, behind a mask that keeps branches apart.

All branches of a document share one prefix, computed once: a block mask lets a branch's tokens see the prefix and themselves,
and positions restart behind the prefix.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mfllm_ref.lm.tokenizer import Tokenizer
from mfllm_ref.society.corpus import Corpus, Document


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of tokens. `sorts` and `events` say what each row's document is, and of which event. `segments`: 0 the prefix,
    1, 2, ... the branches, -1 padding; `targets` are -100 where nothing is learned: all int64 [rows, time]."""

    sorts: list[str]
    events: list[str]
    ids: Tensor
    positions: Tensor
    segments: Tensor
    targets: Tensor

    def rows(self, some: slice, device: torch.device) -> "Batch":
        """Some of the rows, on `device`."""
        columns = (self.ids, self.positions, self.segments, self.targets)
        return Batch(self.sorts[some], self.events[some], *(column[some].to(device) for column in columns))


def collate(
    documents: Sequence[tuple[str, Document]], tokenizer: Tokenizer, end: int, length: int = 512, multiple: int = 16
) -> Batch:
    """Tokens of `documents`, one row each, with as many of each document's branches as fit.

    Rows are `length` tokens long, or as long as the longest prefix with one branch needs, rounded up to `multiple`.
    """
    texts = dict.fromkeys(t for _, d in documents for t in (d.prefix, *(p for branch in d.branches for p in branch)))
    encoded = dict(zip(texts, tokenizer.encode_batch(list(texts)), strict=True))
    rows = []
    needed = (sum(len(encoded[t]) for t in (d.prefix, *d.branches[0])) + 1 for _, d in documents)
    length = -(-max(length, *needed) // multiple) * multiple
    for _, document in documents:
        prefix = encoded[document.prefix]
        ids, targets, segments, positions = list(prefix), [-100] * len(prefix), [0] * len(prefix), [*range(len(prefix))]
        for number, (private, target) in enumerate(document.branches, start=1):
            prompt, answer = encoded[private], [*encoded[target], end]
            if number > 1 and len(ids) + len(prompt) + len(answer) > length:
                break
            if prompt:  # the prompt's last token predicts the answer's first
                learned = [-100] * (len(prompt) - 1) + answer
            else:  # a lone branch with no prompt of its own: the prefix's last token does
                targets[-1], learned = answer[0], answer[1:]
            ids += prompt + answer[:-1]
            targets += learned
            segments += [number] * len(learned)
            positions += range(len(prefix), len(prefix) + len(learned))
        rows.append((ids, positions, segments, targets))
    fills = (end, 0, -1, -100)
    columns = (torch.tensor([row[c] + [fills[c]] * (length - len(row[c])) for row in rows]) for c in range(4))
    return Batch([sort for sort, _ in documents], [document.event for _, document in documents], *columns)


def block_mask(batch: Batch, window: int | None, dtype: torch.dtype) -> Tensor:
    """[rows, 1, time, time]: 0 where row i may look at j, else -inf. j is not after i, in the prefix or in i's branch, and with a
    window fewer than `window` positions back."""
    segments, positions = batch.segments, batch.positions
    own = segments[:, :, None] == segments[:, None, :]  # padding sees padding, so that no row of the softmax is empty
    visible = (own | (segments[:, None, :] == 0)).tril()
    if window is not None:
        visible &= positions[:, :, None] - positions[:, None, :] < window
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)[:, None]


class _Batches(Dataset):
    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, rows: int, seed: int) -> None:
        self.corpus, self.tokenizer, self.rows, self.seed = corpus, tokenizer, rows, seed

    def __getitem__(self, step: int) -> Batch:
        rng = np.random.default_rng([self.seed, 1, step])
        return collate([self.corpus.draw(rng) for _ in range(self.rows)], self.tokenizer, end=0)


def _alone(worker: int) -> None:
    # Such processes run side by side: a tokenizer's own threads would only stand in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def batches(
    corpus: Corpus, tokenizer: Tokenizer, rows: int, seed: int, steps: range, workers: int
) -> Iterable[Batch]:  # fmt: skip
    """The batches of `steps`, `rows` documents each; each is a pure function of (seed, step). `workers` processes draw them ahead;
    with 0 this one does, when they are asked for."""
    data = _Batches(corpus, tokenizer, rows, seed)
    return DataLoader(data, None, sampler=steps, num_workers=workers, worker_init_fn=_alone)
