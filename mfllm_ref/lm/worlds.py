"""Running a backbone over worlds of agents: each world's prefix once, the agents' own tokens on top of it.

Notable: rows of different lengths are packed end to end for the linear layers, which then waste nothing, and padded for
attention alone. All of this is differentiable; a prefix's keys and values carry the gradients of all its agents.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.agent_attention import Plan, agent_attention
from mfllm_ref.lm.backbone import Attend, Backbone, causal_attention

PACKED = (4096, 2048)  # tokens in one forward pass over packed rows: on a GPU, on a CPU (where activations of more leave the cache)
GRAINS, LONG = (16, 64), 1024  # a CPU's bfloat16 products have rows in multiples of the first; of the second if over LONG


@dataclass(frozen=True)
class World:
    """Agents (indices into the caller's list), the tokens their prompts begin with, and the adapter they speak under."""

    prefix: list[int]
    agents: list[int]
    adapter: str | None = None


@dataclass(frozen=True)
class Prefixes:
    """Per layer, keys and values [worlds, kv_heads, longest, head_dim]; lengths int32 [worlds], on the CPU.

    On a CPU, except in float32, keys lie in memory with head_dim before `longest`: products with a slice of them are then twice
    as fast."""

    k: list[Tensor]
    v: list[Tensor]
    lengths: Tensor

    @staticmethod
    def join(parts: list["Prefixes"]) -> "Prefixes":
        """Those of several chunks, one after another."""
        if len(parts) == 1:
            return parts[0]
        longest = max(part.k[0].shape[2] for part in parts)
        k, v = (
            [torch.cat([F.pad(x, (0, 0, 0, longest - x.shape[2])) for x in layer]) for layer in zip(*layers, strict=True)]
            for layers in ([part.k for part in parts], [part.v for part in parts])
        )
        return Prefixes(_laid(k), v, torch.cat([part.lengths for part in parts]))

    def keep(self, world: np.ndarray) -> tuple["Prefixes", np.ndarray]:
        """Without the worlds that `world` (of the remaining agents) no longer names, and `world` renumbered."""
        left, renumbered = np.unique(world, return_inverse=True)
        if len(left) == len(self.lengths):
            return self, world
        index = torch.from_numpy(left)
        there = index.to(self.k[0].device)
        longest = rounded(int(self.lengths[index].max()), self.k[0])
        k, v = ([x[there, :, :longest] for x in layers] for layers in (self.k, self.v))
        return Prefixes(_laid(k), v, self.lengths[index]), renumbered


def _laid(keys: list[Tensor]) -> list[Tensor]:
    """The same tensors, in memory as `Prefixes` has them."""
    return [k.mT.contiguous().mT if k.device.type == "cpu" and k.dtype != torch.float32 else k for k in keys]


class SharedAttention:
    """agent_attention with all that is the same in every layer; one index plan for each width of sliding window."""

    def __init__(
        self, backbone: Backbone, prefixes: Prefixes, lengths: np.ndarray, world: np.ndarray, q_len: int,
        suffix_max: int,
    ) -> None:  # fmt: skip
        self.windows, self.prefixes = backbone.config.windows, prefixes
        self.lengths, self.world = (torch.from_numpy(x.astype(np.int32)) for x in (lengths, world))
        self.plans = {
            window: Plan(
                backbone.config.heads, q_len, prefixes.lengths, prefixes.k[0].shape[2], self.lengths, suffix_max,
                self.world, window, prefixes.k[0].device, grain(prefixes.k[0].shape[2], prefixes.k[0]),
            )
            for window in set(self.windows)
        }  # fmt: skip

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shared, window = self.prefixes, self.windows[layer]
        return agent_attention(
            q, shared.k[layer], shared.v[layer], shared.lengths, k, v, self.lengths, self.world, window,
            plan=self.plans[window],
        )  # fmt: skip


def grain(count: int, weight: Tensor) -> int:
    """The multiple that about `count` rows or keys are rounded up to. On a CPU oneDNN compiles code for every shape of a bfloat16
    product that it has not seen (half a millisecond and over half a megabyte each), and rollouts have ever new lengths; elsewhere
    nothing is rounded (1)."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return 1
    return GRAINS[count > LONG]


def rounded(count: int, weight: Tensor) -> int:
    """`count` rounded up to a multiple of its `grain`."""
    multiple = grain(count, weight)
    return -(-count // multiple) * multiple


class Packing:
    """Rows of different lengths, packed end to end.

    `pad` lays packed [1, heads, tokens, d] out as [rows, heads, longest, d], by `left` (a row begins in the first slot)
    or `right` (it ends in the last), with some token's numbers in surplus slots. `pack` undoes it, by `from_left` or
    `from_right`. There are `total` packed tokens, `rounded` for a model with such a `weight`, as `longest` is; the surplus
    ones are the last.
    """

    def __init__(self, lengths: np.ndarray, device: torch.device, weight: Tensor | None = None) -> None:
        self.lengths, self.ends = lengths, np.cumsum(lengths)
        self.longest, self.total = (int(n) if weight is None else rounded(int(n), weight) for n in (lengths.max(), self.ends[-1]))
        sizes, slots = lengths[:, None], np.arange(self.longest)
        begins, blank = self.ends[:, None] - sizes, self.longest - sizes
        left = np.minimum(begins + np.minimum(slots, sizes - 1).clip(0), max(0, self.ends[-1] - 1))
        right = begins + np.maximum(slots - blank, 0)
        self.left, self.right = (torch.from_numpy(index).to(device) for index in (left, right))
        surplus = (0, self.total - int(self.ends[-1]))
        self.from_left, self.from_right = (
            torch.from_numpy(np.pad(np.flatnonzero(used), surplus)).to(device) for used in (slots < sizes, slots >= blank)
        )

    def pad(self, x: Tensor, index: Tensor) -> Tensor:
        return x[0].transpose(0, 1)[index].transpose(1, 2)

    def pack(self, x: Tensor, index: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)[index].transpose(0, 1)[None]


def _run(
    backbone: Backbone, rows: list[list[int]], packing: Packing, starts: np.ndarray, attend: Attend, wanted: np.ndarray
) -> Tensor:  # fmt: skip
    """Hidden states [wanted, dim] of packed rows whose first tokens stand at positions `starts`."""
    device = backbone.lm_head.weight.device
    ids = np.array([id for row in rows for id in row], dtype=np.int64)
    positions = np.arange(len(ids)) - np.repeat(packing.ends - packing.lengths - starts, packing.lengths)
    told, at = (torch.from_numpy(np.pad(x, (0, packing.total - len(x)))[None]).to(device) for x in (ids, positions))
    return backbone.hidden(told, at, attend, torch.from_numpy(wanted).to(device))[0]


def _batches(lengths: np.ndarray, device: torch.device) -> list[slice]:
    """Neighbouring rows, cut where a batch would pass PACKED tokens."""
    cuts, total, most = [0], 0, PACKED[device.type == "cpu"]
    for i, length in enumerate(lengths):
        if total + length > most and i > cuts[-1]:
            cuts.append(i)
            total = 0
        total += length
    return [slice(start, stop) for start, stop in zip(cuts, [*cuts[1:], len(lengths)], strict=True)]


def common_prefix(rows: list[list[int]]) -> list[int]:
    """The longest common prefix that leaves each row its last token. No two rows differ earlier than the first and the
    last in lexicographic order."""
    first, last = min(rows), max(rows)
    most = min(len(row) for row in rows) - 1
    return first[: next((i for i in range(most) if first[i] != last[i]), most)]


def members(chunk: Sequence[World]) -> list[int]:
    """A chunk's agents, in its order."""
    return [agent for world in chunk for agent in world.agents]


def cost(chunk: Sequence[World], ids: list[list[int]], extra: Sequence[int]) -> int:
    """Tokens that a chunk runs through the backbone, at most."""
    return sum(len(w.prefix) + sum(len(ids[a]) - len(w.prefix) + extra[a] for a in w.agents) for w in chunk)


def cut(
    ids: list[list[int]], extra: Sequence[int], keys: Sequence[tuple[str | None, Hashable]], tokens: int, most: int,
    rows: int | None,
) -> list[list[World]]:  # fmt: skip
    """Worlds (the agents of equal `keys`: adapter, world), by falling prefix length, in chunks of at most `tokens` cached
    tokens and `most` agents; in each chunk by adapter. A world too large for one chunk is split. rows: chunks hold at most
    about so many agents, about equally many; there are 1, 2, 4, ... of them (memory allowing), which processes share well."""
    worlds: dict[tuple[str | None, Hashable], list[int]] = {}
    for agent, key in enumerate(keys):
        worlds.setdefault(key, []).append(agent)
    even = most
    if rows is not None and len(ids) > 0:
        even = -(-len(ids) // 2 ** math.ceil(math.log2(-(-len(ids) // rows))))
    parts: list[tuple[World, int]] = []  # a world or a part of one, its longest suffix
    for (name, _), agents in worlds.items():
        agents.sort(key=lambda agent: len(ids[agent]))  # attention pads a batch to its longest
        prefix = common_prefix([ids[agent] for agent in agents])
        own = max(len(ids[agent]) - len(prefix) + extra[agent] for agent in agents)
        size = min(most, even, max(1, (tokens - len(prefix)) // own))
        parts += [(World(prefix, agents[i : i + size], name), own) for i in range(0, len(agents), size)]
    parts.sort(key=lambda part: -len(part[0].prefix))
    chunks: list[list[World]] = []
    count = longest = 0
    for world, own in parts:
        total, widest = count + len(world.agents), max(longest, own)
        shared = (len(chunks[-1]) + 1) * len(chunks[-1][0].prefix) if chunks else 0
        if chunks and count < even and total <= most and shared + total * widest <= tokens:
            chunks[-1].append(world)
            count, longest = total, widest
        else:
            chunks.append([world])
            count, longest = len(world.agents), own
    return [sorted(chunk, key=lambda world: (world.adapter is not None, world.adapter)) for chunk in chunks]


def run_prefixes(backbone: Backbone, chunk: list[World]) -> Prefixes:
    """Keys and values of each world's prefix, for every layer."""
    config, device = backbone.config, backbone.lm_head.weight.device
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(config.layers)]

    lengths = np.array([len(world.prefix) for world in chunk])
    longest = rounded(int(lengths.max()), backbone.lm_head.weight)
    for some in _batches(lengths, device):
        packing = Packing(lengths[some], device, backbone.lm_head.weight)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, packing: Packing = packing) -> Tensor:
            k, v = packing.pad(k, packing.left), packing.pad(v, packing.left)
            more = (0, 0, 0, longest - k.shape[2])
            parts[layer].append((F.pad(k, more), F.pad(v, more)))
            if q.shape[2] == 0:  # the last layer: nothing is asked of a prefix but its keys and values
                return q
            out = causal_attention(packing.pad(q, packing.left), k, v, config.windows[layer])
            return packing.pack(out, packing.from_left)

        rows = [world.prefix for world in chunk[some]]
        _run(backbone, rows, packing, np.zeros(len(rows), dtype=np.int64), attend, np.zeros(0, dtype=np.int64))
    k, v = ([torch.cat([part[i] for part in layer]) for layer in parts] for i in (0, 1))
    return Prefixes(_laid(k), v, torch.from_numpy(lengths.astype(np.int32)))


def run_suffixes(
    backbone: Backbone, inputs: list[list[int]], tails: np.ndarray, world: np.ndarray, prefixes: Prefixes,
    store: Callable[[int, slice, Tensor, Tensor], None] | None = None,
) -> Iterator[tuple[slice, Tensor]]:  # fmt: skip
    """Run the agents' own tokens `inputs` on top of their worlds' prefixes, a batch at a time: (which agents, final
    hidden states of the last `tails` tokens of each, packed: [sum of tails, dim]). world [agents], non-decreasing.
    store(layer, agents, k, v) is given each batch's keys and values, [agents, kv_heads, longest, head_dim]."""
    device, last = backbone.lm_head.weight.device, backbone.config.layers - 1
    starts = prefixes.lengths.numpy()[world].astype(np.int64)
    lengths = np.array([len(row) for row in inputs])
    for some in _batches(lengths, device):
        packing = Packing(lengths[some], device, backbone.lm_head.weight)
        tail = Packing(tails[some], device)
        of = world[some]
        near = slice(int(of[0]), int(of[-1]) + 1)
        local = Prefixes([k[near] for k in prefixes.k], [v[near] for v in prefixes.v], prefixes.lengths[near])
        whole, part = (
            SharedAttention(backbone, local, packing.lengths, of - of[0], queries.longest, packing.longest)
            for queries in (packing, tail)
        )

        def attend(
            layer: int, q: Tensor, k: Tensor, v: Tensor, some: slice = some, keys: Packing = packing,
            tail: Packing = tail, whole: SharedAttention = whole, part: SharedAttention = part,
        ) -> Tensor:  # fmt: skip
            k, v = keys.pad(k, keys.left), keys.pad(v, keys.left)
            if store is not None:
                store(layer, some, k, v)
            queries, attention = (tail, part) if layer == last else (keys, whole)
            return queries.pack(attention(layer, queries.pad(q, queries.right), k, v), queries.from_right)

        wanted = np.repeat(packing.ends - tail.ends, tail.lengths) + np.arange(tail.ends[-1])
        yield some, _run(backbone, inputs[some], packing, starts[some], attend, wanted)


def prefill(
    backbone: Backbone, chunk: list[World], inputs: list[list[int]], world: np.ndarray, slots: int,
    enter: Callable[[str | None], None],
) -> tuple[Prefixes, Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """Run all prompts of a chunk, the worlds of each adapter (neighbours in the chunk) after `enter(adapter)`: (prefixes,
    final hidden states of the last tokens [agents, dim], caches as `Step` takes them, with so many slots)."""
    config, weight = backbone.config, backbone.lm_head.weight
    shape = (2, config.layers, len(inputs), config.kv_heads, rounded(int(slots), weight), config.head_dim)
    caches = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
    ones = np.ones(len(inputs), dtype=np.int64)
    parts, hidden = [], []
    for adapter, group in groupby(range(len(chunk)), lambda w: chunk[w].adapter):
        first, *others = group
        rows = slice(*np.searchsorted(world, (first, first + 1 + len(others))))

        def store(layer: int, some: slice, k: Tensor, v: Tensor, rows: slice = rows) -> None:
            for cache, new in zip(caches[:, layer, rows], (k, v), strict=True):
                cache[some, :, : new.shape[2]] = new

        enter(adapter)
        parts.append(run_prefixes(backbone, chunk[first : first + 1 + len(others)]))
        batches = run_suffixes(backbone, inputs[rows], ones[rows], world[rows] - first, parts[-1], store)
        hidden += [states for _, states in batches]
    return Prefixes.join(parts), torch.cat(hidden), (caches[0], caches[1])


class Step:
    """Feeds one token to every agent: what a decode step needs beside the backbone. Caches [layers, agents, kv_heads, slots,
    head_dim] are written in place; world [agents], non-decreasing.

    lengths: of the agents' suffixes, this token included. planned: longer ones that attention is laid out for instead, where Triton
    reads the true lengths from a tensor that `advance` moves on.
    """

    def __init__(
        self, backbone: Backbone, lengths: np.ndarray, world: np.ndarray, prefixes: Prefixes, cache_k: Tensor,
        cache_v: Tensor, planned: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        _, agents, kv_heads, slots, self.head_dim = cache_k.shape
        self.backbone, self.caches, device = backbone, (cache_k, cache_v), cache_k.device
        # All slots, also the unused ones: products of whole tensors are up to 7 times as fast as those of slices.
        self.attention = SharedAttention(backbone, prefixes, lengths if planned is None else planned, world, 1, slots)
        row = np.arange(agents * kv_heads).reshape(agents, -1) * slots + lengths[:, None] - 1  # in [.., head_dim]
        self.row = torch.from_numpy(row.ravel()).to(device)
        self.positions = torch.from_numpy(prefixes.lengths.numpy()[world] + lengths - 1).to(device)[:, None]
        if planned is not None:
            for plan in self.attention.plans.values():
                plan.lengths[1].copy_(torch.from_numpy(lengths))

    def __call__(self, ids: Tensor) -> Tensor:
        """ids int64 [agents] -> hidden [agents, dim]."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for cache, new in zip(self.caches, (k, v), strict=True):
                cache[layer].view(-1, self.head_dim).index_copy_(0, self.row, new.reshape(-1, self.head_dim))
            return self.attention(layer, q, *(cache[layer] for cache in self.caches))

        return self.backbone.hidden(ids[:, None], self.positions, attend)[:, 0]

    def advance(self) -> None:
        """On to the next token, where Triton computes attention: nothing but additions to tensors that stay where they are."""
        for tensor in (self.row, self.positions, *(plan.lengths[1] for plan in self.attention.plans.values())):
            tensor.add_(1)
