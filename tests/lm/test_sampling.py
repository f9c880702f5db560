"""The noise is uniform and tokens come as often as they are probable. (Sampled texts: test_language_model.py.)"""

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from mfllm_ref.lm import sampling
from mfllm_ref.lm.sampling import LIKELY, hash_seeds, sample, truncate, uniforms


def test_sampled_frequencies_follow_the_distribution():
    """Kolmogorov-Smirnov (the noise is uniform) and chi-square (tokens are as frequent as probable), over many seeds at
    one position and over many positions at one seed: their p-values are themselves uniform. Neighbours do not
    correlate."""
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0, 0.5, -3.0, 1.5]], dtype=torch.float64)
    expected = logits.softmax(-1)[0].numpy()
    noise = np.stack([uniforms(hash_seeds(range(2000)), position) for position in range(2000)])
    for rows in (noise[:40], noise[:, :40].T):
        uniform = [scipy.stats.kstest(row, "uniform").pvalue for row in rows]
        counts = [sample(logits.expand(2000, -1), row, temperature=1.0).bincount(minlength=7).numpy() for row in rows]
        frequent = [scipy.stats.chisquare(count, expected * 2000).pvalue for count in counts]
        for pvalues in (uniform, frequent):
            assert scipy.stats.kstest(pvalues, "uniform").pvalue > 0.01 and min(pvalues) > 1e-4
    for later in (noise[1:, :-1], noise[:-1, 1:], noise[1:, 1:]):
        earlier = noise[:-1, :-1]
        assert abs(np.corrcoef(earlier.ravel(), later.ravel())[0, 1]) < 3e-3  # 6 standard errors


def test_sampling_never_picks_what_has_no_probability():
    """At both ends of the uniform's range and under every truncation the token has a finite logit."""
    logits = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf]] * 2)
    ends = np.array([0.0, 1 - 2.0**-53])
    assert sample(logits, ends, 1.0).tolist() == [1, 2]
    assert sample(logits, ends, 1e-30).tolist() == [2, 2]
    assert (truncate(logits, top_p=1e-9)[:, 2] == 2).all() and (truncate(logits, top_k=1) > -torch.inf).sum() == 2


@pytest.mark.parametrize("likely", [1, 2, LIKELY])
def test_top_p_keeps_the_smallest_nucleus(likely, monkeypatch):
    """A token stays iff those above it, the larger ones and of its equals the earlier ones, hold less than top_p: however many
    are looked at first, beside rows with wider nuclei and narrower ones, with ties at its edge and after top_k."""
    monkeypatch.setattr(sampling, "LIKELY", likely)
    rng = np.random.default_rng(likely)
    for vocab, top_k in ((1, 0), (3, 0), (70, 0), (600, 0), (600, 40)):
        rows = rng.integers(-3, 4, (30, vocab)) * rng.choice([0.0, 0.1, 1.0, 30.0], (30, 1))
        logits = torch.from_numpy(rows)
        for top_p in (1e-9, *rng.random(4)):
            cut = truncate(logits, top_k).numpy()
            order = np.argsort(-cut, axis=1, kind="stable")
            p = np.take_along_axis(scipy.special.softmax(cut, axis=1), order, axis=1)
            above = np.zeros_like(p)
            np.put_along_axis(above, order, np.cumsum(p, axis=1) - p, axis=1)
            np.testing.assert_array_equal(truncate(logits, top_k, top_p), np.where((above < top_p) | (above == 0), cut, -np.inf))


@pytest.mark.parametrize("row", [[0.0, torch.nan], [0.0, torch.inf], [-torch.inf, -torch.inf]])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.5, "top_k": 1}, {"temperature": 1.0, "top_p": 0.5}])
def test_a_row_without_a_distribution_is_an_error(row, options):
    """NaN, +inf, or nothing but -inf: there is nothing to draw, and no token stands for that. The other rows do not help."""
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        sample(torch.tensor([[0.0, 1.0], row]), np.array([0.5, 0.5]), **options)


def test_a_temperature_of_nearly_0_is_greedy():
    logits = torch.tensor([[0.0, 2.0, 1.0], [-3.0, -5.0, -4.0]])
    assert sample(logits, np.array([0.01, 0.99]), temperature=1e-46).tolist() == [1, 0]


def test_no_small_seed_has_a_peculiar_noise():
    """Over all small seeds and positions the noise never repeats, is never 0 and is uniform, in rows and in columns."""
    noise = np.array([uniforms(hash_seeds(range(500)), position) for position in range(64)])
    assert noise.min() > 0 and noise.max() < 1 and len(np.unique(noise)) == noise.size
    assert abs(noise.mean() - 0.5) < 0.01 and np.abs(noise.mean(axis=0) - 0.5).max() < 0.2
    assert np.abs(noise.mean(axis=1) - 0.5).max() < 0.07
