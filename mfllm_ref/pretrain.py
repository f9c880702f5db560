"""Pretraining of a small backbone from scratch, so that everything here runs without anyone else's weights.

The corpus shows actions under every kind of signal and none, and summaries written from counts: all methods start from one
backbone that can read each of their signals. Documents become rows of tokens in `packing.py`.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm

from mfllm_ref import ranks
from mfllm_ref.errors import InputError
from mfllm_ref.lm import LanguageModel
from mfllm_ref.lm.backbone import Backbone, plain_attention
from mfllm_ref.lm.checkpoint import save_backbone
from mfllm_ref.lm.config import Config
from mfllm_ref.lm.tokenizer import Tokenizer
from mfllm_ref.muon import Muon
from mfllm_ref.packing import Batch, batches, block_mask, collate
from mfllm_ref.runs import Run, write_bytes, write_json
from mfllm_ref.share_tokens import ShareTokens, settle_embeddings, share_embeddings
from mfllm_ref.society import agora
from mfllm_ref.society.annotate import RuleAnnotator
from mfllm_ref.society.corpus import Corpus, Mixture, Past, pretraining_part
from mfllm_ref.society.events import HALF_LIFE, Event
from mfllm_ref.society.response import response_curves, slope
from mfllm_ref.society.signals import imagined, verbalise
from mfllm_ref.training import STATE, at, finite, load_optimizer_tensors, load_state, optimizer_tensors, save_state

# A summary's token counts so much more in the loss than an action's: a document has some 60 of the first or 170 of the second,
# which are soon as well predicted as they can be, while a summary that is wrong misleads all steps behind it.
SUMMARY_WEIGHT = 4.0
HELD_OUT, LOOKS = 20, 20  # events held out for dev_loss and the response curve; how often dev_loss is computed
TOKENIZER_DOCUMENTS, POPULATIONS = 6000, 4  # the tokenizer's training texts: documents, and populations in words per document
END = "<|endoftext|>"
WORKERS = 6  # processes that draw batches ahead for a GPU: one takes some 90 ms for 36 rows, the GPU 41 for the step
EMBEDDING = 0.05  # deviation of its first weights
# What a tokenizer, and a chat, may be made of: copied where a backbone goes on from another.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "generation_config.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# Newlines stand alone (they end prompts and sections), and an emoticon in brackets is one piece. A label and its percentage
# are one piece (` oppose 45%`), with the heading before the first of them (`; stance: support 50%`): what the population does
# can then be read off single tokens by any attention head, where label and digits apart would first have to be brought
# together. And a summary is half as many tokens, at each of which a small model may go astray and lose what the rest would
# have said: with headings apart, a tenth of sampled summaries lacked a dimension. A space before a heading stands alone, so
# that a summary is the same tokens where it is written and where it is read.
_SHARE = r"[\p{L}\p{M}]+ ?\d{2,3}%"
_HEADED = r"[\p{L}\p{M}]+[:：] ?" + _SHARE
PIECES = (
    rf"\n|\[[^\[\]\s]{{1,8}}\]|([;；] ?)?{_HEADED}| (?={_HEADED})| ?{_SHARE}| ?\d%| ?\d"
    r"| ?[\p{L}\p{M}]+('\p{L}+)?| ?[^\s\p{L}\p{N}]| ?\p{N}|\s"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a backbone to be made."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int


SHAPES = {
    "tiny": Shape(dim=192, layers=6, heads=6, kv_heads=2, intermediate=512, vocab=2944),
    "small": Shape(dim=256, layers=6, heads=8, kv_heads=2, intermediate=768, vocab=8192),
}


# Without a sliding window a mistral would be a llama. An agent's prompt fits into this one, a mean-field prompt (360 tokens) does not.
WINDOWS = {"mistral": 256}


def config_for(model_type: str, shape: Shape, vocab_size: int) -> Config:
    """A tied backbone of the family `model_type` with 4,096 positions and full attention, but for WINDOWS."""
    return Config.from_json(
        {
            "model_type": model_type, "vocab_size": vocab_size, "hidden_size": shape.dim,
            "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads, "head_dim": shape.dim // shape.heads,
            "intermediate_size": shape.intermediate, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
            "max_position_embeddings": 4096, "tie_word_embeddings": True, "sliding_window": WINDOWS.get(model_type),
        },
        "the new backbone",
    )  # fmt: skip


def train_tokenizer(texts: Iterable[str], vocab: int) -> tokenizers.Tokenizer:
    """A byte-fallback BPE of `vocab` entries: id 0 is end of text, then the 256 bytes, then characters and merges.

    Any text encodes, and decodes to itself. Bytes are ordinary entries, not added tokens: no text can spell one.
    """
    raw_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END, *raw_bytes], limit_alphabet=(vocab - 257) * 3 // 5, show_progress=False
    )
    # A list: the library's thread would consume an iterator, and Ctrl-C could not stop it.
    tokenizer.train_from_iterator(list(texts), trainer)
    # The trainer can reserve entries only as added tokens, and an added token would be matched in texts.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] == END]
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def tokenizer_files() -> dict[str, dict[str, object]]:
    """The small JSON files beside tokenizer.json that make the folder load in transformers too."""
    return {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END,
            "clean_up_tokenization_spaces": False, "model_max_length": 4096,
        },
        "generation_config.json": {"eos_token_id": 0, "pad_token_id": 0},
    }  # fmt: skip


def sample_texts(corpus: Corpus, count: int, seed: int) -> Iterator[str]:
    """Texts to train a tokenizer on: whole documents, as the backbone will see them, and POPULATIONS random populations in
    words beside each, so that every label with every share is frequent enough to be one token."""
    rng = np.random.default_rng([seed, 0])
    for number in range(count):
        _, document = corpus.draw(rng)
        for _ in range(POPULATIONS):
            yield verbalise(imagined(rng), corpus.past(number % corpus.count).event.language)
        yield document.prefix
        for private, target in document.branches:
            yield private
            yield target


def loss_sums(backbone: Backbone, batch: Batch) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood in nats of each row's targets, and their number: float32 [rows] each."""
    device, windows = batch.ids.device, backbone.config.windows
    mixed = torch.is_autocast_enabled(device.type)
    dtype = torch.bfloat16 if mixed else next(backbone.parameters()).dtype
    masks = {window: block_mask(batch, window, dtype) for window in set(windows)}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            q, k, v, mask = q.to(dtype), k.to(dtype), v.to(dtype), masks[windows[layer]]
            if device.type == "cpu" and mixed:
                return plain_attention(q, k, v, mask)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    hidden = backbone.hidden(batch.ids, batch.positions, attend)
    learned = batch.targets != -100
    nll = F.cross_entropy(backbone.logits(hidden[learned]).float(), batch.targets[learned], reduction="none")
    rows = torch.nonzero(learned)[:, 0]
    sums = torch.zeros(len(batch.ids), device=nll.device).index_add(0, rows, nll)
    return sums, torch.bincount(rows, minlength=len(batch.ids)).float()


@torch.no_grad()
def held_out_loss(backbone: Backbone, tokenizer: Tokenizer, pasts: Sequence[Past], width: int, mixed: bool = False) -> float:
    """Loss in nats per token on real actions of held-out events, told the exact label shares: up to `width` actions from the
    middle of each event, as far as they fit in a row; without dropout."""
    device = next(backbone.parameters()).device
    documents = [("empirical", past.policy(past.steps // 2, "empirical", width)) for past in pasts]
    batch = collate(documents, tokenizer, end=0).rows(slice(None), device)
    backbone.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
        nats, targets = loss_sums(backbone, batch)
    backbone.train()
    return float(nats.sum() / targets.sum())


def initialise(backbone: Backbone, generator: torch.Generator) -> None:
    """Normal weights of deviation fan_in**-0.5, outputs of blocks smaller by sqrt(2 layers); the embedding EMBEDDING."""
    scale = (2 * backbone.config.layers) ** -0.5
    for name, parameter in backbone.named_parameters():
        if parameter.dim() == 2:
            std = EMBEDDING if "embed" in name or "lm_head" in name else parameter.shape[1] ** -0.5
            std *= scale if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            with torch.no_grad():
                parameter.normal_(std=std, generator=generator)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 50) -> float:
    """Linear warm-up, a constant, then a linear descent to 0 over the last half."""
    return peak * min(1.0, (step + 1) / warmup, 2 * (1 - step / steps))


def optimizers(backbone: Backbone, lr: float, products: torch.dtype = torch.float32) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, norms and biases."""
    inner = [p for name, p in backbone.named_parameters() if p.dim() == 2 and ".layers." in name]
    rest = [p for name, p in backbone.named_parameters() if p.dim() != 2 or ".layers." not in name]
    adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    return [Muon(inner, lr, weight_decay=0.05, products=products), adamw]


@dataclass(frozen=True, slots=True)
class Settings:
    """How a backbone is pretrained. `rows` documents a step; `lr` is the peak learning rate of both optimizers; `mixed`:
    bfloat16 products of the float32 weights; `dropout`: of what each half of a layer adds."""

    steps: int = 1500
    rows: int = 9
    lr: float = 4e-3
    seed: int = 0
    clip: float = 1.0
    mixed: bool = False
    dropout: float = 0.0


def train_steps(
    backbone: Backbone, tokenizer: Tokenizer, corpus: Corpus, settings: Settings, start: int,
    optimizers: Sequence[torch.optim.Optimizer],
) -> Iterator[dict[str, float]]:  # fmt: skip
    """Train from step `start` on; yields a row of numbers a step (losses in nats a token). The batch of a step is a pure
    function of (seed, step), so a run that resumes sees what an uninterrupted one would have seen. Processes share its rows
    and add up their gradients: in the order of the ranks, so that with another number of them sums round differently, and
    dropout's noise is another.

    Raises FloatingPointError, naming step and batch, when the loss or its gradient is no longer finite: nothing is changed then.
    """
    backbone.train().requires_grad_(True)
    parameters, device = list(backbone.parameters()), next(backbone.parameters()).device
    own, size = ranks.rank(), ranks.world_size()
    steps, workers = range(start, settings.steps), 0
    if device.type == "cuda":
        workers = min(WORKERS, len(os.sched_getaffinity(0)))
    drawn = batches(corpus, tokenizer, settings.rows, settings.seed, steps, workers)
    started = time.perf_counter()
    for module in backbone.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = settings.dropout
    for step, batch in zip(steps, drawn, strict=True):
        torch.manual_seed(((settings.seed * settings.steps + step) * size + own) % 2**64)  # dropout's noise
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.mixed):
            nats, targets = loss_sums(backbone, batch.rows(slice(own, None, size), device))
        sums, counts = torch.empty(2, settings.rows)
        for r, theirs in enumerate(ranks.gather((nats.detach().cpu(), targets.cpu()))):
            sums[r::size], counts[r::size] = theirs
        summaries = torch.tensor([sort == "mean-field" for sort in batch.sorts])
        weights = torch.where(summaries, SUMMARY_WEIGHT, 1.0)
        total = (weights * counts).sum()
        loss = (weights * sums).sum() / total
        named = ", ".join(f"{event} {sort}" for event, sort in zip(batch.events, batch.sorts, strict=True))
        with at(step, named):
            finite("loss", loss.item())
        ((nats * weights[own::size].to(device)).sum() / total.to(device)).backward()
        if size > 1:
            made = {own: [cast(Tensor, p.grad) for p in parameters]}
            for optimizer in optimizers:
                optimizer.zero_grad()
            ranks.add_gradients(parameters, made, [1.0] * size)
        with at(step, named):
            norm = finite("gradient", torch.nn.utils.clip_grad_norm_(parameters, settings.clip).item())
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings.steps, settings.lr)
            optimizer.step()
            optimizer.zero_grad()
        row = {"step": step, "loss": loss.item(), "gradient_norm": norm}
        for name, rows in (("mean_field", summaries), ("policy", ~summaries)):
            row[f"{name}_loss"] = (sums[rows].sum() / counts[rows].sum()).item() if rows.any() else None
        row["seconds"] = time.perf_counter() - started
        row["tokens_per_second"] = int((batch.segments >= 0).sum()) / row["seconds"]
        yield row
        started = time.perf_counter()


def corpora(
    events: Sequence[Event] | None, batch: int, half_life: float = HALF_LIFE, leave_out: Sequence[str] = (),
    abridged: float = 0.0,
) -> tuple[Corpus, list[Past]]:  # fmt: skip
    """(what to pretrain on, real pasts it never sees) from outside events, or from agora's splits if there are none.

    half_life: actions, of the population that signals and summaries tell of. leave_out: ids of the outside events that it never
    sees (none: a fifth). abridged: the part of the documents that state or are told shares which end early. Raises InputError
    where nothing is left to read or to keep.

    Of agora's policy documents one in ten carries another event's signal: its backbone reads signals as a general model
    would, uncalibrated to that world.
    """
    annotate = RuleAnnotator()
    if events is None:
        mixture = Mixture(summaries=0.5, shuffled=0.2, abridged=abridged)
        make = partial(agora.event, "pretrain")
        corpus = Corpus(agora.SPLITS["pretrain"], annotate, batch, mixture, make, half_life)
        return corpus, [Past(agora.event("train", i), annotate, batch, half_life) for i in range(HELD_OUT)]
    chosen, kept = pretraining_part(events, leave_out)
    if not (chosen and kept):
        some = "these" if leave_out else "a fifth"
        raise InputError(f"{len(events)} events are too few to pretrain on and to keep {some} of for tuning")
    long = [event for event in kept if len(event.actions) >= 10 * batch] or kept
    # Real populations differ less than agora's and teach less about reading a signal, so more are made up; and there are few,
    # which a backbone memorises instead of learning which words go with a label, so other events' people are mixed in.
    mixture = Mixture(reweighted=0.7, guests=0.5, abridged=abridged)
    corpus = Corpus(len(chosen), annotate, batch, mixture, chosen.__getitem__, half_life)
    return corpus, [Past(event, annotate, batch, half_life) for event in long[:HELD_OUT]]


def load(folder: Path) -> LanguageModel:
    """A finished backbone to go on from. InputError if it is damaged, or has a head of its own: share tokens need a tied one."""
    lm = LanguageModel.load(folder)
    if not lm.backbone.config.tied:
        raise InputError(f"{folder}: its head is not its embedding's; pretraining goes on from a tied one alone")
    return lm


def run(
    run: Run, settings: Mapping[str, Any], corpus: Corpus, held_out: Sequence[Past], device: torch.device, progress: bool,
    begun: LanguageModel | None = None,
) -> dict:  # fmt: skip
    """Pretrain in an open run folder on what `corpora` gives, or go on there: log.jsonl and a Hugging Face style folder of a
    new backbone or, from its weights on, of `begun`, which is that of settings["backbone"].

    Returns {"parameters", "response": {dimension: slope}}. Raises InputError where the loss is no longer finite.
    """
    if begun is not None:
        for name in TOKENIZER_FILES:
            if (found := Path(settings["backbone"]) / name).exists():
                write_bytes(run.out / name, found.read_bytes())
    elif not (run.out / "tokenizer.json").exists():
        trained = train_tokenizer(sample_texts(corpus, TOKENIZER_DOCUMENTS, settings["seed"]), SHAPES[settings["shape"]].vocab)
        for name, content in tokenizer_files().items():
            write_json(run.out / name, content)
        write_bytes(run.out / "tokenizer.json", trained.to_str(pretty=False).encode())
    ranks.gather(None)  # all read what rank 0 has written
    tokenizer, state, generator = Tokenizer.load(run.out), run.out / STATE, torch.Generator().manual_seed(settings["seed"])
    if begun is not None:
        backbone = begun.backbone
    else:
        backbone = Backbone(config_for(settings["model_type"], SHAPES[settings["shape"]], tokenizer.vocab_size))
        initialise(backbone, generator)
    shared = ShareTokens(tokenizer, backbone.config.dim, EMBEDDING, generator)
    if begun is not None:
        shared.fit(backbone.model.embed_tokens.weight)
    share_embeddings(backbone, shared)
    backbone.to(device)
    plan = Settings(**{name: settings[name] for name in ("steps", "rows", "lr", "seed", "mixed", "dropout")})
    tuned = optimizers(backbone, plan.lr, torch.bfloat16 if plan.mixed else torch.float32)
    log, start = run.lines("log.jsonl"), 0
    if (earlier := load_state(state, device)) is not None:
        start = earlier[0]["step"]
        if earlier[1]["backbone"].keys() != dict(backbone.named_parameters()).keys():
            raise InputError(f"{state}: has other parameters than this version trains, cannot resume")
        backbone.load_state_dict(earlier[1]["backbone"], strict=False)  # a tied head and constants are not in it
        load_optimizer_tensors(tuned, earlier[1]["optimizer"])
    log.keep(start)
    bar = tqdm(total=plan.steps, initial=start, unit="step", disable=not progress)
    pending: list[dict] = []
    try:
        for row in train_steps(backbone, tokenizer, corpus, plan, start, tuned):
            pending.append(row)
            bar.update()
            bar.set_postfix_str(f"loss {row['loss']:.3f}")
            if (row["step"] + 1) % max(1, plan.steps // LOOKS) == 0:
                row["dev_loss"] = held_out_loss(backbone, tokenizer, held_out, corpus.mixture.width, plan.mixed)
            if len(pending) == settings["save_every"] or row["step"] == plan.steps - 1:
                log.append(pending)
                pending = []
                parameters = dict(backbone.named_parameters())
                save_state(state, {"step": row["step"] + 1}, backbone=parameters, optimizer=optimizer_tensors(tuned))
    except FloatingPointError as error:
        log.append(pending)
        kept = f"; the last good state is in {state.name}" if state.exists() else ""
        raise InputError(f"{run.out}: {error}{kept}") from None
    bar.close()
    settle_embeddings(backbone)
    save_backbone(backbone, run.out)
    ranks.gather(None)
    lm = LanguageModel.load(run.out, device=device)
    response = {d: round(slope(acted), 3) for d, acted in response_curves(lm, held_out, corpus.annotate).items()}
    log.append([{"response": response}])
    return {"parameters": sum(p.numel() for p in backbone.parameters()), "response": response}
