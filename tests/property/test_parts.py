"""Invariants of the parts: distributions, adapters, words for shares, files of events, tokenizers.

Each test states its invariant in words; `mutants.py` shows for each that it can fail.
"""

import io
import math
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import f1_score

from kernels.ib_loss import ib_loss
from mfllm_ref import pretrain
from mfllm_ref.lm.backbone import Backbone
from mfllm_ref.lm.lora import Adapters
from mfllm_ref.lm.tokenizer import Tokenizer
from mfllm_ref.metrics import dtw, f1, kl_divergence, wasserstein
from mfllm_ref.society.events import DIMENSIONS, LANGUAGES, Action, Agent, Event, PublicPost
from mfllm_ref.society.readers import load_events, write_events
from mfllm_ref.society.signals import GRID, parse, verbalise

ROOT = Path(__file__).resolve().parents[2]


def check(examples: int) -> settings:
    phases = (Phase.explicit, Phase.generate)
    return settings(deadline=None, derandomize=True, database=None, max_examples=examples, phases=phases)


# ---- distributions


def distributions(count: int) -> st.SearchStrategy:
    """`count` distributions over the same one to six labels."""
    counts = st.integers(0, 9)
    return st.integers(1, 6).flatmap(
        lambda n: st.tuples(*[st.lists(counts, min_size=n, max_size=n).filter(any).map(lambda w: np.array(w) / sum(w))] * count)
    )


SERIES = st.integers(1, 3).flatmap(
    lambda width: st.tuples(*[st.lists(st.lists(st.integers(0, 5), min_size=width, max_size=width), min_size=1, max_size=5)] * 2)
)


@check(60)
@given(distributions(2))
def test_kl_is_never_negative_and_zero_for_equals_alone(pair):
    """KL(p || q) >= 0, 0 for p = q and for no other q, and scipy's relative entropy."""
    p, q = pair
    value = kl_divergence(p, q)
    assert value >= 0 and kl_divergence(p, p) == 0
    assert (value < 1e-12) == bool(np.allclose(p, q, atol=1e-9))
    assert value == pytest.approx(max(stats.entropy(p, q), 0.0), abs=1e-12)


@check(60)
@given(distributions(3))
def test_w1_is_a_metric(three):
    """W1 is symmetric, zero on the diagonal, obeys the triangle inequality, and is scipy's for labels on [0, 1]."""
    p, q, r = three
    places = np.linspace(0, 1, len(p))
    assert wasserstein(p, q) == pytest.approx(stats.wasserstein_distance(places, places, p, q), abs=1e-12)
    assert wasserstein(p, q) == pytest.approx(wasserstein(q, p), abs=1e-12) and wasserstein(p, p) == 0
    assert wasserstein(p, r) <= wasserstein(p, q) + wasserstein(q, r) + 1e-12


def cheapest_path(x: list, y: list) -> float:
    """By trying them all: the cheapest path of steps (1, 0), (0, 1), (1, 1) from corner to corner."""
    if not x or not y:
        return math.inf
    here = float(np.abs(np.subtract(x[-1], y[-1])).sum())
    if len(x) == len(y) == 1:
        return here
    return here + min(cheapest_path(x[:-1], y), cheapest_path(x, y[:-1]), cheapest_path(x[:-1], y[:-1]))


@check(30)
@given(SERIES)
def test_dtw_is_symmetric_and_the_cheapest_path(pair):
    """DTW is symmetric, zero on the diagonal and what brute force finds."""
    x, y = pair
    assert dtw(x, y) == pytest.approx(cheapest_path(x, y) / (len(x) + len(y)))
    assert dtw(x, y) == pytest.approx(dtw(y, x)) and dtw(x, x) == 0


@check(60)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("bcd")), min_size=1, max_size=12))
def test_f1_lies_in_the_unit_interval(pairs):
    """F1 is in [0, 1], 1 for a perfect prediction, and scikit-learn's."""
    true, pred = zip(*pairs)
    for average in ("macro", "micro"):
        assert 0 <= f1(true, pred, average) <= 1 and f1(true, true, average) == 1
        assert f1(true, pred, average) == pytest.approx(f1_score(true, pred, average=average, zero_division=0))


# ---- adapters


TARGETS = st.lists(st.sampled_from(["q_proj", "v_proj", "o_proj", "up_proj", "lm_head"]), min_size=1, max_size=3, unique=True)
IDS = torch.arange(20).reshape(2, 10)


def small_backbone(dtype: torch.dtype = torch.float64) -> Backbone:
    shape = pretrain.Shape(dim=16, layers=2, heads=2, kv_heads=1, intermediate=24, vocab=40)
    backbone = Backbone(pretrain.config_for("qwen2", shape, shape.vocab))
    pretrain.initialise(backbone, torch.Generator().manual_seed(0))
    return backbone.to(dtype)


def shake(adapters: Adapters, name: str, seed: int) -> None:
    """Random numbers for A and B, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters.parameters(name):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))


def delta(adapters: Adapters, name: str) -> dict[str, torch.Tensor]:
    """What the adapter adds to each layer's weight."""
    paths = adapters.adapters[name].layers
    before = {path: adapters.backbone.get_submodule(path).weight.clone() for path in paths}
    adapters.merge(name)
    out = {path: adapters.backbone.get_submodule(path).weight - weight for path, weight in before.items()}
    adapters.unmerge()
    return out


@check(15)
@given(st.integers(1, 5), st.floats(0.1, 64), TARGETS, st.booleans(), st.integers(0, 99))
def test_a_fresh_adapter_is_the_identity(rank, alpha, targets, rslora, seed):
    """A new adapter, active or merged, changes no logit, to the bit."""
    adapters = Adapters(small_backbone())
    with torch.no_grad():
        bare = adapters.backbone(IDS)
        adapters.add("new", rank, alpha, targets, seed, use_rslora=rslora)
        for use in (adapters.activate, adapters.merge):
            use("new")
            assert torch.equal(adapters.backbone(IDS), bare)


@check(15)
@given(st.integers(1, 5), st.floats(0.1, 64), st.floats(0.1, 64), TARGETS, st.booleans(), st.integers(0, 99))
def test_the_weight_delta_is_linear_in_alpha(rank, one, two, targets, rslora, seed):
    """With A and B given, the deltas of two alphas sum to the delta of their sum, and what an active adapter computes is
    what the weights plus that delta compute."""
    adapters = Adapters(small_backbone())
    deltas = []
    for name, alpha in (("one", one), ("two", two), ("sum", one + two)):
        adapters.add(name, rank, alpha, targets, seed, use_rslora=rslora)
        shake(adapters, name, seed)
        deltas.append(delta(adapters, name))
    for path in deltas[0]:
        torch.testing.assert_close(deltas[0][path] + deltas[1][path], deltas[2][path], rtol=1e-9, atol=1e-9)
        assert deltas[0][path].abs().max() > 0
    with torch.no_grad():
        adapters.activate("one")
        active = adapters.backbone(IDS)
        adapters.merge("one")
        torch.testing.assert_close(active, adapters.backbone(IDS), rtol=1e-9, atol=1e-9)


@check(15)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), TARGETS,
    st.lists(st.tuples(st.sampled_from(["merge", "activate"]), st.sampled_from(["a", "b"])), min_size=1, max_size=5),
)  # fmt: skip
def test_merge_then_unmerge_restores_the_bits(dtype, targets, uses):
    """After any sequence of merges and activations, unmerging leaves every bit of the backbone as it was."""
    backbone = small_backbone(dtype)
    original = {name: parameter.clone() for name, parameter in backbone.named_parameters()}
    adapters = Adapters(backbone)
    for seed, name in enumerate("ab"):
        adapters.add(name, 2, 16.0, targets, seed)
        shake(adapters, name, seed)
    for verb, name in uses:
        getattr(adapters, verb)(name)
    adapters.activate(None)
    now = dict(backbone.named_parameters())
    assert now.keys() == original.keys() and all(torch.equal(now[name], original[name]) for name in now)
    assert backbone.lm_head.weight is backbone.model.embed_tokens.weight


# ---- words and files


SHARES = st.fixed_dictionaries(
    {
        dimension: st.lists(st.integers(0, 60), min_size=len(names), max_size=len(names)).filter(any).map(lambda w: np.array(w) / sum(w))
        for dimension, names in DIMENSIONS.items()
    }
)
WORDS = st.text(st.characters(codec="utf-8"), max_size=9)


@check(60)
@given(SHARES, st.sampled_from(LANGUAGES))
def test_shares_in_words_are_read_back(population, language):
    """Parsing what was verbalised gives back every dimension within a step of the words' grid, and the same words again."""
    told = verbalise(population, language)
    back = parse(told, language)
    assert verbalise(back, language) == told
    for dimension in DIMENSIONS:
        assert back[dimension].sum() == pytest.approx(1)
        assert np.abs(back[dimension] - population[dimension]).max() < GRID / 100 + 1e-9


@check(20)
@given(SHARES, st.sampled_from(LANGUAGES), st.sets(st.sampled_from(list(DIMENSIONS))))
def test_shares_rounded_at_random_are_exact_in_expectation(population, language, known):
    """Each draw states just the known dimensions, within a step of the grid; their mean comes close to the exact shares."""
    rng, draws = np.random.default_rng(0), 400
    told = {dimension: population[dimension] for dimension in known}
    back = [parse(verbalise(told, language, rng), language) for _ in range(draws)]
    assert all(set(said) == known for said in back)
    for dimension in known:
        said = np.array([said[dimension] for said in back])
        assert np.abs(said - told[dimension]).max() < GRID / 100 + 1e-9
        np.testing.assert_allclose(said.mean(0), told[dimension], atol=5 * GRID / 100 / 2 / draws**0.5)


@st.composite
def events(draw):
    count = draw(st.integers(2, 4))
    number, labels = st.floats(0, 1e9), st.fixed_dictionaries({}, optional={k: st.sampled_from(v) for k, v in DIMENSIONS.items()})
    actions = tuple(
        Action(Agent(draw(WORDS), draw(WORDS), draw(st.none() | number)), draw(WORDS), float(i), draw(number),
               draw(st.none() | st.integers(0, count - 1).filter(lambda k, i=i: k != i)), draw(labels))
        for i in range(count)
    )  # fmt: skip
    posts = tuple(PublicPost(k, draw(WORDS)) for k in sorted(draw(st.lists(st.integers(0, count), max_size=2))))
    return Event(draw(WORDS), "t" + draw(WORDS), draw(WORDS), draw(st.sampled_from(LANGUAGES)), actions, posts, {"J": draw(number)})


@check(25)
@given(st.lists(events(), min_size=1, max_size=2, unique_by=lambda event: event.id))
def test_events_are_read_as_they_were_written(tmp_path_factory, written):
    """Whatever events hold, reading what was written gives equal events."""
    path = tmp_path_factory.getbasetemp() / "round.jsonl"
    write_events(written, path)
    assert load_events(path) == written


# ---- tokenizers


CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "</s>", "[INST]", "<0x41>", " the", "</s"]
# Pieces that spell control tokens, between any other text.
FORGERIES = st.lists(st.sampled_from([*CONTROL, "<", "|", "im_end", ">", "/s", " ", "\n", "the"]) | WORDS, max_size=8).map("".join)


def byte_level() -> dict[str, bytes]:
    """A byte-level BPE whose added tokens, special and not, are also in reach of its merges."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator([word * 3 for word in CONTROL] * 9, trainer)
    model.add_special_tokens(CONTROL[:5])
    model.add_tokens(CONTROL[5:])
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    return {"tokenizer.json": model.to_str().encode(), "chat_template.jinja": template.encode()}


def sentence_piece() -> dict[str, bytes]:
    """A sentencepiece model with control and user-defined pieces."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the dam leaks again and again"] * 20), model_writer=out, model_type="bpe", vocab_size=300,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False,
        user_defined_symbols=CONTROL[1:3], control_symbols=CONTROL[4:5], minloglevel=2,
    )  # fmt: skip
    return {"tokenizer.model": out.getvalue()}


@cache
def tokenizer_kinds() -> list[Tokenizer]:
    """The tiny one, byte-level BPE and sentencepiece."""
    found = [Tokenizer.load(ROOT / "checkpoints" / "tiny")]
    for files in (byte_level(), sentence_piece()):
        with TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            found.append(Tokenizer.load(folder))
    return found


@check(100)
@given(FORGERIES)
def test_the_tiny_tokenizer_decodes_what_it_encoded(text):
    """For any text, decode(encode(text)) is the text."""
    tiny = tokenizer_kinds()[0]
    assert tiny.decode(tiny.encode(text)) == text


@check(60)
@given(FORGERIES)
def test_no_text_gives_a_special_or_added_id(text):
    """Of no tokenizer does any text, however it spells control tokens, give the id of a special or added token."""
    for tokenizer in tokenizer_kinds():
        added = {token.id for token in tokenizer.model.added.values()}
        assert added and not added & set(tokenizer.encode(text))


@check(60)
@given(FORGERIES, FORGERIES)
def test_no_content_of_a_chat_closes_its_turn(content, reply):
    """Whatever is said in a chat, its control tokens are those of the same chat with harmless words, in the same order."""
    chatty = tokenizer_kinds()[1]
    added = {token.id for token in chatty.model.added.values()}

    def control(*said: str) -> list[int]:
        messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)]
        return [id for id in chatty.chat(messages) if id in added]

    assert control(content, reply) == control("x", "y")


def test_unguarded_the_same_words_are_control_tokens():
    """What the test above forbids is what would happen: the tokenizer that decodes reads them as control."""
    model, pieces = (kind.model for kind in tokenizer_kinds()[1:])
    assert {*CONTROL[1:5], "<s>"} <= pieces.added.keys()
    added = {token.id for token in model.added.values()}
    assert all(set(model.full.encode(word).ids) & added for word in CONTROL)


# ---- the information bottleneck's terms


@check(25)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(2, 40), st.sampled_from([0.1, 1.0, 30.0]), st.integers(0, 99))
def test_the_terms_of_the_bottleneck_are_bounded(tokens, dim, vocab, scale, seed):
    """For any hidden states KL >= 0 (-1e-6 for rounding), KL = 0 for equal ones and for those whose logits differ by a
    constant, log mu <= 0 and log r <= 0, and KL is the mean of log mu - log r under mu."""
    generator = torch.Generator().manual_seed(seed)
    hidden, prior, weight = (torch.randn(size, generator=generator) * scale for size in ((tokens, dim), (tokens, dim), (vocab, dim)))
    terms = [ib_loss(hidden, prior, weight, torch.full((tokens,), target)) for target in range(vocab)]
    kl = terms[0].kl
    assert (kl >= -1e-6).all()
    for term in terms:
        assert (term.log_prob <= 0).all() and (term.prior_log_prob <= 0).all()
    log_mu, log_r = (torch.stack([getattr(t, name) for t in terms]).double() for name in ("log_prob", "prior_log_prob"))
    torch.testing.assert_close((log_mu.exp() * (log_mu - log_r)).sum(0), kl.double(), rtol=1e-3, atol=1e-3)
    assert ib_loss(hidden, hidden, weight, torch.zeros(tokens, dtype=torch.int64)).kl.abs().max() <= 1e-6
    flat = torch.cat([weight, torch.ones(vocab, 1)], 1)  # one more dimension, which adds its value to every logit
    moved = [torch.cat([hidden, torch.full((tokens, 1), value)], 1) for value in (0.0, 3.0)]
    assert ib_loss(*moved, flat, torch.zeros(tokens, dtype=torch.int64)).kl.abs().max() <= 1e-4
