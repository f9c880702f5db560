"""generate and log_prob against transformers and against slow, plain implementations of their definitions."""

import os
import re

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as processors

from mfllm_ref.errors import InputError
from mfllm_ref.lm import LanguageModel, language_model, worlds

VOCAB, END = 320, 2
FAMILIES = ("qwen2", "qwen3", "llama", "mistral")  # the models of conftest.py
WORDS = "the 谣言 rumor is 转发 true , false ! 今天天气真好 who knows".split()


def prompts_of(worlds, each, seed=0):
    """`each` prompts a world that begin alike, and their worlds."""
    rng = np.random.default_rng(seed)

    def some(n):
        return " ".join(rng.choice(WORDS, n))

    shared = [some(int(rng.integers(0, 9))) for _ in range(worlds)]
    prompts = [f"{shared[w]} {some(int(rng.integers(1, 6)))}" for w in range(worlds) for _ in range(each)]
    return prompts, [w for w in range(worlds) for _ in range(each)]


def both(folder, family):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder[family], dtype=torch.float64).eval()
    return LanguageModel.load(folder[family], dtype=torch.float64), theirs


def text_of(lm, ids):
    """The text of generated ids, as generate is to return it."""
    ids = ids[: ids.index(END)] if END in ids else ids
    return lm.tokenizer.decode([id for id in ids if id < lm.tokenizer.vocab_size])


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_and_log_probs_equal_transformers(folder, family):
    lm, theirs = both(folder, family)
    prompts, worlds_ = prompts_of(4, 3)
    continuations = [(WORDS[i % 8] + " true !")[: 3 * (i % 5)] for i in range(len(prompts))]
    texts = lm.generate(prompts, max_new_tokens=12, temperature=0, worlds=worlds_)
    scores = lm.log_prob(prompts, continuations, worlds_, end_of_text=True)
    without_end = lm.log_prob(prompts, continuations, worlds_)
    for i, prompt in enumerate(prompts):
        ids = lm.tokenizer.encode(prompt)
        out = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0].tolist()[len(ids) :]
        assert texts[i] == text_of(lm, out)
        target = lm.tokenizer.encode(continuations[i]) + [END]
        log_p = theirs(torch.tensor([ids + target])).logits[0].log_softmax(-1).double()
        steps = log_p[torch.arange(len(ids) - 1, len(ids + target) - 1), target]
        # transformers computes norms in float32, whatever the model's dtype
        assert scores[i].item() == pytest.approx(steps.sum().item(), abs=1e-4)
        assert without_end[i].item() == pytest.approx(steps[:-1].sum().item(), abs=1e-4)
    assert len(set(texts)) > 3  # the prompts matter


def splitmix(seed, position):
    """The documented noise, in Python's integers."""
    mask = 2**64 - 1

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    weyl = 0x9E3779B97F4A7C15
    scrambled = mix((seed + weyl) & mask) ^ mix(((position + 1) * weyl) & mask)
    return (mix((scrambled + weyl) & mask) >> 11) / 2**53


def slow_sample(lm, prompt, seed, steps, temperature=1.0, top_k=0, top_p=1.0, penalty=1.0):
    """Sampling as defined: no cache, no batch, transformers' own logits processors, one uniform a token."""
    chain = transformers.LogitsProcessorList()
    if penalty != 1:
        chain.append(processors.RepetitionPenaltyLogitsProcessor(penalty))
    chain.append(processors.TemperatureLogitsWarper(temperature))
    if top_k:
        chain.append(processors.TopKLogitsWarper(top_k))
    if top_p < 1:
        chain.append(processors.TopPLogitsWarper(top_p))
    ids = lm.tokenizer.encode(prompt)
    start = len(ids)
    for position in range(steps):
        row = torch.tensor([ids])
        shares = chain(row, lm.backbone(row)[:, -1]).softmax(-1)[0].tolist()
        noise, passed = splitmix(seed, position), 0.0
        ids.append(next(i for i, share in enumerate(shares) if (passed := passed + share) > noise))
        if ids[-1] == END:
            break
    return text_of(lm, ids[start:])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3, "top_k": 5},
        {"temperature": 1.7, "top_p": 0.8},
        {"temperature": 0.7, "top_k": 40, "top_p": 0.6, "penalty": 1.4},
        {"penalty": 0.7},
    ],
)
def test_sampling_equals_its_slow_definition(lm, options):
    prompts, worlds_ = prompts_of(3, 2, seed=1)
    seeds = [7, -1, 2**70 + 3, 0, 12345, 7]
    ours = {("repetition_penalty" if key == "penalty" else key): value for key, value in options.items()}
    texts = lm.generate(prompts, max_new_tokens=8, seeds=seeds, worlds=worlds_, **ours)
    assert texts == [slow_sample(lm, p, s, 8, **options) for p, s in zip(prompts, seeds, strict=True)]
    unseeded = [slow_sample(lm, prompt, i, 8, **options) for i, prompt in enumerate(prompts[:2])]
    assert lm.generate(prompts[:2], 8, **ours) == unseeded


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_no_token_depends_on_the_batch(folder, family, temperature, monkeypatch):
    """Invariant: alone or together, in any order, under any world keys, in one chunk or many, the texts are equal."""
    lm = LanguageModel.load(folder[family], dtype=torch.float64)
    prompts, worlds_ = prompts_of(4, 4, seed=2)
    seeds = [100 + i for i in range(len(prompts))]

    def run(order, keys):
        some = lm.generate(
            [prompts[i] for i in order], 10, temperature, seeds=[seeds[i] for i in order], worlds=keys, stop=["!"]
        )
        return [some[list(order).index(i)] for i in range(len(order))]

    together = run(range(len(prompts)), worlds_)
    alone = [
        lm.generate([p], 10, temperature, seeds=[s], stop=["!"])[0] for p, s in zip(prompts, seeds, strict=True)
    ]
    assert together == alone
    order = np.random.default_rng(0).permutation(len(prompts)).tolist()
    assert run(order, [-3 * worlds_[i] for i in order]) == together
    assert run(range(len(prompts)), None) == together
    cuts = []
    decode = lm._decode
    monkeypatch.setattr(lm, "_decode", lambda ids, chunk, *rest: cuts.append(chunk) or decode(ids, chunk, *rest))
    monkeypatch.setattr(language_model, "LOGITS", 3 * VOCAB)
    monkeypatch.setattr(language_model, "CACHE_BYTES", 60 * 1024)
    monkeypatch.setattr(worlds, "PACKED", (7, 7))
    assert run(order, [worlds_[i] for i in order]) == together
    assert len(cuts) > 4 and max(sum(len(w.agents) for w in chunk) for chunk in cuts) <= 3


@given(
    rows=st.lists(
        st.tuples(st.integers(-2, 2), st.lists(st.sampled_from([3, 4]), min_size=1, max_size=7),
                  st.lists(st.integers(0, VOCAB - 1), max_size=4)),
        max_size=8,
    )  # fmt: skip
)
@settings(max_examples=40, derandomize=True, deadline=None)
def test_log_prob_is_the_sum_over_tokens_of_each_row_by_itself(lm, rows):
    """Invariant: for any prompts (equal ones, one a prefix of another, one token), any worlds and any continuations
    (empty ones too), log_prob is the plain sum of log-softmax values of the row run alone."""
    keys, prompts, targets = [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]
    scores = lm.log_prob(prompts, targets, keys)
    assert scores.shape == (len(rows),) and scores.dtype == torch.float64
    for score, prompt, target in zip(scores, prompts, targets, strict=True):
        log_p = lm.backbone(torch.tensor([prompt + target]))[0].log_softmax(-1)
        steps = log_p[torch.arange(len(prompt) - 1, len(prompt + target) - 1), target]
        torch.testing.assert_close(score, steps.sum(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
@pytest.mark.parametrize("logits", [2**24, 8 * VOCAB])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_gradients_pass_through_the_shared_prefix(folder, family, logits, targets, monkeypatch):
    """An adapter's gradient equals that of the rows run one by one, with the logits made in one go or in pieces, and
    taken when the adapter is off again."""
    monkeypatch.setattr(language_model, "LOGITS", logits)
    monkeypatch.setattr(worlds, "PACKED", (20, 20))
    lm = LanguageModel.load(folder[family], dtype=torch.float64)
    lm.add_adapter("a", rank=2, targets=targets, seed=0)
    parameters = lm.adapters.parameters("a")
    with torch.no_grad():
        for i, weight in enumerate(parameters):
            weight.normal_(generator=torch.Generator().manual_seed(i)).mul_(0.1)
    prompts, worlds_ = prompts_of(3, 3, seed=4)
    continuations = [" true !", "", " no", " 谣言"] * 2 + ["x"]
    with lm.adapter("a"):
        scores = lm.log_prob(prompts, continuations, worlds_, end_of_text=True)
        total = torch.zeros((), dtype=torch.float64)
        for i, (prompt, text) in enumerate(zip(prompts, continuations, strict=True), 1):
            ids, target = lm.tokenizer.encode(prompt), lm.tokenizer.encode(text) + [END]
            log_p = lm.backbone(torch.tensor([ids + target]))[0].log_softmax(-1)
            total = total + i * log_p[torch.arange(len(ids) - 1, len(ids + target) - 1), target].sum()
    grads = torch.autograd.grad((scores * torch.arange(1, 10)).sum(), parameters)
    expected = torch.autograd.grad(total, parameters)
    for grad, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-8, atol=1e-10)
    with torch.no_grad(), lm.adapter("a"):
        assert not lm.log_prob(prompts, continuations).requires_grad


def test_prefixes_are_computed_once_and_finished_agents_are_dropped(lm, monkeypatch):
    """Counts tokens through the backbone: a world's common part once, and no row of an agent that ended long ago."""
    prompts = ["the rumor is true , who knows !" + tail for tail in (" a", " b", " c", " d")] * 4
    ids = [lm.tokenizer.encode(prompt) for prompt in prompts]
    sizes = []
    hidden = lm.backbone.hidden
    monkeypatch.setattr(lm.backbone, "hidden", lambda ids, *rest: sizes.append(ids.numel()) or hidden(ids, *rest))
    full = lm.generate(prompts, max_new_tokens=16, stop=["\0never"])
    common = os.path.commonprefix(ids)
    assert sizes[0] == len(common) > 9 and sizes[1] == sum(len(row) - len(common) for row in ids)
    sizes.clear()
    counts = sorted(len(lm.tokenizer.encode(text)) for text in full)
    # "e" is common: most agents stop early, one after another
    texts = lm.generate(prompts, max_new_tokens=16, stop=["e", "a", "o", "i"])
    assert all(not set(text) & set("eaoi") for text in texts) and counts[-1] > 0
    steps = sizes[2:]
    assert steps == sorted(steps, reverse=True) and steps[-1] < len(prompts) / 2
    expected = [min([text.find(s) for s in "eaoi" if s in text], default=len(text)) for text in full]
    assert texts == [text[:cut] for text, cut in zip(full, expected, strict=True)]


def test_rows_in_multiples_change_nothing(lm, monkeypatch):
    """Invariant: with the surplus rows that a CPU's bfloat16 products get, texts and log-probabilities are what they were."""
    prompts, worlds_ = prompts_of(4, 8, seed=5)

    def run():
        texts = lm.generate(prompts, 16, worlds=worlds_, stop=["e", "a", "o", "i"])
        return texts, lm.log_prob(prompts, ["who knows", "", "a rumor !", "no"] * (len(prompts) // 4), worlds_)

    (texts, scores), sizes = run(), []
    monkeypatch.setattr(worlds, "grain", lambda count, weight: 7)
    hidden = lm.backbone.hidden
    monkeypatch.setattr(lm.backbone, "hidden", lambda ids, *rest: sizes.append(ids.numel()) or hidden(ids, *rest))
    again, rescored = run()
    assert again == texts and torch.allclose(rescored, scores, rtol=1e-12, atol=1e-12)
    assert 21 in sizes and {size % 7 for size in sizes if size != len(prompts)} == {0}


@pytest.mark.parametrize("dtype, device, expected", [("bfloat16", "cpu", 48), ("float32", "cpu", 33), ("bfloat16", "meta", 33)])
def test_rows_come_in_multiples_where_each_number_of_them_costs(dtype, device, expected):
    weight = torch.empty(0, dtype=getattr(torch, dtype), device=device)
    assert worlds.rounded(33, weight) == expected and worlds.rounded(0, weight) == 0
    assert worlds.rounded(1025, weight) == (1088 if expected == 48 else 1025)


def test_text_ends_before_the_first_stop_string(lm):
    prompts, worlds_ = prompts_of(2, 4, seed=6)
    full = lm.generate(prompts, max_new_tokens=30, worlds=worlds_)
    whole = [part for text in full for part in re.findall("[^\ufffd]{3,}", text)]  # no pieces of unfinished characters
    characters = sorted(set("".join(whole)))
    for stop in ([whole[0][1:3]], [whole[1][:2], whole[2], "\0never"], whole[3][2], [" "], *characters[::8], *characters[-3:]):
        found = [stop] if isinstance(stop, str) else stop
        expected = [text[: min((text.find(s) for s in found if s in text), default=None)] for text in full]
        assert lm.generate(prompts, max_new_tokens=30, worlds=worlds_, stop=stop) == expected
        assert expected != full or stop == [" "]


def test_a_stop_string_ends_the_work_too(lm, monkeypatch):
    """Where every text holds a stop string early on, decoding takes few of its steps."""
    prompts, _ = prompts_of(2, 4, seed=6)
    steps, step = [], language_model.Step.__call__
    monkeypatch.setattr(language_model.Step, "__call__", lambda self, ids: steps.append(1) or step(self, ids))
    full = lm.generate(prompts, max_new_tokens=30)
    all_steps = len(steps)
    assert all(full) and lm.generate(prompts, max_new_tokens=30, stop=[text[0] for text in full]) == [""] * len(full)
    assert len(steps) - all_steps < all_steps / 3


def test_an_adapter_in_use_survives_generate_and_every_bit_comes_back(folder):
    lm = LanguageModel.load(folder["qwen2"], dtype=torch.float32)
    before = {name: weight.clone() for name, weight in lm.backbone.named_parameters()}
    lm.add_adapter("a", rank=4, targets="all-linear", seed=0)
    with torch.no_grad():
        for i, weight in enumerate(lm.adapters.parameters("a")):
            weight.normal_(generator=torch.Generator().manual_seed(i)).mul_(0.2)
    bare = lm.generate(["the rumor"], 8, temperature=0)
    with lm.adapter("a"):
        ids = lm.tokenizer.encode("the rumor")
        with torch.no_grad():
            for _ in range(8):
                ids.append(int(lm.backbone(torch.tensor([ids]))[0, -1].argmax()))
        adapted = lm.generate(["the rumor"], 8, temperature=0)
        assert adapted == [text_of(lm, ids[len(lm.tokenizer.encode("the rumor")) :])] != bare
        assert lm.adapters.active == "a" and lm.log_prob(["a"], ["b"]).requires_grad
        with lm.adapter(None):
            assert lm.generate(["the rumor"], 8, temperature=0) == bare
        assert lm.adapters.active == "a"
    assert lm.adapters.active is None
    for name, weight in lm.backbone.named_parameters():
        assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize("logits", [2**24, 5 * VOCAB])
def test_adapters_decode_together_as_each_does_alone(folder, logits, monkeypatch):
    """Invariant: with one adapter a prompt, of different ranks and layers, texts are those under each adapter alone."""
    monkeypatch.setattr(language_model, "LOGITS", logits)
    lm = LanguageModel.load(folder["qwen2"], dtype=torch.float64)
    made = {"a": (2, "all-linear"), "b": (3, ["q_proj", "lm_head"]), "c": (4, ["down_proj"])}
    for name, (rank, targets) in made.items():
        lm.add_adapter(name, rank, targets=targets, seed=0)
        with torch.no_grad():
            for i, weight in enumerate(lm.adapters.parameters(name)):
                weight.normal_(generator=torch.Generator().manual_seed(i + rank)).mul_(0.2)
    prompts, worlds_ = prompts_of(4, 6, seed=3)
    names = [(None, "a", "b", "c", "a", None)[i % 6] for i in range(len(prompts))]
    how = {"max_new_tokens": 12, "stop": ["e", "!"], "repetition_penalty": 1.1}
    seeds = list(range(len(prompts)))
    with lm.adapter("c"):
        together = lm.generate(prompts, seeds=seeds, worlds=worlds_, adapters=names, **how)
        assert lm.adapters.active == "c"
    bare = lm.generate(prompts, seeds=seeds, **how)
    for name in (None, *made):
        with lm.adapter(name):
            alone = lm.generate(prompts, seeds=seeds, **how)
        assert [t for t, n in zip(together, names, strict=True) if n == name] == [
            t for t, n in zip(alone, names, strict=True) if n == name
        ]
        assert name is None or alone != bare
    with pytest.raises(InputError, match="no adapter named 'd'"):
        lm.generate(["a", "b"], adapters=[None, "d"])
    assert lm.generate(prompts, seeds=seeds, **how) == bare, "a refused name leaves nothing behind"


def test_an_adapter_goes_to_disk_and_back(lm, tmp_path):
    lm.add_adapter("saved", rank=2, seed=1)
    with torch.no_grad():
        for weight in lm.adapters.parameters("saved"):
            weight.fill_(0.05)
    lm.save_adapter("saved", tmp_path)
    lm.load_adapter("loaded", tmp_path)
    scores = []
    for name in ("saved", "loaded", None):
        with torch.no_grad(), lm.adapter(name):
            scores.append(lm.log_prob(["the rumor"], [" is true"]).item())
    assert scores[0] == scores[1] != scores[2]
