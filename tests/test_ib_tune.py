"""The gradient of IB-Tune against the truth: on a backbone with four tokens every summary can be enumerated."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from mfllm_ref import ib_tune
from mfllm_ref.ib_tune import surrogate
from mfllm_ref.lm import LanguageModel
from mfllm_ref.lm.backbone import Backbone
from mfllm_ref.lm.config import Config

END, VOCAB = 0, 4
TOPIC, PROFILES, ACTIONS = [1, 2, 3, 1], ([2], [3, 3], [1]), ([1, 2], [3], [2, 2, 1])


@pytest.fixture(scope="module")
def lm():
    """Two layers, four tokens, float64, adapters that are not the identity."""
    torch.manual_seed(0)
    config = Config.from_json(
        {"model_type": "qwen2", "vocab_size": VOCAB, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 12, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
         "max_position_embeddings": 64, "tie_word_embeddings": False}, "test",
    )  # fmt: skip
    backbone = Backbone(config).double()
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    tokenizer = SimpleNamespace(bos_id=None, end_id=END, eos_ids=(END,), vocab_size=VOCAB, encode_batch=lambda texts: [[]] * len(texts))
    out = LanguageModel(backbone, tokenizer)
    for name in ("mean-field", "policy"):
        out.add_adapter(name, rank=2, alpha=2.0, targets=("q_proj", "v_proj", "down_proj"), seed=1)
        for parameter in out.adapters.parameters(name):
            torch.nn.init.normal_(parameter, std=0.5)
    return out


def all_summaries(most):
    """Every sequence that sampling at most `most` tokens can give."""
    whole = [[*body, END] for n in range(most) for body in itertools.product(range(1, VOCAB), repeat=n)]
    return whole + [list(body) for body in itertools.product(range(1, VOCAB), repeat=most)]


def terms(lm, most):
    """(log mu [M, positions], kl [M, positions], R [M]) of all M summaries."""
    summaries = all_summaries(most)
    with lm.adapter("mean-field"):
        found = lm.ib_terms([TOPIC] * len(summaries), summaries, [[1]] * len(summaries))
    with lm.adapter("policy"), torch.no_grad():
        told = [TOPIC + m + profile for m in summaries for profile in PROFILES]
        reward = lm.log_prob(told, list(ACTIONS) * len(summaries), end_of_text=True).view(len(summaries), -1).sum(1)
    return found.log_prob, found.kl, reward


def gradient(value, lm):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, lm.adapters.parameters("mean-field"), retain_graph=True)])


def exact(lm, most, beta, with_kl):
    """grad of sum_m mu(m) [sum_j k_j - beta R], every term differentiated."""
    log_prob, kl, reward = terms(lm, most)
    probability = log_prob.sum(1).exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-12), "the summaries are all there are"
    return gradient((probability * (kl.sum(1) * with_kl - beta * reward)).sum(), lm)


def expectation(lm, most, samples, beta, with_kl, estimator=surrogate):
    """The expected gradient of `estimator` over all K-tuples of independent samples."""
    log_prob, kl, reward = terms(lm, most)
    chosen = torch.tensor(list(itertools.product(range(len(reward)), repeat=samples)))
    weight = log_prob.detach().sum(1)[chosen].sum(1).exp()
    return gradient((weight * estimator(log_prob[chosen], kl[chosen] * with_kl, reward[chosen], beta)).sum(), lm)


@pytest.mark.parametrize(("most", "samples"), [(3, 2), (2, 3), (2, 4)])
@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_the_expected_gradient_is_the_exact_one(lm, most, samples, beta):
    """E[estimate] = grad L_mu, for the KL and the reward together and each alone."""
    for weight, with_kl in ((beta, 1.0), (beta, 0.0), (0.0, 1.0)):
        truth = exact(lm, most, weight, with_kl)
        assert truth.abs().max() > 1e-4
        assert (expectation(lm, most, samples, weight, with_kl) - truth).abs().max() < 1e-6


def mean_reward(log_prob, kl, reward, beta):
    return surrogate(log_prob, kl, reward / len(ACTIONS), beta)


def without_future_kl(log_prob, kl, reward, beta):
    return kl.sum((-1, -2)) / kl.shape[-2] + surrogate(log_prob, torch.zeros_like(kl), reward, beta)


def own_sample_minimised(log_prob, kl, reward, beta):
    """No reward path: log mu - log r of its own sample, which is log mu for the gradient."""
    return log_prob.sum(-1).mean(-1)


def baseline_with_itself(log_prob, kl, reward, beta):
    fixed = kl.detach()
    cost = fixed.flip(-1).cumsum(-1).flip(-1) - fixed - beta * reward[..., None]
    return (kl + log_prob * (cost - cost.mean(-2, keepdim=True))).sum(-1).mean(-1)


@pytest.mark.parametrize("biased", [mean_reward, without_future_kl, own_sample_minimised, baseline_with_itself])
def test_biased_estimators_fail_the_same_test(lm, biased):
    truth = exact(lm, 3, 1.0, 1.0)
    assert (expectation(lm, 3, 2, 1.0, 1.0, biased) - truth).abs().max() > 1e-3


def test_a_tokens_weight_is_that_of_the_equation():
    """d surrogate / d log mu(m_j) = (A_j - the others' mean A_j) / K, A_j = sum_{l>j} k_l - beta R, and d / d k_j = 1 / K."""
    generator, beta = torch.Generator().manual_seed(0), 2.0
    log_prob, kl = torch.rand(2, 3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    reward = torch.rand(3, generator=generator, dtype=torch.float64)
    weights, ones = torch.autograd.grad(surrogate(log_prob, kl, reward, beta), (log_prob, kl))
    for j in range(4):
        cost = kl.detach()[:, j + 1 :].sum(1) - beta * reward
        for k in range(3):
            assert float(weights[k, j]) == pytest.approx(float(cost[k] - (cost.sum() - cost[k]) / 2) / 3)
    assert torch.allclose(ones, torch.full_like(ones, 1 / 3))


def test_the_baseline_lowers_the_variance_for_rewards_far_from_zero(lm):
    log_prob, kl, reward = (t.detach() for t in terms(lm, 2))
    chosen = torch.tensor(list(itertools.product(range(len(reward)), repeat=4)))
    weight = log_prob.sum(1)[chosen].sum(1).exp()
    scores = []  # grad of each summary's log mu per position, [M, positions, parameters]
    graph = terms(lm, 2)[0]
    for row in graph:
        scores.append(torch.stack([gradient(value, lm) if value != 0 else torch.zeros_like(gradient(graph.sum(), lm)) for value in row]))
    scores = torch.stack(scores)

    def variance(estimator):
        free = log_prob[chosen].requires_grad_()
        (share,) = torch.autograd.grad(estimator(free, kl[chosen], reward[chosen] - 50.0, 1.0).sum(), free)
        each = torch.einsum("nkt,nktp->np", share, scores[chosen])
        mean = (weight[:, None] * each).sum(0)
        return float((weight * (each - mean).square().sum(1)).sum())

    def without(log_prob, kl, reward, beta):
        future = kl.flip(-1).cumsum(-1).flip(-1) - kl
        return (kl + log_prob * (future - beta * reward[..., None])).sum(-1).mean(-1)

    assert variance(surrogate) < variance(without) / 20


def test_the_terms_are_those_of_the_distributions(lm):
    """ib_terms: log mu is log_prob's, r is the bare backbone's, kl the dense one; nothing behind a summary's end."""
    summaries = all_summaries(2)
    with lm.adapter("mean-field"):
        found = lm.ib_terms([TOPIC] * len(summaries), summaries, [[1]] * len(summaries))
        assert torch.allclose(found.log_prob.sum(1), lm.log_prob([TOPIC] * len(summaries), summaries), atol=1e-12)
        mu = [lm.backbone(torch.tensor([TOPIC + m]))[0, len(TOPIC) - 1 : -1].log_softmax(-1) for m in summaries]
    prior = [lm.backbone(torch.tensor([[1, *m]]))[0, :-1].log_softmax(-1) for m in summaries]
    assert torch.allclose(found.prior_log_prob.sum(1), lm.log_prob([[1]] * len(summaries), summaries), atol=1e-12)
    for row, p, q in zip(found.kl, mu, prior, strict=True):
        assert torch.allclose(row[: len(p)], (p.exp() * (p - q)).sum(-1), atol=1e-10)
        assert (row[len(p) :] == 0).all()


def test_sampling_draws_from_the_model_itself(lm):
    """Frequencies of whole sampled summaries are their probabilities (chi-square within 5 standard deviations)."""
    summaries, count = all_summaries(2), 4000
    with lm.adapter("mean-field"):
        drawn = lm.sample([TOPIC] * count, 2, seeds=range(count))
        probability = lm.log_prob([TOPIC] * len(summaries), summaries).exp()
    seen = torch.tensor([sum(d == m for d in drawn) for m in summaries])
    assert int(seen.sum()) == count
    expected = count * probability.detach()
    assert float(((seen - expected) ** 2 / expected).sum()) < len(summaries) + 5 * math.sqrt(2 * len(summaries))


def test_two_samples_are_the_least(lm):
    with pytest.raises(ValueError, match="2 samples"):
        surrogate(torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(1), 1.0)


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    rates = [ib_tune.learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0) and 0 < rates[-1] < 0.001
    assert rates[55] == pytest.approx(0.5) and all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert ib_tune.learning_rate(0, 1, 1.0) == 1.0
