"""The committed backbone and its adapters: small, loadable elsewhere, and able to do what the default simulation asks of them."""

import json
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mfllm_ref import ib_tune
from mfllm_ref.lm import LanguageModel
from mfllm_ref.society import agora, prompts
from mfllm_ref.society.annotate import RuleAnnotator
from mfllm_ref.society.corpus import Past
from mfllm_ref.society.methods import METHODS
from mfllm_ref.society.response import response_curves, slope
from mfllm_ref.society.signals import parse

TINY = Path(__file__).resolve().parents[1] / "checkpoints" / "tiny"
ADAPTERS = TINY.with_name("tiny-adapters")
NAMES = sorted({name for method in METHODS.values() for name in (method.policy, method.mean_field) if name})


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel.load(TINY)


def test_it_is_small_and_of_type_qwen2():
    assert sum(path.stat().st_size for path in TINY.rglob("*")) <= 10e6
    assert json.loads((TINY / "config.json").read_text())["model_type"] == "qwen2"


def test_it_loads_in_transformers_with_the_same_logits(tiny):
    text = "Topic: A scandal in Redwick.\nUser: Ada, 34, nurse\nPost:\nI do not believe it."
    ids = tiny.tokenizer.encode(text)
    assert PreTrainedTokenizerFast.from_pretrained(TINY).encode(text) == ids
    oracle = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    with torch.no_grad():
        assert (oracle(torch.tensor([ids])).logits - tiny.backbone(torch.tensor([ids]))).abs().max() < 1e-4


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_its_tokenizer_decodes_what_it_encoded(tiny, text):
    """For any text decode(encode(text)) is the text."""
    assert tiny.tokenizer.decode(tiny.tokenizer.encode(text)) == text


def test_it_acts_writes_summaries_and_follows_its_signal(tiny):
    annotate = RuleAnnotator()
    pasts = [Past(agora.event("train", index), annotate, 10) for index in range(2)]
    event = pasts[0].event
    shared = prompts.policy_shared("en", event.topic)
    texts = tiny.generate([shared + prompts.policy_private("en", a.agent.profile) for a in event.actions[:20]], 48, stop=("\n",))
    words = {word for action in event.actions for word in action.text.split()}
    said = [word for text in texts for word in text.split()]
    assert sum(word in words for word in said) > 0.5 * len(said), "it speaks agora's language"
    summary = tiny.generate([pasts[0].summarise(3, pasts[0].population[3])], 120, stop=("\n",))[0]
    assert len(parse(summary, "en")) == 8, "a summary states all eight dimensions"
    assert slope(response_curves(tiny, pasts, annotate)["behavior_type"]) > 0.1


@pytest.mark.parametrize("merged", [False, True])
def test_bfloat16_stays_close_to_float32(tiny, merged):
    """What the doors use where the CPU is fast with it: the next token's distribution moves by some 1e-4 nats, much less
    than an adapter moves it, also where an adapter was folded into the rounded weights."""
    coarse, lms = LanguageModel.load(TINY, dtype=torch.bfloat16), []
    event = agora.event("dev", 0)
    shared = prompts.policy_shared("en", event.topic)
    texts = [shared + prompts.policy_private("en", a.agent.profile) + a.text for a in event.actions[:12]]
    for lm in (tiny, coarse):
        if merged:
            lm.add_adapter("rounded", rank=8, targets="all-linear", seed=0)
            for i, weight in enumerate(lm.adapters.parameters("rounded")[1::2]):
                weight.detach().normal_(generator=torch.Generator().manual_seed(i)).mul_(0.02)
            lm.adapters.merge("rounded")
        with torch.no_grad():
            lms.append([lm.backbone(torch.tensor([lm.tokenizer.encode(text)]))[0].float().log_softmax(-1) for text in texts])
        lm.adapters.activate(None)
    with torch.no_grad():
        bare = [tiny.backbone(torch.tensor([tiny.tokenizer.encode(text)]))[0].log_softmax(-1) for text in texts]
    kl, effect = (
        torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(lms[0], others, strict=True)]).mean()
        for others in (lms[1], bare)
    )
    assert 1e-6 < kl < 5e-4
    assert effect > 5 * kl if merged else effect < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_is_small_and_loads_here_and_in_peft(tiny, name):
    assert sum(path.stat().st_size for path in (ADAPTERS / name).iterdir()) <= 1e6
    ids = torch.tensor([tiny.tokenizer.encode("Topic: A scandal in Redwick.\nUser: Ada, 34, nurse\nPost:\n")])
    oracle = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32), ADAPTERS / name)
    tiny.load_adapter(name, ADAPTERS / name)
    with torch.no_grad(), tiny.adapter(name):
        tuned = tiny.backbone(ids)
        assert (oracle(ids).logits - tuned).abs().max() < 1e-4
    assert (tiny.backbone(ids) - tuned).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["recent", "popular", "empirical"])
def test_a_tuned_policy_expects_more_of_what_people_did(tiny, kind):
    """On events that no training has seen, real actions are likelier under the adapter than under the bare backbone."""
    tiny.load_adapter(f"tuned {kind}", ADAPTERS / f"{kind}-sft")
    pasts = [Past(agora.event("test", index), RuleAnnotator(), 10) for index in range(14)]
    documents = [past.policy(step, kind, 10) for past in pasts for step in (4, 9)]
    found = []
    for name in (None, f"tuned {kind}"):
        with torch.no_grad(), tiny.adapter(name):
            found.append(ib_tune.log_likelihood(tiny, documents)[0].mean().item())
    assert found[1] > found[0]
