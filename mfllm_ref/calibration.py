"""What the measures rest on: python -m mfllm_ref.calibration ceiling|annotator

    ceiling      what can be known in agora: KL of continuations by those who know more or less of its process
    annotator    agreement of the rules with the labels that events carry, beside always guessing the commonest label
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mfllm_ref import metrics, report
from mfllm_ref.doors import Parser, positive, run_door, whole
from mfllm_ref.errors import InputError
from mfllm_ref.society import agora
from mfllm_ref.society.agora_ceiling import RIVALS
from mfllm_ref.society.annotate import RuleAnnotator
from mfllm_ref.society.events import DIMENSIONS, Event
from mfllm_ref.society.readers import load_events
from mfllm_ref.society.rollout import Annotator


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
    table = {}
    for dimension, found in pairs.items():
        true, guessed = zip(*found) if found else ((), ())
        if len(set(true)) > 1:  # where all actions carry the same label, there is nothing to tell apart
            row = table[dimension] = {"count": len(true)}
            for name, labels in (("", guessed), ("majority_", (max(sorted(set(true)), key=true.count),) * len(true))):
                row[f"{name}accuracy"] = metrics.f1(true, labels, "micro")  # one label an action: the same number
                row[f"{name}macro_f1"] = metrics.f1(true, labels)
    return table


def main() -> None:
    parser = Parser(prog="python -m mfllm_ref.calibration", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    known = commands.add_parser("ceiling")
    known.add_argument("--split", choices=list(agora.SPLITS), default="dev")
    known.add_argument("--events", type=positive, metavar="N", help="the split's first N (default: all)")
    known.add_argument("--seeds", type=positive, default=2, help="continuations of each event (default: 2)")
    known.add_argument("--agents", type=whole(agora.WARMUP + 1, agora.ACTIONS), default=agora.ACTIONS, metavar="N",
                       help="an event's first N actions, warm-up included (default: all)")  # fmt: skip
    read = commands.add_parser("annotator")
    read.add_argument("--data", type=Path, help="events with labels (default: the built-in world's dev split)")
    args = parser.parse_args()
    if args.command == "ceiling":
        table = ceiling(args.split, args.events, args.seeds, args.agents)
        rows = [[name, *(f"{value:.3f}" for value in (row.mean(), *row))] for name, row in table.items()]
        print(report.markdown([["continuation", "mean", *DIMENSIONS], *rows]))
        return
    own = (agora.event("dev", index) for index in range(agora.SPLITS["dev"]))
    table = agreement(load_events(args.data) if args.data else own, RuleAnnotator())
    if not table:
        raise InputError(f"{args.data}: its actions carry no labels to compare with")
    columns = ("accuracy", "majority_accuracy", "macro_f1", "majority_macro_f1")
    rows = [[name, *(f"{row[column]:.3f}" for column in columns), row["count"]] for name, row in table.items()]
    print(report.markdown([["dimension", "accuracy", "majority class", "macro-F1", "majority class", "count"], *rows]))


if __name__ == "__main__":
    sys.exit(run_door("calibration", main))
