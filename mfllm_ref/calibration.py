"""What the measures rest on: python -m mfllm_ref.calibration ceiling|followers|annotator|summaries

    ceiling      what can be known in agora: KL of continuations by those who know more or less of its process
    followers    what label shares can do for outside events: KL of populations that follow their own shares exactly
    annotator    agreement of the rules with the labels that events carry, beside always guessing the commonest label
    summaries    how far a backbone's mean field is from the exact shares after one step, told the exact ones before it
"""

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from mfllm_ref import doors, metrics, report
from mfllm_ref.doors import Parser, positive, run_door, whole
from mfllm_ref.errors import InputError
from mfllm_ref.lm import LanguageModel
from mfllm_ref.society import agora
from mfllm_ref.society.agora_ceiling import RIVALS
from mfllm_ref.society.annotate import RuleAnnotator
from mfllm_ref.society.corpus import Past
from mfllm_ref.society.events import DIMENSIONS, HALF_LIFE, Event, hashed
from mfllm_ref.society.prompts import SUMMARY_TOP_P
from mfllm_ref.society.readers import load_events
from mfllm_ref.society.rollout import Annotator
from mfllm_ref.society.signals import moved, parse, verbalise

TINY = doors.CHECKPOINTS / "tiny"
FOLLOWED = [(0.0, HALF_LIFE), *((slope, memory) for memory in (HALF_LIFE, math.inf, None) for slope in (0.5, 0.8, 1.0))]


def ceiling(
    split: str = "dev", events: int | None = None, seeds: int = 2, agents: int = agora.ACTIONS
) -> dict[str, np.ndarray]:  # fmt: skip
    """Mean KL in nats [dimensions] of each of `agora_ceiling.RIVALS`, over the split's first `events` (None: all), `seeds`
    continuations of each and the first `agents` actions, warm-up included. Annotated labels, as everywhere."""
    annotate, total = RuleAnnotator(), {name: np.zeros(len(DIMENSIONS)) for name in RIVALS}
    events = events or agora.SPLITS[split]
    for index in range(events):
        event = agora.event(split, index)
        real = metrics.encode(annotate([action.text for action in event.actions[agora.WARMUP : agents]], "en"))
        for name, continuation in RIVALS.items():
            for seed in range(seeds):
                texts = [action.text for action in continuation(event, seed)[: agents - agora.WARMUP]]
                total[name] += metrics.kl_between(real, metrics.encode(annotate(texts, "en"))) / (seeds * events)
    return total


def follow(
    codes: np.ndarray, usual: np.ndarray, slope: float, memory: float | None, rng: np.random.Generator, batch: int = 10
) -> np.ndarray:  # fmt: skip
    """How an event goes on after its warm-up if agents follow the population without any error of words or models.

    Each label of an agent is drawn from slope x its share in the population + (1 - slope) x its `usual` share [dimensions,
    labels]; the population is that of `signals.History` with a half-life of `memory` actions (inf: all count the same; None:
    those of the warm-up do, and nobody hears a later one). codes: labels [actions, dimensions]; returns such labels of the
    actions behind the warm-up.
    """
    retention, weight, population, drawn = 0.5 ** (batch / (memory or math.inf)), 0.0, np.zeros_like(usual), []
    for start in range(0, len(codes), batch):
        now = codes[start : start + batch]
        if start >= agora.WARMUP:
            chances = slope * population + (1 - slope) * usual
            now = np.stack([rng.choice(len(p), size=len(now), p=p / p.sum()) for p in chances], axis=1)
            drawn.append(now)
            if memory is None:
                continue
        population, weight = moved(population, weight, metrics.label_shares(now)[0], retention)
    return np.concatenate(drawn)


def followers(
    events: Sequence[Event], annotator: Annotator, seeds: int = 2, agents: int | None = None
) -> dict[tuple[float, float | None] | None, np.ndarray]:  # fmt: skip
    """Mean KL in nats [dimensions] of what `follow` makes of each (slope, memory) of FOLLOWED, over events and `seeds`; None: of
    `persistence`. What is usual is the mean of the other events. Raises InputError for fewer than two events with a warm-up."""
    coded = []
    for event in events:
        if len(event.actions[:agents]) > agora.WARMUP:
            texts = [action.text for action in event.actions[:agents]]
            coded.append((event.id, metrics.encode(annotator(texts, event.language))))
    if len(coded) < 2:
        raise InputError(f"{len(coded)} of {len(events)} events go on after {agora.WARMUP} actions; the usual shares need two")
    shares = np.stack([metrics.label_shares(codes)[0] for _, codes in coded])
    total = {row: np.zeros(len(DIMENSIONS)) for row in (None, *FOLLOWED)}
    for (name, codes), own in zip(coded, shares, strict=True):
        usual, (warmup, real) = (shares.sum(0) - own) / (len(coded) - 1), np.split(codes, [agora.WARMUP])
        for seed in range(seeds):
            for row in total:
                rng = np.random.default_rng(hashed("followers", name, seed))
                other = follow(codes, usual, *row, rng) if row else warmup[rng.integers(len(warmup), size=len(real))]
                total[row] += metrics.kl_between(real, other) / (seeds * len(coded))
    return total


def agreement(events: Iterable[Event], annotator: Annotator) -> dict[str, dict[str, float]]:
    """Predicted labels against those the actions carry, by dimension: accuracy, macro-F1, both for the majority, count.

    The row `question` asks of every action with a label whether its intent is a question: RumourEval marks only those.
    """
    pairs: dict[str, list[tuple[str, str]]] = {dimension: [] for dimension in (*DIMENSIONS, "question")}
    for event in events:
        labelled = [action for action in event.actions if action.labels]
        for action, guess in zip(labelled, annotator([action.text for action in labelled], event.language)):
            for dimension, label in action.labels.items():
                pairs[dimension].append((label, guess[dimension]))
            asks = [str(labels.get("intent") == "question") for labels in (action.labels, guess)]
            pairs["question"].append((asks[0], asks[1]))
    table: dict[str, dict[str, float]] = {}
    for dimension, found in pairs.items():
        true, guessed = zip(*found) if found else ((), ())
        if len(set(true)) > 1:  # where all actions carry the same label, there is nothing to tell apart
            row = table[dimension] = {"count": len(true)}
            for name, labels in (("", guessed), ("majority_", (max(sorted(set(true)), key=true.count),) * len(true))):
                row[f"{name}accuracy"] = metrics.f1(true, labels, "micro")  # one label an action: the same number
                row[f"{name}macro_f1"] = metrics.f1(true, labels)
    return table


def summary_errors(
    lm: LanguageModel, pasts: Sequence[Past], adapter: str | None = None, seed: int = 0, tokens: int = 120,
    top_p: float = SUMMARY_TOP_P,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """How well one summary is sampled for every step of `pasts`, each told the exact shares before it in words.

    Rows "warm-up", "rollout" and "all" of agora's steps. `error` is the root mean square, in percentage points over labels and
    dimensions that the summary states, of what it says less what exactly follows from what it was told; `grid` the same of
    those shares as `verbalise` rounds them at random, which is as near as words can be in expectation; `lost` the part of
    summaries that lack a dimension. NaN is the error of one that states none.
    """
    found: dict[str, list[tuple[np.ndarray, np.ndarray, bool]]] = {"warm-up": [], "rollout": []}
    for past in pasts:
        steps, language = range(past.steps), past.event.language
        prompts = [past.summarise(step, past.population[step]) for step in steps]
        seeds = [hashed("summaries", seed, past.event.id, step) for step in steps]
        with lm.adapter(adapter):
            written = lm.generate(prompts, tokens, top_p=top_p, seeds=seeds, stop=("\n",), worlds=steps)
        for step, text in enumerate(written):
            exact = past.follows(step, past.population[step])
            words = verbalise(exact, language, np.random.default_rng(seeds[step]))
            said, rounded = parse(text, language), parse(words, language)
            error, grid = (np.concatenate([np.zeros(0), *(100 * (s[d] - exact[d]) for d in s)]) for s in (said, rounded))
            found["warm-up" if step * past.batch < agora.WARMUP else "rollout"].append((error, grid, len(said) < len(exact)))
    found["all"] = found["warm-up"] + found["rollout"]
    table: dict[str, dict[str, float]] = {}
    for name, rows in found.items():
        errors, grids, lost = zip(*rows, strict=True)
        table[name] = {"lost": float(np.mean(lost))}
        for key, some in (("error", np.concatenate(errors)), ("grid", np.concatenate(grids))):  # a model that states no shares at all has no error
            table[name][key] = float(np.sqrt(np.mean(some**2))) if len(some) else float("nan")
    return table


def main() -> None:
    parser = Parser(prog="python -m mfllm_ref.calibration", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    known = commands.add_parser("ceiling")
    known.add_argument("--split", choices=("train", "dev", "test"), default="dev")  # pretrain's worlds are of another kind
    known.add_argument("--events", type=positive, metavar="N", help="the split's first N (default: all)")
    known.add_argument("--seeds", type=positive, default=2, help="continuations of each event (default: 2)")
    known.add_argument("--agents", type=whole(agora.WARMUP + 1, agora.ACTIONS), default=agora.ACTIONS, metavar="N",
                       help="an event's first N actions, warm-up included (default: all)")  # fmt: skip
    told = commands.add_parser("followers")
    told.add_argument("--data", type=Path, required=True, metavar="PATH", help="events, as for simulate.py")
    told.add_argument("--seeds", type=positive, default=2, help="continuations of each event (default: 2)")
    told.add_argument("--agents", type=whole(agora.WARMUP + 1, 2**62), metavar="N", help="an event's first N actions, warm-up "
                      "included (default: all)")  # fmt: skip
    read = commands.add_parser("annotator")
    read.add_argument("--data", type=Path, help="events with labels (default: the built-in world's dev split)")
    written = commands.add_parser("summaries")
    written.add_argument("--backbone", type=Path, default=TINY, metavar="DIR", help="(default: checkpoints/tiny)")
    written.add_argument("--adapter", type=Path, metavar="DIR", help="a tuned mean-field model's (default: none)")
    written.add_argument("--split", choices=list(agora.SPLITS), default="dev")
    written.add_argument("--events", type=positive, metavar="N", help="the split's first N (default: all)")
    doors.add_summaries(written)
    doors.add_machine(written)
    args = parser.parse_args()
    if args.command in ("summaries", "ceiling") and (args.events or 0) > agora.SPLITS[args.split]:
        raise InputError(f"--events {args.events}: the {args.split} split has {agora.SPLITS[args.split]}")
    if args.command == "summaries":
        doors.threads(args)
        device, dtype = doors.device_and_dtype(args)
        lm = LanguageModel.load(args.backbone, device=device, dtype=dtype)
        if args.adapter:
            lm.load_adapter("mean-field", args.adapter)
        count = args.events or agora.SPLITS[args.split]
        pasts = [Past(agora.event(args.split, index), RuleAnnotator(), batch=10) for index in range(count)]
        adapter, tokens = "mean-field" if args.adapter else None, args.summary_tokens
        table = summary_errors(lm, pasts, adapter, args.seed, tokens, args.summary_top_p)
        rows = [[name, f"{row['error']:.2f}", f"{row['grid']:.2f}", f"{100 * row['lost']:.1f}%"] for name, row in table.items()]
        doors.say(report.markdown([["steps", "error, points", "the grid alone", "lack a dimension"], *rows]))
        return
    if args.command == "ceiling":
        best = ceiling(args.split, args.events, args.seeds, args.agents)
        rows = [[name, *(f"{value:.3f}" for value in (row.mean(), *row))] for name, row in best.items()]
        doors.say(report.markdown([["continuation", "mean", *DIMENSIONS], *rows]))
        return
    if args.command == "followers":
        found = followers(load_events(args.data), RuleAnnotator(), args.seeds, args.agents)
        said = {HALF_LIFE: f"half-life {HALF_LIFE}", math.inf: "all", None: "the warm-up"}
        names = {row: f"slope {row[0]}, {said[row[1]]}" if row else "`persistence`" for row in found}
        rows = [[names[row], *(f"{value:.3f}" for value in (kl.mean(), *kl))] for row, kl in found.items()]
        doors.say(report.markdown([["agents who follow", "mean", *DIMENSIONS], *rows]))
        return
    own = (agora.event("dev", index) for index in range(agora.SPLITS["dev"]))
    table = agreement(load_events(args.data) if args.data else own, RuleAnnotator())
    if not table:
        raise InputError(f"{args.data}: its actions carry no labels to compare with")
    columns = ("accuracy", "majority_accuracy", "macro_f1", "majority_macro_f1")
    rows = [[name, *(f"{row[column]:.3f}" for column in columns), str(row["count"])] for name, row in table.items()]
    doors.say(report.markdown([["dimension", "accuracy", "majority class", "macro-F1", "majority class", "count"], *rows]))


if __name__ == "__main__":
    sys.exit(run_door("calibration", main))
