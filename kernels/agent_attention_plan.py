"""What `agent_attention` derives from lengths alone: how to go through worlds and agents, masks, tables of blocks.

A model with many layers makes a `Plan` once for all of them. Nothing here touches queries, keys or values.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

WORLDS = 1024  # looked at together, as looking at all that are left each time is quadratic


@dataclass(frozen=True)
class Piece:
    """A run of worlds and agents computed together, each world with `width` slots for agents."""

    agents: slice
    worlds: slice
    width: int
    prefix: int  # keys in the longest of its prefixes
    slots: Tensor | None  # int64 [worlds * width]: which agent (counted in the piece) fills a slot; None: all in order
    back: Tensor | None  # int64 [agents]: the slot of each agent
    mask: Tensor | None  # 0, -inf on keys not seen: broadcasts to [worlds, kv_heads, width, group, q_len, prefix]


class Plan:
    """What `agent_attention` derives from lengths alone. Valid for every layer with the same window.

    heads, q_len and suffix_max are q's and suffix_k's sizes; the rest are agent_attention's own arguments. The tensors
    may live on any device. What PyTorch (`pieces`, masks) or Triton (tables, `lengths`) needs is made on `device` when it
    is first asked for. grain: PyTorch's products read a multiple of so many keys of a prefix (at most as many as there are
    slots), so that fewer shapes of them occur. Raises ValueError for lengths that cannot be.
    """

    def __init__(
        self, heads: int, q_len: int, prefix_len: Tensor, prefix_max: int, suffix_len: Tensor, suffix_max: int,
        world: Tensor, window: int | None = None, device: torch.device | str = "cpu", grain: int = 1,
    ) -> None:  # fmt: skip
        for name, given in (("prefix_len", prefix_len), ("suffix_len", suffix_len), ("world", world)):
            if given.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"{name} must hold int32 or int64, not {given.dtype}")
        prefix, own, of = (x.detach().cpu().numpy().astype(np.int64) for x in (prefix_len, suffix_len, world))
        if len(own) != len(of) or (of[1:] < of[:-1]).any() or (len(of) and not 0 <= of[0] <= of[-1] < len(prefix)):
            raise ValueError("world must hold one non-decreasing index into the prefixes for every agent")
        for name, lengths, most in (("prefix_len", prefix, prefix_max), ("suffix_len", own, suffix_max)):
            if len(lengths) and not 0 <= lengths.min() <= lengths.max() <= most:
                raise ValueError(f"{name} must lie between 0 and {most}, the slots there are")
        for name, given in (("window", window), ("grain", grain)):
            if given is not None and (not isinstance(given, int | np.integer) or isinstance(given, bool) or given < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, not {given}")
        self.reach = int(prefix.max(initial=0) + own.max(initial=0))
        self.shape, self.device, self.suffix_max = (len(of), heads, q_len), torch.device(device), suffix_max
        self.window = self.hiding(window)
        self.prefix, self.own, self.of, self.prefix_max, self.grain = prefix, own, of, prefix_max, grain
        self.row = own[:, None] - q_len + np.arange(q_len)  # suffix position of each query row
        self.counts = np.bincount(of, minlength=len(prefix))
        self._tables: dict[tuple[bool, int, int, bool], Tensor] = {}
        self._pieces: dict[int, list[Piece]] = {}

    def hiding(self, window: int | None) -> int | None:
        """The same window; None if it is wide enough to hide nothing."""
        return None if window is None or window >= self.reach else window

    def check(self, q: Tensor, prefix_k: Tensor, suffix_k: Tensor, window: int | None) -> None:
        """Raises ValueError where these are not what it was made for."""
        made = self.shape, len(self.prefix), self.prefix_max, self.suffix_max, self.window
        agents, heads, q_len, _ = q.shape
        asked = (agents, heads, q_len), prefix_k.shape[0], prefix_k.shape[2], suffix_k.shape[2], self.hiding(window)
        if made != asked:
            named = "(agents, heads, query rows), worlds, prefix slots, suffix slots and window"
            raise ValueError(f"the plan is for {made} {named}, not {asked}")
        if self.device.type != q.device.type or self.device.index not in (None, q.device.index):
            raise ValueError(f"the plan is for {self.device}, not {q.device}")

    @cached_property
    def sees_prefixes(self) -> bool:
        """Whether every row sees all of its world's prefix, which is not empty."""
        return self.window is None and bool((self.prefix > 0).all())

    @cached_property
    def padding(self) -> Tensor | None:
        row = self.row < 0
        return self._put(row[:, None, :, None]) if row.any() else None

    @cached_property
    def suffix_mask(self) -> Tensor | None:
        # A padding row sees its first slot, so that no softmax is over nothing; its result is thrown away.
        last, key = np.maximum(self.row, 0)[:, :, None], np.arange(self.suffix_max)
        hidden = key > last
        if self.window is not None:
            hidden |= key <= last - self.window
        return self._mask(hidden[:, None, None])

    def pieces(self, cells: int) -> list[Piece]:
        """How to go through worlds and agents with at most `cells` scores at once."""
        if cells not in self._pieces:
            runs = _runs(self.counts, self.prefix, self.shape[1] * self.shape[2], self.suffix_max, cells)
            self._pieces[cells] = [self._piece(*run) for run in runs]
        return self._pieces[cells]

    @cached_property
    def lengths(self) -> tuple[Tensor, ...]:
        """int32 [worlds], [agents], [agents]: prefix and suffix lengths, and every agent's world."""
        return tuple(self._put(x.astype(np.int32)) for x in (self.prefix, self.own, self.of))

    def row_blocks(self, prefix: bool, rows: int, size: int) -> Tensor:
        """int32 [blocks, 4]: an owner of keys (of prefixes a world, else an agent), its first agent, its query rows, and the
        first row of a block of `size` of them, where every agent has `rows`. An owner's last block may be ragged; one without
        agents or keys has none."""
        return self._table(prefix, rows, size, along_keys=False)

    def key_tiles(self, prefix: bool, rows: int, size: int) -> Tensor:
        """The same along the owner's keys: the last number is the first key of a tile of `size`."""
        return self._table(prefix, rows, size, along_keys=True)

    def _table(self, prefix: bool, rows: int, size: int, along_keys: bool) -> Tensor:
        if (prefix, rows, size, along_keys) in self._tables:
            return self._tables[prefix, rows, size, along_keys]
        agents = self.counts if prefix else np.ones_like(self.own)
        keys, total = (self.prefix if prefix else self.own), agents * rows
        number = -(-np.where((keys > 0) & (total > 0), keys if along_keys else total, 0) // size)
        owner = np.repeat(np.arange(len(keys)), number)
        start = (np.arange(len(owner)) - np.repeat(np.cumsum(number) - number, number)) * size
        table = np.stack((owner, (np.cumsum(agents) - agents)[owner], total[owner], start), axis=1)
        return self._tables.setdefault((prefix, rows, size, along_keys), self._put(table.astype(np.int32)))

    def _mask(self, hidden: np.ndarray) -> Tensor | None:
        """What to add to scores, float32: -inf where hidden. None if nothing is."""
        return self._put(np.where(hidden, np.float32(-np.inf), np.float32(0))) if hidden.any() else None

    def _put(self, array: np.ndarray) -> Tensor:
        with torch.inference_mode(False):  # a later call may need gradients
            return torch.from_numpy(array).to(self.device)

    def _piece(self, worlds: slice, agents: slice) -> Piece:
        alone = worlds.stop == worlds.start + 1  # perhaps a part of it
        sizes = np.array([agents.stop - agents.start]) if alone else self.counts[worlds]
        lengths, width = self.prefix[worlds], int(sizes.max())
        longest = min(self.prefix_max, -(-int(lengths.max()) // self.grain) * self.grain)
        slots = back = None
        agent = np.minimum((np.cumsum(sizes) - sizes)[:, None] + np.arange(width), sizes.sum() - 1).ravel()
        if (sizes != width).any():
            back = self._put(np.flatnonzero((np.arange(width) < sizes[:, None]).ravel()))
            slots = self._put(agent)
        key = np.arange(longest)
        hidden = (key >= lengths[:, None])[:, None, None, None, None]
        if self.window is not None:
            first = self.prefix[self.of[agents]][:, None] + self.row[agents] - self.window + 1  # key that each row sees
            if (first > 0).any():
                hidden = hidden | (key < first[agent].reshape(len(sizes), 1, width, 1, -1, 1))
        return Piece(agents, worlds, width, longest, slots, back, self._mask(hidden))


def _runs(counts: np.ndarray, prefix: np.ndarray, rows: int, suffix: int, cells: int) -> Iterator[tuple[slice, slice]]:
    """Neighbouring worlds to compute together, and their agents; of a world that is too much by itself some agents at a time.
    A run is cut where its scores would pass `cells` or where over half of its slots would stay empty."""
    start, worlds, ends = 0, len(counts), np.cumsum(counts)
    while start < worlds:
        first, end = int(ends[start] - counts[start]), int(ends[start])
        limit = max(1, cells // max(1, rows * (int(prefix[start]) + suffix)))
        if counts[start] > limit:
            for i in range(first, end, limit):
                yield slice(start, start + 1), slice(i, min(i + limit, end))
            start += 1
            continue
        next_counts, next_prefix = counts[start : start + WORLDS], prefix[start : start + WORLDS]
        slots = np.arange(1, len(next_counts) + 1) * np.maximum.accumulate(next_counts)
        scores = slots * rows * (np.maximum.accumulate(next_prefix) + suffix)
        fits = (scores <= cells) & (slots <= 2 * np.cumsum(next_counts))
        stop = start + max(1, int(np.argmin(np.append(fits, False))))
        if counts[start:stop].any():
            yield slice(start, stop), slice(first, int(ends[stop - 1]))
        start = stop
