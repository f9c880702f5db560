"""IB-Tune's updates on populations: who writes, who rewards, what is learned and what a dev split says."""

import math
from dataclasses import replace

import pytest
import torch

from mfllm_ref import ib_tune
from mfllm_ref.errors import InputError
from mfllm_ref.ib_tune import Chain, Chains, Settings, surrogate
from mfllm_ref.lm import LanguageModel, language_model
from mfllm_ref.society import agora, prompts
from mfllm_ref.society.annotate import RuleAnnotator
from mfllm_ref.society.corpus import Past
from mfllm_ref.society.events import hashed
from mfllm_ref.training import at


@pytest.fixture(scope="module")
def pasts():
    return [Past(agora.event("train", index), RuleAnnotator(), 10) for index in range(3)]


@pytest.fixture
def tuned(random_lm):
    """With adapters that are neither the identity, as fresh ones are, nor one another."""
    for seed, name in enumerate(ADAPTERS):
        random_lm.add_adapter(name, rank=2, targets="all-linear", seed=seed)
        for b in random_lm.adapters.parameters(name)[1::2]:
            b.detach().normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
    yield random_lm
    for name in ADAPTERS:
        del random_lm.adapters.adapters[name]


ADAPTERS = ("mean-field", "policy", "sft")
SMALL = Settings(rows=3, micro=2, samples=2, summary_tokens=6, beta=2.0)


def test_an_update_is_the_estimator_on_its_own_samples(tuned, pasts, monkeypatch):
    """Whatever micro-batches it is cut into, an update's gradient is that of the surrogate over all its chains, repeated tokens
    off the reward. It is logged and clipped, moves the adapter at the schedule's rate, and the chains go on with sample 1."""
    assert ib_tune.repeated([1, 2, 1, 1]) == 2
    monkeypatch.setattr(ib_tune, "repeated", lambda ids: sum(ids) % 5)  # six random tokens hardly repeat
    settings = replace(SMALL, repetition_penalty=3.0, steps=10, clip=1e-3)
    now = list(Chains(pasts, 3, 0).chains)
    gradients = []
    for micro in (1, 2, 3):
        chains = Chains(pasts, 3, 0)
        update = ib_tune.mean_field_update(tuned, chains, replace(settings, micro=micro), 5, "mean-field", None)
        tuned.backbone.zero_grad()
        parameters = tuned.adapters.parameters("mean-field")
        total = sum(update.loss(slice(i, i + micro))[0] * len(range(3)[i : i + micro]) / 3 for i in range(0, 3, micro))
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)]))
    sampled = ib_tune.draw(tuned, pasts, now, 2, settings, 5, "mean-field", None)
    log_prob, kl = ib_tune.information_terms(tuned, pasts, now, sampled.ids, "mean-field")
    reward = sampled.reward - 3.0 * torch.tensor([[sum(ids) % 5 for ids in some] for some in sampled.ids])
    assert (reward < sampled.reward).any()
    whole = surrogate(log_prob, kl, reward, 2.0).mean()
    gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(whole, parameters)]))
    assert gradients[0].abs().max() > 0
    for gradient_ in gradients[1:]:
        assert torch.allclose(gradient_, gradients[0], atol=1e-9)
    goes_on = [(after, texts) for after, before, texts in zip(chains.chains, now, sampled.texts) if after.past == before.past]
    assert goes_on and all(after.summary == texts[0] != texts[1] for after, texts in goes_on)
    before = [p.detach().clone() for p in parameters]
    row = ib_tune.apply(tuned, update, torch.optim.SGD(parameters, lr=1e-2), 5, settings)
    expected = {"kl": kl.sum(-1).mean(), "reward": sampled.reward.mean(), "loss": kl.sum(-1).mean() - 2 * reward.mean()}
    for name, value in (expected | {"gradient_norm": gradients[0].norm()}).items():
        assert row[name] == pytest.approx(value.item(), abs=1e-9) != 0
    moved = torch.cat([(p - q).flatten() for p, q in zip(parameters, before, strict=True)])
    assert row["gradient_norm"] > 1e-3 and ib_tune.learning_rate(5, 10, 1e-2) < 1e-2
    assert float(moved.norm()) == pytest.approx(1e-3 * ib_tune.learning_rate(5, 10, 1e-2), rel=1e-3)


def nats(lm, adapter, document):
    """Log-likelihood of a document's actions under an adapter, one by one."""
    with lm.adapter(adapter), torch.no_grad():
        told, acted = [document.prefix + p for p, _ in document.branches], [a for _, a in document.branches]
        return float(lm.log_prob(told, acted, worlds=range(len(told)), end_of_text=True).sum())


def test_summaries_are_the_mean_fields_own_and_the_policy_rewards_them(tuned, pasts):
    """m ~ mu under its adapter; R(m): the real actions of `step`, told m, under the policy's adapter, end of text included."""
    assert ib_tune.as_summary(" a  b \nc") == "a b"
    now = [Chain(0, 4), Chain(2, 7, "stance: oppose 40%")]
    sampled = ib_tune.draw(tuned, pasts, now, 2, SMALL, 0, "mean-field", "policy")
    for row, chain in enumerate(now):
        past = pasts[chain.past]
        for k in range(2):
            with tuned.adapter("mean-field"):
                told, seed = past.summarise(chain.step - 1, chain.summary), hashed("ib-tune", SMALL.seed, 0, row, k)
                assert [sampled.ids[row][k]] == tuned.sample([told], SMALL.summary_tokens, [seed])
            assert sampled.texts[row][k] == ib_tune.as_summary(tuned.tokenizer.decode(sampled.ids[row][k]))
            document = past.told(chain.step, ib_tune.signal_of(sampled.texts[row][k]))
            assert float(sampled.reward[row, k]) == pytest.approx(nats(tuned, "policy", document), abs=1e-9)
            assert [a for _, a in document.branches] == [" ".join(a.text.split()) for a in past.actions(chain.step)]


def test_ids_beyond_the_tokenizers_say_nothing(tuned, pasts, monkeypatch):
    """As a backbone whose vocabulary is padded beyond its tokenizer's may draw, Qwen2's for one."""
    known = tuned.tokenizer.encode("stance: oppose 40%")
    monkeypatch.setattr(tuned, "sample", lambda prompts, *_: [[*known, tuned.tokenizer.vocab_size + 7] for _ in prompts])
    sampled = ib_tune.draw(tuned, pasts, [Chain(0, 4)], 2, SMALL, 0, "mean-field", "policy")
    assert sampled.texts == [["stance: oppose 40%"] * 2]


def test_information_is_of_a_chain_under_three_adapters(tuned, pasts):
    """KL of mu to the bare backbone told the bare instruction, R(m) under the policy, and the same actions told nothing."""
    found = ib_tune.information(tuned, pasts[:1], SMALL, "mean-field", "policy", "sft", length=2)
    past, expected = pasts[0], torch.zeros(3)
    chain = ib_tune.begun(pasts, 0, 1 + hashed("dev", past.event.id) % (past.steps - 2))
    for turn in range(2):
        sampled = ib_tune.draw(tuned, pasts, [chain], 1, SMALL, f"dev {turn}", "mean-field", "policy")
        with tuned.adapter("mean-field"), torch.no_grad():
            told, bare = past.summarise(chain.step - 1, chain.summary), prompts.prior_prompt("en")
            kl = float(tuned.ib_terms([told], sampled.ids[0], [bare]).kl.sum())
        blind = nats(tuned, "sft", past.told(chain.step, None))
        expected += torch.tensor([kl, float(sampled.reward), blind]) / 2
        chain = Chain(0, chain.step + 1, sampled.texts[0][0])
    assert found == pytest.approx(dict(zip(("kl", "reward", "blind"), expected.tolist())), rel=1e-5)


def test_a_chain_that_begins_mid_event_is_told_the_exact_shares_before(tuned, pasts, monkeypatch):
    """Only an event's first step knows of no population: an empty summary anywhere else is never seen in a rollout."""
    drawn, draw = [], ib_tune.draw

    def watched(lm, pasts, chains, *rest):
        drawn.extend(chains)
        return draw(lm, pasts, chains, *rest)

    monkeypatch.setattr(ib_tune, "draw", watched)
    ib_tune.information(tuned, pasts, SMALL, None, None, length=1)
    begun = [*drawn, *Chains(pasts, 4, 3).chains]
    assert len(drawn) == len(pasts) and any(chain.step > 1 for chain in drawn) and any(chain.step > 1 for chain in begun[len(drawn):])
    for chain in begun:
        assert chain.summary == pasts[chain.past].population[chain.step - 1]
        assert (chain.summary == "") == (chain.step == 1)


def test_chains_go_on_with_sample_one_and_can_be_put_down_and_taken_up(pasts):
    chains = Chains(pasts, 4, 3)
    assert len({chain.step for chain in chains.chains}) > 1, "rows are out of phase"
    before = list(chains.chains)
    chains.advance([f"m{row}" for row in range(4)])
    for chain, earlier, row in zip(chains.chains, before, range(4), strict=True):
        assert chain in (Chain(earlier.past, earlier.step + 1, f"m{row}"), replace(chain, step=1, summary=""))
    again = Chains(pasts, 4, 3, chains.state)
    for _ in range(40):
        assert again.chains == chains.chains
        for each in (again, chains):
            each.advance(["x"] * 4)
    assert all(1 <= chain.step < pasts[chain.past].steps for chain in chains.chains)


def test_a_policy_reads_summaries_of_likely_tokens_and_a_gradient_those_of_all(tuned, pasts, monkeypatch):
    """`summaries` are those of a rollout; `draw` samples mu itself, as its gradient's expectation is over mu."""
    read = ib_tune.summaries(tuned, pasts[:1], "mean-field", replace(SMALL, summary_top_p=1e-9), until=2)
    (greedy,) = tuned_to_end(tuned, pasts[0].summarise(0, ""))
    assert read[0][1] == ib_tune.as_summary(greedy) != ib_tune.summaries(tuned, pasts[:1], "mean-field", SMALL, until=2)[0][1]
    chains = [ib_tune.begun(pasts, 0, 1)]
    assert len({
        str(ib_tune.draw(tuned, pasts, chains, 2, replace(SMALL, summary_top_p=p), 0, "mean-field", None).ids) for p in (0.1, 1.0)
    }) == 1  # fmt: skip


def tuned_to_end(lm, prompt):
    with lm.adapter("mean-field"):
        return lm.generate([prompt], SMALL.summary_tokens, temperature=0, stop=("\n",))


def test_the_policy_stage_learns(tuned, pasts):
    """A few updates on one batch raise the likelihood of its actions; the backbone does not move."""
    settings = Settings(steps=8, rows=3)
    documents = [past.policy(4, "empirical", 10) for past in pasts]
    weights = [p.clone() for p in tuned.backbone.parameters()]
    optimizer = torch.optim.AdamW(tuned.adapters.parameters("policy"), lr=2e-2)
    with tuned.adapter("policy"), torch.no_grad():
        reward, tokens = ib_tune.log_likelihood(tuned, documents)
    rows = [
        ib_tune.apply(tuned, ib_tune.policy_update(tuned, documents, "policy", "it"), optimizer, step, settings)
        for step in range(8)
    ]
    assert rows[0]["reward"] == -rows[0]["loss"] == pytest.approx(float(reward.mean()))
    assert rows[0]["action_nll"] == pytest.approx(-float(reward.sum() / tokens.sum()))
    assert rows[-1]["loss"] < rows[0]["loss"] - 1 and rows[-1]["action_nll"] < rows[0]["action_nll"]
    assert all(torch.equal(p, q) for p, q in zip(weights, tuned.backbone.parameters(), strict=True))


def test_mixed_precision_has_nearly_the_gradient_of_float32_and_an_exact_kl(random_folder, pasts, monkeypatch):
    """Products in bfloat16 turn neither stage's gradient; the KL's own logits stay float32, or its small values would drown."""
    lm, dtypes = LanguageModel.load(random_folder), []
    inner = language_model.ib_loss

    def watched(*inputs):
        dtypes.append((torch.is_autocast_enabled("cpu"), *(x.dtype for x in inputs[:3])))
        return inner(*inputs)

    monkeypatch.setattr(language_model, "ib_loss", watched)
    for name in ("mean-field", "policy"):
        lm.add_adapter(name, rank=4, targets="all-linear", seed=0)
        for b in lm.adapters.parameters(name)[1::2]:
            b.detach().normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    documents = [past.policy(4, "empirical", 10) for past in pasts]
    for name in ("mean-field", "policy"):
        found = []
        for mixed in (False, True):
            settings = replace(SMALL, mixed=mixed, clip=1e9)
            parameters = lm.adapters.parameters(name)
            if name == "policy":
                update = ib_tune.policy_update(lm, documents, name, "it")
            else:
                update = ib_tune.mean_field_update(lm, Chains(pasts, 3, 0), settings, 5, name, None)
            ib_tune.apply(lm, update, torch.optim.SGD(parameters, lr=1e-30), 0, settings)
            found.append(torch.cat([p.grad.flatten() for p in parameters]))
        assert 0.99 < torch.cosine_similarity(*found, dim=0) < 1 and not torch.equal(*found)
    assert set(dtypes) == {(False, torch.float32, torch.float32, torch.float32)}


def test_a_loss_that_is_not_finite_stops_before_anything_moves(tuned, pasts):
    parameters = tuned.adapters.parameters("policy")
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    before = [p.detach().clone() for p in parameters]
    update = ib_tune.Update(2, lambda some: (parameters[0].sum() * (math.nan if some.start else 1), {}), dict, "event e step 3")
    with pytest.raises(FloatingPointError, match=r"nan at step 7 \(event e step 3\)"):
        ib_tune.apply(tuned, update, optimizer, 7, Settings(micro=1))
    assert all(torch.equal(p, q) for p, q in zip(before, parameters, strict=True))
    with pytest.raises(InputError, match=r"positions at step 7 \(event e step 3\)"), at(7, "event e step 3"):
        tuned.log_prob([[5] * 10**4], [[5]])
