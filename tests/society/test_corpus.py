import numpy as np
import pytest

from mfllm_ref.society import agora, prompts
from mfllm_ref.society.annotate import RuleAnnotator
from mfllm_ref.society.corpus import KINDS, Corpus, Mixture, Past, pretraining_part
from mfllm_ref.society.events import DIMENSIONS, HALF_LIFE, Action, Agent, Event
from mfllm_ref.society.methods import METHODS
from mfllm_ref.society.rollout import Settings, State, World
from mfllm_ref.society.signals import GRID, parse, shares

ANNOTATE = RuleAnnotator()


@pytest.fixture(scope="module", params=[HALF_LIFE, 960])
def past(request) -> Past:
    return Past(agora.event("train", 3), ANNOTATE, 10, request.param)


def test_training_prompts_are_those_of_a_simulation(past):
    """At every step a document's prefix is what `rollout` shows when the past is real, for every kind of signal."""
    event = past.event
    for kind, method in zip(KINDS, ("state", "recent", "popular", "empirical"), strict=True):
        state = State(World(event, METHODS[method], 0), Settings(batch=10, half_life=past.half_life), {}, forced=True)
        for step in range(past.steps):
            document = past.policy(step, kind, 10)
            texts = [document.prefix + private for private, _ in document.branches]
            assert texts == state.policy_prompts(step, state.indices(step))
            assert [t for _, t in document.branches] == [prompts.continuation(a.text) for a in event.actions[step * 10:][:10]]
            labels = ANNOTATE([event.actions[i].text for i in state.indices(step)], "en")
            actions = state.seen(step, [event.actions[i].text for i in state.indices(step)], labels)
            state.history.update(actions)
            state.mean_field = past.population[step]
            document = past.mean_field(step, 0, np.random.default_rng(0))
            assert document.prefix + document.branches[0][0] == state.mean_field_prompt(step, actions)


def test_summaries_state_the_counts(past):
    document = past.mean_field(0, 0, np.random.default_rng(0))
    stated, counted = parse(document.branches[0][1], "en"), shares([seen.labels for seen in past.actions(0)])
    for dimension, p in counted.items():
        np.testing.assert_allclose(stated[dimension], p, atol=0.01)


def test_counted_summaries_tell_of_the_few_posts_listed(past):
    """Their prompts are those of a first step with so few agents, and what they state is those agents' labels."""
    document, sizes = past.counted(6, 40, np.random.default_rng(0)), []
    for private, target in document.branches:
        head, *listed = private.removesuffix("Summary:\n").splitlines()
        actions = [tuple(line.removeprefix("- ").split(": ", 1)) for line in listed]
        sizes.append(len(actions))
        assert head == prompts.WORDING["en"].newest.format(sizes[-1])
        assert document.prefix + private == prompts.mean_field_prompt(
            "en", past.event.topic, past.posts(6), "", sorted(actions, key=lambda action: action[1]), sizes[-1]
        )
        stated, counted = parse(target, "en"), shares(ANNOTATE([text for _, text in actions], "en"))
        assert all(np.abs(stated[d] - counted[d]).max() < GRID / 100 for d in DIMENSIONS)
    assert {*sizes} == {1, 2, 3, 4, 5} and sizes.count(1) > 40 / 4


def test_a_prior_document_has_neither_topic_nor_history(past):
    assert past.prior(4).prefix == prompts.prior_prompt("en")


@pytest.mark.parametrize("abridged", [0.0, 1.0])
def test_imagined_summaries_move_as_the_real_one_does(past, abridged):
    """What follows from an imagined summary is, in expectation, what the newest actions make of it: the weight they have is
    the real one's, and they alone speak for a dimension that the summary had lost."""
    rng, step, lost, error, small = np.random.default_rng(0), 3, 0, [], []
    document = past.mean_field(step, 400, rng, abridged)
    assert document.branches[:1] == past.mean_field(step, 0, rng, abridged).branches, "the real one comes first"
    now = shares([seen.labels for seen in past.actions(step)])
    weight = sum(0.5 ** (past.batch / past.half_life * k) for k in range(step + 1))
    for private, target in document.branches[1:]:
        told, said = parse(private.splitlines()[0].removeprefix("Population: "), "en"), parse(target, "en")
        assert len(said) == len(DIMENSIONS)
        for dimension, p in said.items():
            lost += dimension not in told
            before = told.get(dimension, now[dimension])
            after = before + (now[dimension] - before) / weight
            error.append(p[0] - after[0])
            if dimension == "rumor" and 0 < abs(after[0] - before[0]) < GRID / 200:
                small.append(p[0] != before[0])
    whole = 1 - 7 / 16 * abridged  # of a summary that ends behind a random dimension
    assert abs(lost / 400 / len(DIMENSIONS) - (1 - 0.9 * whole)) < 0.03
    assert np.abs(error).max() < GRID / 100 + 1e-9
    assert abs(np.mean(error)) < 3 * GRID / 100 / len(error) ** 0.5
    assert any(small) and not all(small), "a move of less than half a step of the grid is not lost"
    assert len(past.mean_field(0, 4, rng, abridged).branches) == 1, "nothing comes before the first"


@pytest.mark.parametrize("shuffled", [0.0, 1.0])
def test_a_shuffled_document_keeps_all_but_the_signal(shuffled):
    mixture = Mixture(summaries=0.0, signals=(0.0, 0.0, 0.0, 1.0), shuffled=shuffled, reweighted=0.0, width=10)
    corpus = Corpus(6, ANNOTATE, 10, mixture, lambda i: agora.event("train", i))
    pasts, rng, others = [corpus.past(i) for i in range(6)], np.random.default_rng(0), 0
    for _ in range(30):
        document = corpus.draw(rng)[1]
        event = next(past for past in pasts if past.event.id == document.event)
        own = [past for past in (event.policy(step, "empirical", 10) for step in range(30)) if past.branches == document.branches]
        assert any(one.prefix.splitlines()[:2] == document.prefix.splitlines()[:2] for one in own)
        others += all(one.prefix != document.prefix for one in own)
    assert others == 0 if shuffled == 0 else others > 15, "now and then the other event is the same one"


@pytest.mark.parametrize("abridged", [0.0, 0.5, 1.0])
def test_as_many_summaries_are_abridged_as_the_mixture_says(abridged):
    """Those that are written and those that agents are told: an abridged one tells of the first one to all dimensions, any number
    as often as any other."""
    mixture = Mixture(summaries=0.5, signals=(0.0, 0.0, 0.0, 1.0), abridged=abridged, reweighted=0.0)
    corpus = Corpus(6, ANNOTATE, 10, mixture, lambda i: agora.event("train", i))
    rng, said, before = np.random.default_rng(0), {"mean-field": [], "empirical": []}, []
    for _ in range(400):
        sort, document = corpus.draw(rng)
        line = document.prefix.splitlines()[-1]
        if sort == "mean-field":
            said[sort] += [parse(document.branches[0][1], "en")]
            told = [private.splitlines()[0] for private, _ in document.branches[1:] if private.startswith("Population: ")]
            before += [len(parse(line.removeprefix("Population: "), "en")) for line in told]
        elif line.startswith("Population: "):
            said[sort] += [parse(line.removeprefix("Population: "), "en")]
    for some in said.values():
        counts = np.array([len(stated) for stated in some])
        assert len(counts) > 50 and all(list(stated) == list(DIMENSIONS)[: len(stated)] for stated in some)
        assert abs(np.mean(counts == len(DIMENSIONS)) - (1 - 7 / 8 * abridged)) < 0.12
        assert abridged == 0 or {*counts} == {*range(1, 9)} and abs(counts[counts < len(DIMENSIONS)].mean() - 4) < 0.6
    whole = 1 - 7 / 16 * abridged
    assert abs(np.mean(before) - 0.9 * whole * len(DIMENSIONS)) < 0.5, "imagined ones before end early as often"


@pytest.mark.parametrize("others", [[], [1, 2, 3]])
def test_a_reweighted_document_tells_of_the_population_it_shows(past, others):
    """Over many actions, the shares a reweighted document states are those of its branches' labels, whosever they are."""
    rng = np.random.default_rng(0)
    others = [Past(agora.event("train", index), ANNOTATE, 10) for index in others]
    own, theirs = ({seen.text for one in some for seen in one.seen} for some in ([past], others))
    for _ in range(6):
        document = past.reweighted("empirical", 4000, rng, others)
        acted = {text.removesuffix("\n").strip() for _, text in document.branches}
        assert bool(acted - own) == bool(others) and acted <= own | theirs
        stated = parse(document.prefix.splitlines()[-1].removeprefix("Population: "), "en")
        acted = shares(ANNOTATE([text for _, text in document.branches], "en"))
        for dimension, p in stated.items():
            np.testing.assert_allclose(acted[dimension], p, atol=0.04)
    recent = past.reweighted("recent", 3, rng)
    assert recent.prefix.count("\n- ") == 5 and len(recent.branches) == 3


@pytest.mark.parametrize("guests", [0.0, 1.0])
def test_reweighted_populations_have_guests_as_often_as_the_mixture_says(guests):
    mixture = Mixture(summaries=0.0, signals=(0.0, 0.0, 0.0, 1.0), reweighted=1.0, guests=guests, width=100)
    corpus = Corpus(12, ANNOTATE, 10, mixture, lambda i: agora.event("train", i))
    texts = {corpus.past(i).event.topic: {prompts.continuation(seen.text) for seen in corpus.past(i).seen} for i in range(12)}
    rng = np.random.default_rng(0)
    for _ in range(10):
        _, document = corpus.draw(rng)
        own = next(some for topic, some in texts.items() if topic in document.prefix)
        assert ({text for _, text in document.branches} <= own) == (guests == 0)


def test_draws_are_a_pure_function_of_the_generator_and_follow_the_mixture():
    mixture = Mixture(summaries=0.5, prior=0.5, counted=0.5, signals=(0.0, 0.5, 0.0, 0.5), shuffled=0.5, reweighted=0.2)
    draws = []
    for _ in range(2):
        corpus = Corpus(8, ANNOTATE, 10, mixture, lambda i: agora.event("pretrain", i))
        rng = np.random.default_rng(0)
        draws.append([corpus.draw(rng) for _ in range(300)])
    assert draws[0] == draws[1]
    sorts = [sort for sort, _ in draws[0]]
    assert set(sorts) == {"mean-field", "recent", "empirical"}
    assert 0.4 < sorts.count("mean-field") / 300 < 0.6
    priors = sum(document.prefix == prompts.prior_prompt("en") for _, document in draws[0])
    assert 0.3 < priors / sorts.count("mean-field") < 0.7
    newest = prompts.WORDING["en"].newest.split("{}")[0]  # where it is a branch's own, a document counts
    counted = sum(document.branches[0][0].startswith(newest) for _, document in draws[0])
    assert 0.3 < counted / (sorts.count("mean-field") - priors) < 0.7


def test_the_pretraining_part_is_chosen_by_id_alone():
    actions = tuple(Action(Agent("a"), "x", float(i)) for i in range(3))
    events = [Event(f"e{i}", "t", "d", "en", actions) for i in range(100)]
    chosen, kept = pretraining_part(events)
    again, _ = pretraining_part(events[::-1])
    assert len(kept) == 21 and [e.id for e in chosen] == [e.id for e in again]
    assert {e.id for e in chosen}.isdisjoint(e.id for e in kept)
    chosen, kept = pretraining_part(events, ["e7", "e50"])
    assert len(chosen) == 98 and [e.id for e in kept] == ["e50", "e7"]
