"""How whole rollouts scale: wall time and peak memory against agents and against worlds (`python -m mfllm_ref.bench scale`).

Every size runs in a process of its own, with the built-in world's people and by way of files like any simulation. Beside it
stands what telling every agent all previous actions would cost, which is arithmetic: no context is long enough.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mfllm_ref import doors, ib_tune, metrics, report, runs, simulation
from mfllm_ref.arithmetic import exponent, measured_flops
from mfllm_ref.lm import LanguageModel
from mfllm_ref.lm.checkpoint import load_backbone
from mfllm_ref.society import agora, prompts
from mfllm_ref.society.annotate import RuleAnnotator
from mfllm_ref.society.events import Event
from mfllm_ref.society.methods import METHODS
from mfllm_ref.society.rollout import Settings, World

FITTED_FROM = 1000  # agents: below, starting costs hide how a run scales


def long_event(actions: int) -> Event:
    """An event of so many actions: those of the built-in train split's events, one after the other, round and round."""
    events = (agora.event("train", i % agora.SPLITS["train"]) for i in itertools.count())
    cycled = itertools.islice((action for event in events for action in event.actions), actions)
    return replace(agora.event("train", 0), id=f"agora-train-{actions}", actions=tuple(cycled), posts=())


def peak_memory() -> int:
    """The most bytes this process ever had in memory. Linux's rusage would begin with those of the process that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def rollout(args: argparse.Namespace) -> dict[str, float]:
    """One rollout of `args.agents` actions in `args.worlds` worlds, from the event to metrics.json's numbers, by way of files."""
    doors.threads(args)
    device, dtype = doors.device_and_dtype(args, training=False)
    lm = LanguageModel.load(args.backbone, device, dtype)
    (agents,), (count,) = args.agents, args.worlds
    event, method = long_event(agents), METHODS["mf-llm-no-ib"]
    worlds = [World(event, method, args.seed + k) for k in range(count)]
    settings = Settings(batch=args.batch, warmup=0, action_tokens=args.new, summary_tokens=args.summary)
    loaded = peak_memory()
    with tempfile.TemporaryDirectory() as folder, runs.open_run(Path(folder), {"settings": {}, "sha256": {}}) as run:
        common = (lm, worlds, settings, RuleAnnotator(), None)
        _, seconds = simulation.roll_out(run, "", *common, likelihood=False, progress=sys.stderr.isatty())
        rolled, started = peak_memory(), time.perf_counter()
        metrics.evaluate(metrics.collect(runs.read_json_lines(run.out / "trajectory.jsonl")), {event.id: event.domain})
        measured, over = time.perf_counter() - started, peak_memory()
        files = sum(path.stat().st_size for path in run.out.iterdir())
        acted = [row["text"] for row in runs.read_json_lines(run.out / "trajectory.jsonl")]
        fields = [row["text"] for row in runs.read_json_lines(run.out / "mean_field.jsonl")]

    def mean(texts: Sequence[str]) -> float:
        return float(np.mean([len(ids) for ids in lm.tokenizer.encode_batch(texts)])) if texts else 0.0

    told = [prompts.policy_shared(event.language, event.topic, (), ib_tune.signal_of(text)) for text in fields or [""]]
    first = [(action.agent.profile, text) for action, text in zip(event.actions[: args.batch], acted)]
    listing = prompts.mean_field_prompt(event.language, event.topic, (), "".join(fields[:1]), first, len(first))
    private = [prompts.policy_private(event.language, action.agent.profile) for action in event.actions]
    return {
        "agents": agents, "worlds": count, "seconds": seconds, "evaluating": measured, "loaded": loaded, "rolled": rolled,
        "peak": over, "files": files, "prefix": mean(told), "suffix": mean(private), "new": mean(acted) + 1,
        "listing": mean([listing]), "summary": mean(fields) + 1 if fields else 0.0, "steps": len(fields) // count + 1,
    }  # fmt: skip


def scale(args: argparse.Namespace) -> None:
    """Time and memory of rollouts of growing size, fitted exponents and a picture."""
    if args.measure:
        print(json.dumps(rollout(args)))
        return
    out = args.out or runs.default_out()
    runs.check_place(out, resume=False)
    config = load_backbone(args.backbone).config

    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"agents": [], "worlds": [], "exponents": {}}

    def measure(name: str, agents: int, worlds: int) -> None:
        options = ("backbone", "batch", "new", "summary", "device", "dtype", "seed", *(["threads"] if args.threads else []))
        given = [f"--{option}={getattr(args, option)}" for option in options]
        command = [sys.executable, "-m", "mfllm_ref.bench", "scale", f"--agents={agents}", f"--worlds={worlds}", "--measure"]
        done = subprocess.run([*command, *given], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            if not any(out.iterdir()):
                out.rmdir()
            said = f"bench: the run of {agents} agents in {worlds} worlds failed"
            raise SystemExit(2 if done.returncode == 2 else said)  # 2: its own line says why
        record[name].append(json.loads(done.stdout))
        runs.write_json(out / "scale.json", record)  # what was measured outlives whatever comes

    def rows(found: Sequence[dict[str, float]]) -> list[list[object]]:
        table: list[list[object]] = [["agents", "worlds", "s", "actions/s", "MB before", "MB peak", "with metrics", "metrics, s",
                                      "MB of files", "TFLOP", "GFLOP/s", "told everything, TFLOP"]]  # fmt: skip
        for row in found:
            acting, all_told = row["flops"], row["told_flops"] = measured_flops(config, row, args.batch)
            megabytes = [f"{row[key] / 1e6:.0f}" for key in ("loaded", "rolled", "peak")]
            table.append([
                row["agents"], row["worlds"], f"{row['seconds']:.1f}", f"{row['agents'] * row['worlds'] / row['seconds']:.1f}",
                *megabytes, f"{row['evaluating']:.1f}", f"{row['files'] / 1e6:.1f}", f"{acting / 1e12:.3g}",
                f"{acting / row['seconds'] / 1e9:.1f}", f"{all_told / 1e12:.3g}",
            ])  # fmt: skip
        return table

    for n in args.agents:
        measure("agents", n, 1)
    for n in args.worlds:
        measure("worlds", args.world_agents, n)
    for name in ("agents", "worlds"):
        doors.say(report.markdown(rows(record[name])))
    for key, least in (("agents", FITTED_FROM), ("worlds", 1)):
        pairs = [(row[key], row["seconds"]) for row in record[key] if row[key] >= least]
        if len({size for size, _ in pairs}) > 1:
            record["exponents"][key] = exponent(*zip(*pairs))
            doors.say(f"seconds grow as {key} ^ {record['exponents'][key]:.3f} (from {pairs[0][0]} on)")
    runs.write_json(out / "scale.json", record)
    report.scaling(record["agents"], record["worlds"], record["exponents"], out / "scale.png")
    doors.say(f"see {out / 'scale.png'}")
