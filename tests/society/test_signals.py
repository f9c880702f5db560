import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfllm_ref.society.events import DIMENSIONS, HALF_LIFE
from mfllm_ref.society.signals import GRID, History, Seen, abridge, parse, shares, verbalise

CHECK = settings(deadline=None, derandomize=True, max_examples=60)
LABELS = st.fixed_dictionaries({d: st.sampled_from(names) for d, names in DIMENSIONS.items()})
STEPS = st.lists(st.lists(LABELS, min_size=1, max_size=6), min_size=1, max_size=6)


def seen(labels, index=0, **known) -> Seen:
    return Seen(**{"id": f"a#{index}", "index": index, "profile": "", "text": f"text {index}", "labels": labels,
                   "popularity": 0.0, **known})  # fmt: skip


@st.composite
def populations(draw):
    weights = st.floats(0, 1, allow_subnormal=False)
    out = {}
    for dimension, names in DIMENSIONS.items():
        p = np.array(draw(st.lists(weights, min_size=len(names), max_size=len(names)))) + draw(st.sampled_from([1e-9, 0.2]))
        out[dimension] = p / p.sum()
    return out


@CHECK
@given(populations(), st.sampled_from(["en", "zh"]))
def test_verbalise_and_parse_are_inverse_within_rounding(population, language):
    """Shares put into words and read back differ by less than a step of the words' grid."""
    text = verbalise(population, language)
    back = parse(text, language)
    assert set(back) == set(DIMENSIONS)
    for dimension in DIMENSIONS:
        assert np.abs(back[dimension] - population[dimension]).max() < GRID / 100 + 1e-9
    assert verbalise(back, language) == text, "what was said survives the round trip exactly"


@CHECK
@given(populations(), st.sampled_from(["en", "zh"]), st.integers(0, 99))
def test_an_abridged_summary_is_the_words_of_some_of_the_dimensions(population, language, seed):
    """What `verbalise` would write of the first dimensions, of at least one."""
    text = verbalise(population, language)
    short = abridge(text, np.random.default_rng(seed))
    left = parse(short, language)
    assert 0 < len(left) and list(left) == list(DIMENSIONS)[: len(left)]
    assert short == verbalise({d: population[d] for d in left}, language)


def test_parse_reads_what_is_there():
    got = parse("so: stance: support 50% oppose 25% neutral 25%; behavior: share 40%; mood: 3; intent: question 5%", "en")
    assert set(got) == {"behavior_type"}  # the first heading is not a heading, the last is incomplete
    assert got["behavior_type"].tolist() == [0.6, 0.4]
    assert parse("", "zh") == {}
    assert parse("stance: support 0% oppose 0% neutral 0%", "en") == {}


@CHECK
@given(st.lists(LABELS, min_size=1, max_size=30), st.integers(2, 5))
def test_shares_do_not_depend_on_order_or_on_scale(labels, k):
    """Permuting the actions, or having each k times, leaves the shares unchanged; they sum to 1."""
    p, q, r = shares(labels), shares(labels[::-1]), shares(labels * k)
    for dimension in DIMENSIONS:
        assert np.array_equal(p[dimension], q[dimension])
        np.testing.assert_allclose(p[dimension], r[dimension], atol=1e-12)
        assert p[dimension].sum() == pytest.approx(1)


@CHECK
@given(STEPS, st.sampled_from([1, HALF_LIFE, 960]))
def test_the_population_is_the_exponentially_weighted_mean_of_the_steps_shares(steps, half_life):
    batch, history = 10, History(10, half_life)
    for step in steps:
        history.update([seen(labels, i) for i, labels in enumerate(step)])
    weights = 0.5 ** (batch / half_life * np.arange(len(steps))[::-1])
    for dimension in DIMENSIONS:
        rows = np.array([shares(step)[dimension] for step in steps])
        np.testing.assert_allclose(history.population()[dimension], weights @ rows / weights.sum(), atol=1e-12)


@CHECK
@given(st.lists(LABELS, min_size=1, max_size=8), st.integers(1, 20))
def test_the_empirical_signal_has_a_fixed_point(step, repeats):
    """Under a population whose every step has the same label shares the exact empirical signal stays where it is."""
    history, signals = History(10), []
    for _ in range(repeats):
        history.update([seen(labels, i) for i, labels in enumerate(step)])
        signals.append(history.signal("empirical", "en"))
    assert len(set(signals)) == 1


def test_nobody_is_told_anything_before_the_first_action():
    for kind in ("none", "recent", "popular", "empirical", "mean-field"):
        assert History(10).signal(kind, "en") is None
    with pytest.raises(ValueError, match="rumour"):
        history = History(10)
        history.update([seen(_labels())])
        history.signal("rumour", "en")


def test_an_empty_summary_tells_nothing_with_a_warning():
    history = History(10)
    history.update([seen(_labels())])
    with pytest.warns(UserWarning, match="empty summary"):
        assert history.signal("mean-field", "en", "") is None


def _labels() -> dict[str, str]:
    return {d: names[0] for d, names in DIMENSIONS.items()}


def test_recent_is_the_last_five_in_order():
    history = History(10)
    history.update([seen(_labels(), i) for i in range(8)])
    assert history.signal("recent", "en").lines == tuple(f"text {i}" for i in range(3, 8))


def test_popular_counts_reach_and_known_answers_among_the_last_thirty():
    history = History(10)
    history.update([seen(_labels(), i, popularity=1e6) for i in range(1)])
    history.update([seen(_labels(), i) for i in range(1, 10)])
    history.update([seen(_labels(), i, popularity=50.0 if i == 12 else 0.0, parent=3) for i in range(10, 20)])
    history.update([seen(_labels(), i, parent=15 if i < 23 else None) for i in range(20, 31)])
    # 0 is out of the window; 3 has ten answers, 12 a reach of log(51) = 3.9, 15 three answers; then the newest step's.
    lines = history.signal("popular", "en").lines
    assert lines[:3] == ("text 3", "text 12", "text 15") and set(lines[3:]) < {f"text {i}" for i in range(20, 31)}


def test_no_text_wins_ties_for_being_that_text():
    """Where nobody's reach or answers are known, what is popular is a fair draw from the newest step."""
    won = np.zeros(10)
    for event in range(300):
        history = History(10)
        history.update([seen(_labels(), k, id=f"{event}#{k}") for k in range(10)])
        for line in history.signal("popular", "zh").lines:
            won[int(line.split()[1])] += 1
    assert won.sum() == 1500 and won.min() > 110 and won.max() < 190  # 150 each, standard deviation 8.7
