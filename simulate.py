"""Simulate how a population decides, and measure how close each method comes to what really happened.

    python simulate.py                                   # the built-in world, every method, under 90 s on two cores
    python simulate.py --method state,mf-llm --seeds 3
    python simulate.py --data PATH --backbone DIR        # your events, your Hugging Face style model
    python simulate.py --intervene FILE.json             # what if these posts had been there too?
    torchrun --nproc-per-node=2 simulate.py              # by two processes, to the same bytes
"""

import argparse
import dataclasses
import sys
import warnings
from pathlib import Path

from mfllm_ref import doors

EPILOG = """\
It writes to --out: report.png (look at this first), metrics.json (every number of the table it prints, and more),
trajectory.jsonl (each action, simulated and real, with its labels), mean_field.jsonl (the summaries of the population),
likelihood.jsonl (the log-likelihood of the real actions) and run.json (what made all this). Ctrl-C is safe: the same command
with --out and --resume goes on. Exit codes: 0 done, 2 bad input, 130 interrupted."""


def parser() -> doors.Parser:
    out = doors.Parser(
        prog="simulate.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = out.add_argument_group("what to simulate")
    what.add_argument("--data", type=Path, metavar="PATH", help="file or folder of events, the format is detected "
                      "(default: the built-in world)")  # fmt: skip
    what.add_argument("--split", choices=("train", "dev", "test"), help="of the built-in world (default: test), or a "
                      "folder of that name in --data")  # fmt: skip
    what.add_argument("--event", action="append", default=[], metavar="ID", help="only this event; may be repeated")
    what.add_argument("--events", type=doors.positive, metavar="N", help="only the first N events (default: 7 of the "
                      "built-in world, all of --data)")  # fmt: skip
    what.add_argument("--method", metavar="A,B,C", help="methods to compare (default: all whose adapters exist)")
    what.add_argument("--agents", type=doors.positive, metavar="N", help="first N actions of an event, warm-up "
                      "included (default: 110 of the built-in world, else all)")  # fmt: skip
    what.add_argument("--batch", type=doors.positive, default=10, metavar="B", help="agents a step (default: 10)")
    doors.add_half_life(what)
    what.add_argument("--warmup", type=doors.natural, default=50, metavar="W", help="first W actions are the real "
                      "ones, the rest is simulated (default: 50)")  # fmt: skip
    what.add_argument("--seeds", type=doors.whole(1, 1000), default=1, metavar="R", help="roll each event out R times "
                      "(default: 1)")  # fmt: skip
    what.add_argument("--intervene", type=Path, metavar="FILE", help='insert actions: a JSON list of {"step": t, '
                      '"actions": [{"profile": "...", "text": "..."}]}; the effect is measured against the same seeds '
                      "without them")  # fmt: skip
    model = out.add_argument_group("the language model")
    model.add_argument("--backbone", type=Path, metavar="DIR", help="qwen2, qwen3, llama or mistral checkpoint "
                       "(default: checkpoints/tiny)")  # fmt: skip
    model.add_argument("--adapters", type=Path, metavar="DIR", help="folder of LoRA adapters: policy/, mean-field/, "
                       "sft/, recent-sft/, ... (default: those made for checkpoints/tiny, with it)")  # fmt: skip
    model.add_argument("--policy-adapter", type=Path, metavar="DIR", help="use this as the policy's adapter")
    model.add_argument("--mean-field-adapter", type=Path, metavar="DIR", help="use this as the mean field's adapter")
    model.add_argument("--chat", action="store_true", help="put prompts into the checkpoint's chat template")
    doors.add_summaries(model)
    model.add_argument("--action-tokens", type=doors.positive, default=48, metavar="N", help="longest action (default: "
                       "48)")  # fmt: skip
    model.add_argument("--annotator", choices=("rules", "lm"), default="rules", help="what labels the texts: word "
                       "lists, or the backbone (worth it for a large one; default: rules)")  # fmt: skip
    doors.add_common(out)
    return out


def main() -> None:
    args = parser().parse_args()
    out = doors.place(args)
    with doors.interrupted_after():  # imported late: torch takes a second or two, and errors above should come at once
        from mfllm_ref import metrics, report, runs, simulation
        from mfllm_ref.lm import LanguageModel
        from mfllm_ref.society.annotate import LMAnnotator, RuleAnnotator
        from mfllm_ref.society.rollout import Settings, World

    threads = doors.threads(args)
    device, dtype = doors.device_and_dtype(args, training=False)
    backbone = args.backbone or doors.CHECKPOINTS / "tiny"
    folder = args.adapters or doors.own_adapters(backbone)
    given = {"policy": args.policy_adapter, "mean-field": args.mean_field_adapter}
    adapters = simulation.find_adapters(folder, given)
    methods = simulation.choose_methods(args.method, adapters, args.warmup)
    adapters = {name: path for name, path in adapters.items() if any(name in (m.policy, m.mean_field) for m in methods)}
    events = simulation.choose_events(args.data, args.split, args.event, args.events)
    tokens = (args.action_tokens, args.summary_tokens)
    agents = args.agents or (simulation.BUILT_IN_AGENTS if args.data is None else None)
    half_life = doors.half_life(args)
    settings = Settings(agents, args.batch, args.warmup, *tokens, args.chat, args.summary_top_p, half_life)
    events, left_out = simulation.long_enough(events, settings, named=bool(args.event))
    intervention = simulation.read_intervention(args.intervene, events, settings) if args.intervene else None
    lm = LanguageModel.load(backbone, device=str(device), dtype=dtype, spread=args.shard)
    for name, path in adapters.items():
        lm.load_adapter(name, path)
    if max(tokens) >= lm.backbone.config.max_positions:
        where = f"{backbone} has {lm.backbone.config.max_positions} positions"
        raise doors.InputError(f"--action-tokens {tokens[0]} and --summary-tokens {tokens[1]}: {where}, with the prompt")
    if args.chat:
        lm.tokenizer.chat([{"role": "user", "content": "?"}])  # refuses a checkpoint without a template
    simulation.check_room(lm, events, methods, settings)
    annotate = LMAnnotator(lm) if args.annotator == "lm" else RuleAnnotator()

    seeds = [args.seed + k for k in range(args.seeds)]
    worlds = [World(event, method, seed) for event in events for method in methods for seed in seeds]
    inputs = {**simulation.weights_of(backbone), **simulation.adapter_files(adapters)}
    origin = runs.provenance(inputs | ({"intervention": args.intervene} if args.intervene else {}))
    origin["sha256"] |= simulation.digests(args.data, events)
    record = {
        "settings": {
            "command": "simulate.py", "events": [event.id for event in events], "methods": [m.name for m in methods],
            **dataclasses.asdict(settings), "seed": args.seed, "seeds": args.seeds, "intervene": args.intervene is not None,
            "annotator": args.annotator, "device": device.type, "dtype": str(dtype).removeprefix("torch."),
            "threads": threads, "shard": args.shard,
        },
        "paths": {"backbone": str(backbone), "data": str(args.data or "built-in"), "adapters": str(folder or "none"),
                  **{f"{name}-adapter": str(path) for name, path in given.items() if path}},
        "seeds": seeds, "threads": threads, **origin,
    }  # fmt: skip
    for line in left_out:
        warnings.warn(line, doors.Notice, stacklevel=1)
    with runs.open_run(out, record, args.resume) as run:
        if run.finished:
            doors.say(f"{out} is finished: see {out / 'report.png'}")
            return
        show = doors.progress(out)
        common = (lm, worlds, settings, annotate)
        written, seconds = simulation.roll_out(run, "", *common, intervention, likelihood=True, progress=show)
        if intervention:
            more = simulation.roll_out(run, "-without", *common, None, likelihood=False, progress=show)
            written, seconds = written + more[0], seconds + more[1]
        known = events if args.data is None and args.warmup else None  # events whose true process can be continued
        floors = simulation.floors(known or (), settings, annotate)
        likelihood = simulation.nll(runs.read_json_lines(out / "likelihood.jsonl"))
        labels = metrics.collect(runs.read_json_lines(out / "trajectory.jsonl"))
        result = metrics.evaluate(labels, {event.id: event.domain for event in events}, floors, likelihood)
        if intervention:
            why = "there is no warm-up to go on from" if args.data is None else "the true process of these events is not known"
            result["intervention"] = simulation.effect(run, known, settings, annotate, intervention, why)
        runs.write_json(out / "metrics.json", result)
        report.figure(labels, result, out / "report.png")
        speed = round(written / seconds, 1) if written else None
        run.complete(actions_per_second=speed)
    doors.say(report.table(result))
    if intervention:
        doors.say(report.effect_table(result["intervention"]))
    rate = f"{written} actions in {seconds:.0f} s ({speed:.1f} a second). " if speed else ""
    doors.say(f"\n{rate}Everything is in {out}: see report.png")


if __name__ == "__main__":
    sys.exit(doors.run_door("simulate.py", main))
