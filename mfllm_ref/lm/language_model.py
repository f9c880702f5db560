"""LanguageModel: text in, text or log-probabilities out. Above this file nobody touches logits.

Notable:
- Prompts of one world begin alike (topic, posts, signal). Their longest common token prefix is run through the backbone
  once, and every agent of the world attends to it (kernels.agent_attention). Each prompt keeps its last token outside.
- Decoding runs agents of many worlds in one batch, one token a step. Rows of finished agents are dropped as soon as they are
  over an eighth of the batch, or half of it on a GPU, where steps are replayed as a CUDA graph (`graphs`).
- Work is cut into chunks that bound memory. The cut depends on lengths and options only, never on the machine or on how
  many processes share the chunks (`ranks`).
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from kernels import IBTerms, ib_loss
from mfllm_ref import ranks
from mfllm_ref.errors import InputError
from mfllm_ref.lm.backbone import Backbone
from mfllm_ref.lm.checkpoint import load_backbone, shard
from mfllm_ref.lm.graphs import Replay, replayable
from mfllm_ref.lm.lora import Adapters
from mfllm_ref.lm.sampling import check_finite, hash_seeds, penalise, sample, square, uniforms
from mfllm_ref.lm.tokenizer import Tokenizer
from mfllm_ref.lm.worlds import Step, World, cost, cut, members, prefill, rounded, run_prefixes, run_suffixes

CACHE_BYTES = 2**30  # keys and values held by one chunk
LOGITS = 2**24  # logits held at once
GROWTH = 16  # slots by which a full cache grows: most agents end long before max_new_tokens
ROWS = (2048, 256)  # about the most agents in a chunk that processes may share: on a GPU, on a CPU (where more gain little)
DEAD = (1 / 2, 1 / 8)  # share of finished rows above which a batch is compacted: with CUDA graphs (compacting ends one), without

Prompt = str | Sequence[int]


class LanguageModel:
    """A backbone, its tokenizer and its adapters. Two verbs, `generate` and `log_prob`; `backbone(ids)` gives logits.

    Prompts are text, encoded with BOS in front where the checkpoint's tokenizer puts one, or token ids (from
    `tokenizer.chat`), taken as they are. `worlds` holds one hashable key (an int) per prompt: prompts of one world
    share their common prefix; it never changes a result beyond rounding. In float64 no token depends on the batch.
    """

    def __init__(self, backbone: Backbone, tokenizer: Tokenizer) -> None:
        self.backbone, self.tokenizer = backbone.eval(), tokenizer
        self.adapters = Adapters(backbone)
        self.graphs = True  # decode by CUDA graphs on a GPU; False launches every kernel by itself

    @classmethod
    def load(
        cls, path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
        spread: bool = False,
    ) -> "LanguageModel":  # fmt: skip
        """The model in a Hugging Face style folder: config.json, *.safetensors, tokenizer.json or tokenizer.model. `spread`:
        over all processes (`checkpoint.shard`), by way of the CPU's memory.
        Raises InputError naming the file that is missing, damaged or unsupported."""
        backbone = shard(load_backbone(path, "cpu", dtype), device) if spread else load_backbone(path, device, dtype)
        return cls(backbone, Tokenizer.load(Path(path)))

    @property
    def device(self) -> torch.device:
        return self.backbone.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.model.embed_tokens.weight.dtype

    def add_adapter(
        self, name: str, rank: int = 8, alpha: float = 16.0, targets: Sequence[str] | str = ("q_proj", "v_proj"),
        seed: int | None = None, **options: Any,
    ) -> None:  # fmt: skip
        """A new trainable LoRA adapter, which changes nothing yet; see `lora.Adapters.add`."""
        self.adapters.add(name, rank, alpha, targets, seed, **options)

    def load_adapter(self, name: str, path: str | Path, trainable: bool = False) -> None:
        """An adapter from a PEFT folder, see `lora.Adapters.load`. Raises InputError if it is damaged or does not fit."""
        self.adapters.load(name, path, trainable)

    def save_adapter(self, name: str, path: str | Path) -> None:
        """Write an adapter as a PEFT folder."""
        self.adapters.save(name, path)

    @contextmanager
    def adapter(self, name: str | None) -> Iterator[None]:
        """Within the context the model is the backbone with adapter `name` (None: the bare backbone)."""
        before = self.adapters.active
        self.adapters.activate(name)
        try:
            yield
        finally:
            self.adapters.activate(before)

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int = 64, temperature: float = 1.0, top_k: int = 0,
        top_p: float = 1.0, repetition_penalty: float = 1.0, seeds: Sequence[int] | None = None,
        stop: Sequence[str] = (), worlds: Sequence[Hashable] | None = None,
        adapters: Sequence[str | None] | None = None,
    ) -> list[str]:  # fmt: skip
        """A continuation of each prompt, in the prompts' order.

        Penalty (over prompt and generated tokens), temperature, top-k and top-p apply in this order; temperature 0 is
        greedy, top_k 0 and top_p 1 are off. A text ends before the end-of-text token, before the first stop string, after
        max_new_tokens, or where the backbone's positions run out; it may be empty. Special ids are left out of it.
        seeds: one whole number per prompt (default: its index); the noise of its n-th token depends on (seed, n) alone.
        adapters: the one that continues each prompt (None: the bare backbone), in place of the active one; they decode together.
        Raises InputError for options out of range, prompts that are empty or too long, and ids the backbone does not have;
        FloatingPointError where logits are NaN or all -inf, so that there is nothing to draw from.
        """
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        for name, value, fine in (
            ("temperature", temperature, temperature >= 0), ("top_k", top_k, top_k >= 0), ("top_p", top_p, 0 < top_p <= 1),
            ("stop", stop, all(isinstance(s, str) and s for s in stop)),
            ("repetition_penalty", repetition_penalty, repetition_penalty > 0),
        ):  # fmt: skip
            if not fine:
                raise InputError(f"{name} cannot be {value!r}")
        options = (max_new_tokens, float(temperature), int(top_k), float(top_p), float(repetition_penalty), stop)
        written = self._generate_ids(prompts, seeds, worlds, adapters, False, *options)
        return [text[: min((text.find(s) for s in stop if s in text), default=None)] for text in self.texts(written)]

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Prompt], max_new_tokens: int = 64, seeds: Sequence[int] | None = None,
        worlds: Sequence[Hashable] | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """Token ids drawn from the model itself (temperature 1, nothing cut off or penalised), end of text included where
        it was reached. For gradients through log-probabilities, which need the very tokens drawn: text encoded anew may
        have others. Arguments and errors as in `generate`."""
        return self._generate_ids(prompts, seeds, worlds, None, True, max_new_tokens, 1.0, 0, 1.0, 1.0, ())

    def texts(self, written: Sequence[Sequence[int]]) -> list[str]:
        """What tokens that `sample` drew say: end of text, special ids and those beyond the tokenizer's vocabulary say nothing."""
        eos = set(self.tokenizer.eos_ids)
        return self._texts([np.array(ids[:-1] if ids and ids[-1] in eos else ids, dtype=np.int64) for ids in written])

    def _generate_ids(
        self, prompts: Sequence[Prompt], seeds: Sequence[int] | None, worlds: Sequence[Hashable] | None,
        adapters: Sequence[str | None] | None, exact: bool, max_new_tokens: int, *options: Any,
    ) -> list[list[int]]:  # fmt: skip
        """The tokens of each continuation, with end of text if that ended it."""
        ids, most = self._prompt_ids(prompts), self.backbone.config.max_positions + 1
        if max_new_tokens < 0:
            raise InputError(f"max_new_tokens cannot be {max_new_tokens}")
        if seeds is not None and len(seeds) != len(ids):
            raise InputError(f"{len(seeds)} seeds for {len(ids)} prompts")
        extra = [min(max_new_tokens, most - len(row)) for row in ids]  # what can still fit may be less than was asked for
        max_new_tokens = max(extra, default=0)
        chunks = self._chunks(ids, extra, worlds, adapters, ROWS[self.device.type == "cpu"])
        if max_new_tokens == 0:
            return [[] for _ in ids]
        hashed = hash_seeds(range(len(ids)) if seeds is None else seeds)
        # In bfloat16 a merged update costs no accuracy to speak of (1e-4 nats a token from float32, with an adapter or
        # without), but gradients ask for samples of the very model.
        enter = self.adapters.activate if exact and self.dtype.itemsize < 4 else self.adapters.merge

        def decode(chunk: list[World]) -> list[list[int]]:
            return self._decode(ids, chunk, hashed[members(chunk)], enter, max_new_tokens, *options)

        with self.adapter(self.adapters.active):
            done = ranks.compute(decode, chunks, [cost(chunk, ids, extra) for chunk in chunks])
        written = dict(pair for chunk, some in zip(chunks, done) for pair in zip(members(chunk), some, strict=True))
        return [written[agent] for agent in range(len(ids))]

    def log_prob(
        self, prompts: Sequence[Prompt], continuations: Sequence[Prompt], worlds: Sequence[Hashable] | None = None,
        *, end_of_text: bool = False,
    ) -> Tensor:  # fmt: skip
        """log p(continuation | prompt), natural logarithm, summed over the continuation's tokens: [prompts], float32
        (float64 for a float64 model). Prompt and continuation are encoded apart; an empty continuation has 0.

        end_of_text: the tokenizer's end token counts as the continuation's last. Differentiable when grad is enabled; a
        world's prefix is computed once and differentiated once. Raises InputError as `generate` does, and FloatingPointError
        where a value would be NaN or infinite.
        """
        if len(continuations) != len(prompts):
            raise InputError(f"{len(continuations)} continuations for {len(prompts)} prompts")
        end = [self.tokenizer.end_id] if end_of_text and self.tokenizer.end_id is not None else []
        if end_of_text and not (end and end[0] < self.backbone.config.vocab_size):
            raise InputError("the checkpoint names no end of text token, or one that the backbone does not have")
        targets = [ids + end for ids in self._encode(continuations, what="continuation")]
        ids, extra = self._prompt_ids(prompts, targets), [len(target) for target in targets]
        shared = not torch.is_grad_enabled()  # gradients stay where they are made
        chunks = self._chunks(ids, extra, worlds, rows=ROWS[self.device.type == "cpu"] if shared else None)
        with self.adapter(self.adapters.active):
            if shared:
                self.adapters.merge(self.adapters.active)
                costs = [cost(chunk, ids, extra) for chunk in chunks]
                done = ranks.compute(lambda chunk: self._score(ids, targets, chunk).cpu(), chunks, costs)
            else:
                done = [self._score(ids, targets, chunk) for chunk in chunks]
        if not done:
            return torch.zeros(0, dtype=torch.promote_types(self.dtype, torch.float32), device=self.device)
        found = torch.cat(done).to(self.device)
        check_finite(found.detach())
        order = [agent for chunk in chunks for agent in members(chunk)]
        return found[torch.tensor(np.argsort(order), device=self.device)]

    def ib_terms(
        self, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]], prior_prompts: Sequence[Prompt],
        worlds: Sequence[Hashable] | None = None,
    ) -> IBTerms:  # fmt: skip
        """The information bottleneck's terms of every token of `continuations` (ids, as `sample` gives them): log_prob
        under the active adapter given `prompts`, prior_log_prob under the bare backbone given `prior_prompts`, and the
        exact kl = KL(mu(. | prompt, m_<j) || r(. | prior prompt, m_<j)) in nats: each [prompts, longest], 0 behind a
        continuation's end. Differentiable in log_prob and kl. Raises InputError as `generate` does and for an adapter of the head,
        which the bare backbone shares, FloatingPointError as `log_prob` does."""
        if not len(prompts) == len(continuations) == len(prior_prompts) > 0:
            raise InputError(f"{len(prompts)} prompts, {len(continuations)} continuations and {len(prior_prompts)} prior prompts")
        if self.adapters.adapts("lm_head"):
            raise InputError(f"adapter {self.adapters.active!r} adapts lm_head, which ib_terms needs frozen")
        targets = self._encode(continuations, what="continuation")
        flat = self._flat_hidden(prompts, targets, worlds)
        with self.adapter(None), torch.no_grad():
            prior = self._flat_hidden(prior_prompts, targets, [tuple(p) if not isinstance(p, str) else p for p in prior_prompts])
        sizes = [len(target) for target in targets]
        target = torch.tensor([t for row in targets for t in row], device=self.device, dtype=torch.int64)
        with torch.autocast(self.device.type, enabled=False):  # an exact KL is worth its price
            terms = ib_loss(flat, prior, self.backbone.lm_head.weight.detach(), target)
        check_finite(torch.stack(terms).detach())
        return IBTerms(*(pad_sequence(term.split(sizes), batch_first=True) for term in terms))

    def _flat_hidden(
        self, prompts: Sequence[Prompt], targets: list[list[int]], worlds: Sequence[Hashable] | None
    ) -> Tensor:  # fmt: skip
        """Hidden states [tokens, dim] that predict the targets, in the prompts' order."""
        ids, done = self._prompt_ids(prompts, targets), dict[int, Tensor]()
        for chunk in self._chunks(ids, [len(t) for t in targets], worlds):
            agents = members(chunk)
            for some, hidden in self._hidden(ids, targets, chunk):
                sizes = [len(targets[agents[i]]) for i in some]
                done |= {agents[i]: part for i, part in zip(some, hidden.split(sizes), strict=True)}
        if not done:
            return torch.zeros(0, self.backbone.config.dim, dtype=self.dtype, device=self.device)
        return torch.cat([done[agent] for agent in sorted(done)])

    # ---- from text to worlds -----------------------------------------------------------------------------------------

    def _encode(self, texts: Sequence[Prompt], bos: Sequence[int] = (), what: str = "prompt") -> list[list[int]]:
        """Token ids; a text that occurs often is encoded once."""
        if isinstance(texts, str) or not hasattr(texts, "__len__"):
            raise InputError(f"a list of {what}s was expected, not {texts!r:.60}")
        for i, text in enumerate(texts):
            ids = isinstance(text, list | tuple) and all(isinstance(id, int | np.integer) for id in text)
            if not (ids or isinstance(text, str)):
                raise InputError(f"{what} {i} must be text or a list of token ids, not {text!r:.60}")
            if isinstance(text, str) and not text.isascii() and text.encode("utf-8", "replace").decode() != text:
                raise InputError(f"{what} {i} is not valid Unicode text: it holds half of a surrogate pair")
        unique = list(dict.fromkeys(text for text in texts if isinstance(text, str)))
        known = dict(zip(unique, self.tokenizer.encode_batch(unique), strict=True))
        vocab = self.backbone.config.vocab_size
        rows = [[*bos, *known[text]] if isinstance(text, str) else list(text) for text in texts]
        for i, row in enumerate(rows):
            if row and not 0 <= min(row) <= max(row) < vocab:
                raise InputError(f"{what} {i}: token ids must lie between 0 and {vocab - 1}, the backbone's vocabulary")
        return rows

    def _prompt_ids(self, prompts: Sequence[Prompt], targets: Sequence[Sequence[int]] | None = None) -> list[list[int]]:
        ids = self._encode(prompts, () if self.tokenizer.bos_id is None else (self.tokenizer.bos_id,))
        limit = self.backbone.config.max_positions
        for i, row in enumerate(ids):
            if not row:
                raise InputError(f"prompt {i} has no token, not even one that the tokenizer puts in front of a text")
            if (length := len(row) + (len(targets[i][:-1]) if targets is not None else 0)) > limit:  # a last target is not read
                with_what = "" if targets is None else ", with its continuation up to the last token,"
                raise InputError(f"prompt {i}{with_what} has {length} tokens, more than the backbone's {limit} positions")
        return ids

    def _chunks(
        self, ids: list[list[int]], extra: Sequence[int], worlds: Sequence[Hashable] | None,
        adapters: Sequence[str | None] | None = None, rows: int | None = None,
    ) -> list[list[World]]:  # fmt: skip
        """Chunks of worlds (`worlds.cut`) that keep the cache and the logits within bounds, of about `rows` agents at most;
        `extra` is how many tokens each prompt may grow by."""
        keys = [0] * len(ids) if worlds is None else worlds.tolist() if isinstance(worlds, Tensor) else worlds
        names = [self.adapters.active] * len(ids) if adapters is None else adapters
        for what, given in (("worlds", keys), ("adapters", names)):
            if len(given) != len(ids):
                raise InputError(f"{len(given)} {what} for {len(ids)} prompts")
        config = self.backbone.config
        tokens = CACHE_BYTES // (2 * config.layers * config.kv_heads * config.head_dim * self.dtype.itemsize)
        return cut(ids, extra, list(zip(names, keys, strict=True)), tokens, max(1, LOGITS // config.vocab_size), rows)

    # ---- one chunk ---------------------------------------------------------------------------------------------------

    def _decode(
        self, ids: list[list[int]], chunk: list[World], hashed: np.ndarray, enter: Callable[[str | None], None],
        max_new_tokens: int, temperature: float, top_k: int, top_p: float, penalty: float, stop: tuple[str, ...],
    ) -> list[list[int]]:  # fmt: skip
        """The tokens of a chunk's agents, in the chunk's order."""
        config, device = self.backbone.config, self.device
        prompts = [ids[agent] for agent in members(chunk)]
        world = np.repeat(np.arange(len(chunk)), [len(w.agents) for w in chunk])
        inputs = [row[len(chunk[w].prefix) :] for row, w in zip(prompts, world, strict=True)]
        lengths = np.array([len(row) for row in inputs])
        graphs = self.graphs and not ranks.in_step() and replayable(self.backbone.lm_head.weight)
        slots = lengths.max() + (max_new_tokens if graphs else GROWTH)
        prefixes, hidden, (cache_k, cache_v) = prefill(self.backbone, chunk, inputs, world, slots, enter)
        feed: Step | Replay | None = None
        names = list(dict.fromkeys(w.adapter for w in chunk))
        adapter = np.array([names.index(chunk[w].adapter) for w in world])  # by row
        self.adapters.mix(names, adapter)
        tokens = np.zeros((len(prompts), max_new_tokens), dtype=np.int64)
        counts = np.zeros(len(prompts), dtype=np.int64)  # tokens per agent, with end of text
        limits = np.minimum(max_new_tokens, config.max_positions + 1 - np.array([len(row) for row in prompts]))
        row_of = np.arange(len(prompts))  # the agent in each row of the batch
        alive = np.ones(len(prompts), dtype=bool)  # by row
        seen = square(prompts, max_new_tokens, device) if penalty != 1 else None
        reach = max((len(s.encode()) for s in stop), default=0) + 8  # tokens that a stop string may extend over
        eos = np.array(self.tokenizer.eos_ids, dtype=np.int64)

        for step in range(max_new_tokens):
            logits = self.backbone.logits(hidden).to(torch.promote_types(self.dtype, torch.float32))
            if seen is not None:
                logits = penalise(logits, seen, penalty)
            noise = uniforms(hashed[row_of], step) if temperature > 0 else None
            chosen = sample(logits, noise, temperature, top_k, top_p)
            new = chosen.cpu().numpy()
            ended = np.isin(new, eos)
            tokens[row_of[alive], step] = new[alive]
            counts[row_of[alive]] = step + 1
            alive &= ~ended & (step + 1 < limits[row_of])
            if stop and len(going := np.flatnonzero(alive)):
                tails = self._texts(tokens[row_of[going], max(0, step + 1 - reach) : step + 1])
                for row in going[[any(s in tail for s in stop) for tail in tails]]:
                    # The tail may have been cut within a character, so the whole text has the last word.
                    text = self._texts(tokens[row_of[row], None, : step + 1])[0]
                    alive[row] = not any(s in text for s in stop)
            if not alive.any():
                break
            if seen is not None:
                seen[:, -max_new_tokens + step] = chosen
            left = min(len(alive), rounded(int(alive.sum()), self.backbone.lm_head.weight))
            if len(alive) - left > DEAD[not graphs] * len(alive):
                rows = np.sort(np.argsort(~alive, kind="stable")[:left])
                keep = torch.from_numpy(rows).to(device)
                cache_k, cache_v = (cache.index_select(1, keep) for cache in (cache_k, cache_v))
                prefixes, world = prefixes.keep(world[rows])
                lengths, row_of, alive, adapter = (x[rows] for x in (lengths, row_of, alive, adapter))
                seen, chosen, feed = None if seen is None else seen[keep], chosen[keep], None
                self.adapters.mix(names, adapter)
            if lengths.max() + step + 1 > cache_k.shape[3]:
                cache_k, cache_v = (F.pad(cache, (0, 0, 0, GROWTH)) for cache in (cache_k, cache_v))
            if feed is None or not graphs:
                feed = (Replay if graphs else Step)(self.backbone, lengths + step + 1, world, prefixes, cache_k, cache_v)
            hidden = feed(chosen)
        return [row[:count].tolist() for row, count in zip(tokens, counts, strict=True)]

    def _texts(self, batch: np.ndarray | Sequence[np.ndarray]) -> list[str]:
        """Decoded ids. A backbone's vocabulary is often padded beyond the tokenizer's: ids from there have no text."""
        return self.tokenizer.decode_batch([ids[ids < self.tokenizer.vocab_size].tolist() for ids in batch])

    def _score(self, ids: list[list[int]], targets: list[list[int]], chunk: list[World]) -> Tensor:
        """log_prob of a chunk's agents, in the chunk's order."""
        agents = members(chunk)
        total = torch.zeros(len(agents), dtype=torch.promote_types(self.dtype, torch.float32), device=self.device)
        adapted = self.adapters.adapts("lm_head")  # such a head cannot be run again later: its adapter may then be off
        rows_a_time = max(1, LOGITS // 4 // self.backbone.config.vocab_size)
        for some, hidden in self._hidden(ids, targets, chunk):
            sizes = [len(targets[agents[i]]) for i in some]
            target = torch.tensor([t for i in some for t in targets[agents[i]]], device=self.device)
            agent = torch.from_numpy(np.repeat(some, sizes)).to(self.device)
            for piece, goal, whose in zip(*(x.split(rows_a_time) for x in (hidden, target, agent)), strict=True):
                if piece.requires_grad and not adapted:  # logits are made again in the backward pass rather than kept
                    value = checkpoint(self._token_log_prob, piece, goal, use_reentrant=False)
                else:
                    value = self._token_log_prob(piece, goal)
                total = total.index_add(0, whose, value)
        return total

    def _hidden(
        self, ids: list[list[int]], targets: list[list[int]], chunk: list[World]
    ) -> Iterator[tuple[np.ndarray, Tensor]]:  # fmt: skip
        """What predicts each target of a chunk's agents: (some agents, counted in the chunk; hidden states [tokens, dim]
        of their targets, packed), batch by batch. Agents without targets are passed over."""
        agents = [(agent, w) for w, world in enumerate(chunk) for agent in world.agents]
        scored = np.array([i for i, (agent, _) in enumerate(agents) if targets[agent]], dtype=np.int64)
        if not len(scored):
            return
        prefixes = run_prefixes(self.backbone, chunk)
        wanted = [targets[agents[i][0]] for i in scored]
        own = [ids[agents[i][0]][len(chunk[agents[i][1]].prefix) :] for i in scored]
        inputs = [prompt + target[:-1] for prompt, target in zip(own, wanted, strict=True)]
        world = np.array([agents[i][1] for i in scored])
        sizes = np.array([len(target) for target in wanted])
        for some, hidden in run_suffixes(self.backbone, inputs, sizes, world, prefixes):
            yield scored[some], hidden

    def _token_log_prob(self, hidden: Tensor, target: Tensor) -> Tensor:
        logits = self.backbone.logits(hidden).to(torch.promote_types(self.dtype, torch.float32))
        return -F.cross_entropy(logits, target, reduction="none")
