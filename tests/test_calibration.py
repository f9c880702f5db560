"""What the measures rest on: agora's ceiling, and how agreement with known labels is measured."""

import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mfllm_ref import calibration, doors, metrics
from mfllm_ref.calibration import agreement, ceiling, follow, summary_errors
from mfllm_ref.society import agora, signals
from mfllm_ref.society.agora_ceiling import HEARD, RIVALS
from mfllm_ref.society.annotate import RuleAnnotator
from mfllm_ref.society.corpus import Past
from mfllm_ref.society.events import DIMENSIONS, HALF_LIFE, Action, Agent, Event, hashed
from mfllm_ref.society.readers import write_events
from mfllm_ref.society.signals import GRID, History, Seen, verbalise

FIXTURES = Path(__file__).parent / "society" / "fixtures"


@pytest.fixture
def command(capsys, monkeypatch):
    """(exit code, stdout, stderr) of the command with some arguments."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["calibration", *map(str, arguments)])
        code = doors.run_door("calibration", calibration.main)
        return code, *capsys.readouterr()

    return call


def test_calibration():
    """On dev (a third of it: quicker) the mean field matters (m-blind is at least 4 floors) and can be read (the reader is near
    the floor)."""
    table = {name: row.mean() for name, row in ceiling("dev", 24, seeds=1).items()}
    assert table["floor"] <= table["m-blind"] / 4 and table["floor"] <= table["persistence"] / 3
    assert table["floor"] < table["reader"] < 1.5 * table["floor"]
    assert table["reader"] < table["believer"] < table["topic and shares"] < table["m-blind"], "the more is known, the better"


def test_a_hearer_hears_the_shares_that_agents_are_told():
    """Step by step, those of `signals.History`."""
    actions, history, heard, weight = agora.event("dev", 1).actions, History(10), np.zeros(3), 0.0
    for start in range(0, len(actions), 10):
        labels = [action.labels for action in actions[start : start + 10]]
        history.update([Seen(str(i), i, "", "", row, 0.0) for i, row in enumerate(labels)])
        heard, weight = signals.moved(heard, weight, signals.shares(labels)["stance"], HEARD)
        assert heard == pytest.approx(history.population()["stance"])


def test_fewer_agents_are_their_first_actions(command):
    code, out, _ = command("ceiling", "--events", 1, "--seeds", 1, "--agents", 90)
    event = agora.event("dev", 0)
    real, again = (metrics.encode(RuleAnnotator()([a.text for a in some[50:90]], "en"))
                   for some in (event.actions, agora.true_rollout(event, 50, seed=0)))  # fmt: skip
    floor = metrics.kl_between(real, again).mean()
    assert code == 0 and f"| floor | {floor:.3f} |" in out
    code, _, said = command("ceiling", "--agents", 50)
    assert code == 2 and said.count("\n") == 1 and "--agents" in said


def test_annotator_reads_the_words():
    """The rule annotator recovers the generating labels: lexicon and wording were fitted to each other, so no more."""
    table = agreement([agora.event("dev", index) for index in range(70)], RuleAnnotator())
    for dimension in DIMENSIONS:
        assert table[dimension]["accuracy"] >= 0.9
        assert table[dimension]["majority_accuracy"] < 0.85


def labelled(*pairs):
    return Event("e", "t", "d", "en", tuple(Action(Agent("a"), text, 0.0, labels=labels) for text, labels in pairs))


def test_agreement_counts_only_labelled_actions_and_knows_the_majority():
    table = agreement([labelled(("I agree", {"stance": "support"}), ("I disagree", {"stance": "oppose"}), ("hm", {}),
                                ("why?", {"stance": "neutral", "intent": "question"}), ("ok", {"stance": "support"}))],
                      RuleAnnotator())
    assert set(table) == {"stance", "question"}
    assert table["stance"]["count"] == 4 and table["stance"]["accuracy"] == 0.75
    assert table["stance"]["majority_accuracy"] == 0.5
    assert table["stance"]["majority_macro_f1"] == pytest.approx(2 / 9)
    assert table["question"]["accuracy"] == 1.0 and table["question"]["majority_accuracy"] == 0.75


def test_the_command_prints_the_table(command):
    code, out, _ = command("annotator", "--data", FIXTURES / "rumoureval" / "train")
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in out.splitlines()]
    assert code == 0 and [row[0] for row in cells] == ["dimension", "---", "stance", "question"]
    assert cells[2][-1] == "5"


def test_the_ceiling_is_the_metrics_own_kl(command):
    """One event, one continuation: the table's row is `kl_between` of the annotated rollouts."""
    code, out, _ = command("ceiling", "--events", "1", "--seeds", "1")
    row = next(row.split("|") for row in out.splitlines() if row.startswith("| persistence"))
    event = agora.event("dev", 0)
    sides = (event.actions[agora.WARMUP :], RIVALS["persistence"](event, 0))
    real, other = (metrics.encode(RuleAnnotator()([a.text for a in side], "en")) for side in sides)
    kl = metrics.kl_between(real, other)
    assert code == 0 and [cell.strip() for cell in row[2:-1]] == [f"{value:.3f}" for value in (kl.mean(), *kl)]


class Recorder:
    """Stands for a random generator that always draws the first label, and remembers the chances."""

    def __init__(self):
        self.seen = []

    def choice(self, count, size, p):
        self.seen.append(np.append(p, np.zeros(6 - len(p)))[:6])
        return np.zeros(size, dtype=np.int8)


@pytest.mark.parametrize("memory", [HALF_LIFE, math.inf, None])
def test_followers_draw_from_the_population_and_what_is_usual(memory):
    """In every step the chances are slope x the population's shares, those of `History` or the mean of all so far or of the
    warm-up, + the rest x the usual ones."""
    actions = agora.event("dev", 0).actions[:95]
    labels, recorder, history = RuleAnnotator()([a.text for a in actions], "en"), Recorder(), History(10)
    codes, usual = metrics.encode(labels), metrics.label_shares(metrics.encode(labels[40:]))[0]
    drawn = follow(codes, usual, 0.7, memory, recorder)
    assert drawn.shape == (45, len(DIMENSIONS)) and not drawn.any()
    lived = [{d: metrics.LABELS[d][code] for d, code in zip(DIMENSIONS, row)} for row in np.concatenate([codes[:50], drawn])]
    for step in range(9):
        some = lived[10 * step : 10 * step + 10]
        if step >= 5:
            heard = lived[: 10 * step if memory else 50]
            alike = (history.population() if memory == HALF_LIFE else signals.shares(heard)).items()
            for d, (dimension, p) in enumerate(alike):
                p = [p[DIMENSIONS[dimension].index(label)] for label in metrics.LABELS[dimension]]
                expected = 0.7 * np.append(p, np.zeros(6 - len(p))) + 0.3 * usual[d]
                np.testing.assert_allclose(recorder.seen[8 * (step - 5) + d], expected, atol=1e-9)
        history.update([Seen(str(i), i, "", "", row, 0.0) for i, row in enumerate(some)])


def test_followers_of_themselves_alone_never_leave_unanimity():
    codes = np.zeros((90, len(DIMENSIONS)), dtype=np.int8)
    usual = metrics.label_shares(codes + 1)[0]
    assert not follow(codes, usual, 1.0, HALF_LIFE, np.random.default_rng(0)).any()
    assert (follow(codes, usual, 0.0, HALF_LIFE, np.random.default_rng(0)) == 1).all(), "and who follow nothing are as usual"


def test_the_followers_command(command, tmp_path):
    """A row of the table is the mean over events and seeds; of two events each is what is usual beside the other."""
    events = [replace(e := agora.event("train", i), actions=e.actions[: 70 + 10 * i], posts=()) for i in range(2)]
    write_events(events, tmp_path / "two.jsonl")
    code, out, _ = command("followers", "--data", tmp_path / "two.jsonl", "--seeds", 3, "--agents", 75)
    expected = {"| slope 0.5, all": [], "| `persistence`": []}
    for event, other in (events, events[::-1]):
        codes, usual = (metrics.encode(RuleAnnotator()([a.text for a in e.actions[:75]], "en")) for e in (event, other))
        for seed in range(3):
            following, drawing = (np.random.default_rng(hashed("followers", event.id, seed)) for _ in range(2))
            followed = follow(codes, metrics.label_shares(usual)[0], 0.5, math.inf, following)
            drawn = codes[drawing.integers(50, size=len(codes) - 50)]
            for some, labels in zip(expected.values(), (followed, drawn), strict=True):
                some.append(metrics.kl_between(codes[50:], labels))
    for name, some in expected.items():
        row = next(row.split("|") for row in out.splitlines() if row.startswith(name))
        kl = np.mean(some, axis=0)
        assert code == 0 and [cell.strip() for cell in row[2:-1]] == [f"{value:.3f}" for value in (kl.mean(), *kl)]
    write_events(events[:1], tmp_path / "one.jsonl")
    code, _, said = command("followers", "--data", tmp_path / "one.jsonl")
    assert code == 2 and said.count("\n") == 1 and "need two" in said


class Writer:
    """Stands for a language model: the n-th summary of the n-th step is what it was given for it."""

    def __init__(self, texts):
        self.texts = texts

    def adapter(self, name):
        return nullcontext()

    def generate(self, prompts, *_, **options):
        assert len(prompts) == len(self.texts) == len(options["seeds"])
        return self.texts


def test_summary_errors_are_what_a_writer_adds_to_the_exact_shares():
    """One that says a share 10 points too high, its rival 10 too low, and never another dimension, errs by 10 and loses all
    its summaries; one that rounds as the words do errs by the grid, and loses none."""
    past = Past(agora.event("dev", 0), RuleAnnotator(), 10)
    exact = [past.follows(step, past.population[step]) for step in range(past.steps)]
    shifted = [f"belief: doubt {round(100 * shares['belief_degree'][1]) + 10:02d}%" for shares in exact]
    table = summary_errors(Writer(shifted), [past])
    assert table["all"]["error"] == pytest.approx(10, abs=0.5) and table["all"]["lost"] == 1
    table = summary_errors(Writer([verbalise(shares, "en") for shares in exact]), [past])
    for row in table.values():
        assert 0 < row["error"] < row["grid"] < GRID and row["lost"] == 0, "to the nearest is nearer than at random"


def test_a_writer_of_other_things_loses_everything_and_errs_by_nothing_known():
    past = Past(agora.event("dev", 0), RuleAnnotator(), 10)
    table = summary_errors(Writer(["all is well"] * past.steps), [past])
    assert all(row["lost"] == 1 and math.isnan(row["error"]) and row["grid"] > 0 for row in table.values())


def test_the_steps_of_the_warm_up_are_a_row_of_their_own():
    past = Past(agora.event("dev", 0), RuleAnnotator(), 10)
    texts = [verbalise(past.follows(step, past.population[step]), "en") for step in range(past.steps)]
    texts[5:] = [text.split("; ")[0] for text in texts[5:]]
    table = summary_errors(Writer(texts), [past])
    assert table["warm-up"]["lost"] == 0 and table["rollout"]["lost"] == 1 and table["all"]["lost"] == 25 / 30


def test_the_summaries_command_reads_a_backbone_and_an_adapter(command, tmp_path):
    arguments = ("summaries", "--events", 1, "--threads", 1)
    code, bare, _ = command(*arguments)
    assert code == 0 and [row.split("|")[1].strip() for row in bare.splitlines()[2:]] == ["warm-up", "rollout", "all"]
    code, tuned, _ = command(*arguments, "--adapter", calibration.TINY.parent / "tiny-adapters" / "mean-field")
    assert code == 0 and tuned != bare
    assert command(*arguments, "--summary-top-p", 0.01)[1] != bare
    assert command(*arguments, "--summary-top-p", 1.01)[0] == 2
    code, _, error = command(*arguments, "--adapter", tmp_path / "absent")
    assert code == 2 and error.count("\n") == 1 and "absent" in error


@pytest.mark.parametrize("path, cause", [("absent.jsonl", "no such file"), ("rumdect", "no labels")])
def test_the_command_refuses_in_one_line(command, path, cause):
    code, out, error = command("annotator", "--data", FIXTURES / path)
    assert code == 2 and out == "" and error.count("\n") == 1 and cause in error and path in error
