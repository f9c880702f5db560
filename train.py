"""Tune or pretrain: IB-Tune's mean-field model and policy, their rivals, or a backbone from scratch.

    python train.py                                      # IB-Tune, both stages, and a table before and after
    python train.py --method all --out runs/adapters     # the adapters of every method
    python train.py --stage mean-field --beta 0.1,1,10   # the information plane: one point a beta
    python train.py --stage pretrain --out runs/tiny     # a backbone from scratch
    torchrun --nproc-per-node=2 train.py                 # by two processes
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mfllm_ref import doors

if TYPE_CHECKING:
    from mfllm_ref.society.rollout import Annotator
    from mfllm_ref.tuning import Job, Tuner

EPILOG = """\
It writes to --out: one folder per adapter (PEFT's format: `simulate.py --adapters OUT`), or with --stage pretrain a Hugging Face
style folder (`simulate.py --backbone OUT`), log.jsonl, loss.png, response.png or, with several betas, information_plane.png,
and run.json. Ctrl-C is safe: the same command with --out and --resume goes on. Exit codes: 0 done, 2 bad input, 130 interrupted."""


def betas(text: str) -> list[float]:
    """An argparse type: numbers separated by commas."""
    return [float(part) for part in text.split(",")]


def updates(text: str) -> list[int]:
    """An argparse type: one positive number, or one for each of the two stages."""
    found = [doors.positive(part) for part in text.split(",")]
    if len(found) > 2:
        raise argparse.ArgumentTypeError(f"{text} has more numbers than there are stages, two")
    return found


def parser() -> doors.Parser:
    out = doors.Parser(
        prog="train.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages = ("all", "pretrain", "sft", "mean-field", "policy")
    out.add_argument("--stage", choices=stages, default="all", help="all: mean-field, then policy (default); sft: the rivals")
    out.add_argument("--data", type=Path, metavar="PATH", help="events (default: the built-in world). Pretraining leaves a "
                     "fifth of them out, for tuning, or those of --leave-out")  # fmt: skip
    out.add_argument("--leave-out", action="append", default=[], metavar="ID", help="an event of --data to leave out; may be "
                     "repeated")  # fmt: skip
    out.add_argument("--split", help="folder of that name in --data")
    out.add_argument("--backbone", type=Path, metavar="DIR", help="checkpoint to tune (default: checkpoints/tiny); pretrain goes "
                     "on from it (default: from scratch)")  # fmt: skip
    out.add_argument("--steps", type=updates, default=[], metavar="N[,N]", help="optimizer steps, of each stage or of mean-field "
                     "and policy; a rival gets the sum of both (default: 60,120; pretrain: 1500)")  # fmt: skip
    out.add_argument("--rows", type=doors.positive, help="population steps, or documents, that an update learns from "
                     "(default: 8; pretrain: 9)")  # fmt: skip
    out.add_argument("--lr", type=float, help="peak learning rate (default: mean-field 0.0005, "
                     "of several betas 0.004, policy 0.001, pretrain 0.004)")  # fmt: skip
    out.add_argument("--batch", type=doors.positive, default=10, metavar="B", help="actions a population step (default: 10)")
    doors.add_half_life(out)
    out.add_argument("--save-every", type=doors.positive, help="steps between states on disk (default: 20; pretrain: 100)")
    tune = out.add_argument_group("tuning")
    tune.add_argument("--method", metavar="A,B,C", help="tune the adapters of these methods; all: of every method "
                      "(default: mf-llm; stage sft: its four)")  # fmt: skip
    tune.add_argument("--mean-field-adapter", type=Path, metavar="DIR", help="stage policy: whose summaries it is tuned on")
    tune.add_argument("--policy-adapter", type=Path, metavar="DIR", help="stage mean-field: the policy whose likelihood is "
                      "the reward (default: the bare backbone)")  # fmt: skip
    tune.add_argument("--sft-adapter", type=Path, metavar="DIR", help="with several betas: the policy that gains are "
                      "measured against")  # fmt: skip
    tune.add_argument("--rank", type=doors.whole(1, 2**16), default=8, help="of the adapters (default: 8)")
    tune.add_argument("--beta", type=betas, default=[30.0], metavar="X[,X...]", help="weight of the reward against the KL "
                      "to the prior (default: 30); several: stage mean-field draws the information plane")  # fmt: skip
    tune.add_argument("--samples", type=doors.natural, default=4, metavar="K", help="summaries a gradient estimate (default: 4)")
    tune.add_argument("--micro", type=doors.positive, default=4, help="population steps differentiated at once; their "
                      "gradients accumulate (default: 4)")  # fmt: skip
    tune.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient (default: 1)")
    tune.add_argument("--repetition-penalty", type=float, default=0.0, metavar="X", help="off the reward for each repeated "
                      "token of a summary (default: 0)")  # fmt: skip
    tune.add_argument("--reweighted", type=float, default=0.0, metavar="P", help="fraction of a policy's steps whose population is "
                      "made up: actions drawn anew so that one dimension's shares are random, and those shares told (default: 0)")  # fmt: skip
    doors.add_summaries(tune)
    make = out.add_argument_group("pretraining")
    make.add_argument("--model-type", choices=("qwen2", "qwen3", "llama", "mistral"),
                      help="family (default: qwen2); a mistral has a sliding window of 256 tokens")  # fmt: skip
    make.add_argument("--shape", choices=("tiny", "small"), help="size: tiny 2.9 M parameters, small 6.6 M "
                      "(default: tiny for the built-in world, small for --data)")  # fmt: skip
    make.add_argument("--dropout", type=float, metavar="P", help="dropout on what each half of a layer adds "
                      "(default: 0 for the built-in world, of which there is always more; 0.15 for --data)")  # fmt: skip
    make.add_argument("--abridged", type=float, default=0.0, metavar="P", help="fraction of the documents that state or are told "
                      "shares which end behind a random dimension, so that IB-Tune can learn what to tell (default: 0)")  # fmt: skip
    doors.add_common(out)
    return out


def pretraining(args: argparse.Namespace, data: Path | None, out: Path, common: dict) -> None:
    with doors.interrupted_after():
        from mfllm_ref import pretrain, ranks, report, runs, simulation, tuning
        from mfllm_ref.society.readers import load_events

    dropout = (0.15 if args.data else 0.0) if args.dropout is None else args.dropout
    backbone = args.backbone
    if backbone and (args.model_type or args.shape):
        raise doors.InputError(f"--{'model-type' if args.model_type else 'shape'}: is that of --backbone {backbone}")
    settings = {
        **common, "backbone": str(backbone) if backbone else None, "model_type": args.model_type or "qwen2",
        "shape": args.shape or ("small" if args.data else "tiny"),
        "steps": (args.steps or [1500])[0], "rows": args.rows or 9, "lr": 4e-3 if args.lr is None else args.lr,
        "save_every": args.save_every or 100, "dropout": dropout, "leave_out": sorted(set(args.leave_out)),
        "abridged": args.abridged,
    }  # fmt: skip
    if args.shard:
        raise doors.InputError("--shard spreads a frozen backbone; pretraining trains all weights")
    if len(args.steps) > 1:
        raise doors.InputError(f"--steps {','.join(map(str, args.steps))}: pretraining is one stage")
    if not 0 < settings["lr"] < 1:
        raise doors.InputError(f"--lr {args.lr}: must lie between 0 and 1")
    if not 0 <= dropout < 1:
        raise doors.InputError(f"--dropout {args.dropout}: must be at least 0 and below 1")
    if not 0 <= args.abridged <= 1:
        raise doors.InputError(f"--abridged {args.abridged}: must be at least 0 and at most 1")
    if settings["rows"] < ranks.world_size():
        raise doors.InputError(f"--rows {settings['rows']}: fewer than the {ranks.world_size()} processes that share them")
    if args.dtype not in ("auto", "float32", "bfloat16"):
        raise doors.InputError(f"--dtype {args.dtype}: pretraining keeps float32 weights, and multiplies in float32 or bfloat16")
    device, _ = doors.device_and_dtype(args)
    fast = device.type != "cpu" or doors.fast_bfloat16()
    settings |= {"device": device.type, "mixed": args.dtype == "bfloat16" or args.dtype == "auto" and fast}
    events, begun = load_events(data) if data else None, pretrain.load(backbone) if backbone else None
    if begun is not None:
        settings |= {"model_type": begun.backbone.config.model_type, "shape": None}  # what it is, whatever a new one would be
    record = {"settings": settings, **runs.provenance(simulation.weights_of(backbone) if backbone else {})}
    if events is not None:
        tuning.check_ids(events, args.leave_out)
        record["sha256"] |= simulation.digests(data, events)
    reading = pretrain.corpora(events, args.batch, common["half_life"], settings["leave_out"], args.abridged)
    with runs.open_run(out, record, args.resume) as run:
        if run.finished:
            doors.say(f"{out} is finished")
            return
        started = time.perf_counter()
        result = pretrain.run(run, settings, *reading, device, doors.progress(out), begun)
        report.loss_curve(list(runs.read_json_lines(out / "log.jsonl")), out / "loss.png")
        run.complete(**result)
        doors.say(f"{out}: {result['parameters'] / 1e6:.1f} M parameters in {time.perf_counter() - started:.0f} s")
        doors.say("share acted per share said by the signal (slope; 1 follows it, 0 ignores it):")
        doors.say("  " + "  ".join(f"{dimension} {slope:.2f}" for dimension, slope in result["response"].items()))


def tuning(args: argparse.Namespace, data: Path | None, out: Path, common: dict) -> None:
    with doors.interrupted_after():
        from mfllm_ref import ib_tune, report, runs, simulation, tuning
        from mfllm_ref.fields import a_list
        from mfllm_ref.lm import LanguageModel
        from mfllm_ref.society.annotate import RuleAnnotator
        from mfllm_ref.society.readers import load_events

    device, dtype = doors.device_and_dtype(args)
    # The default takes about eight minutes on two cores; ten are allowed.
    steps = tuple(args.steps * 2)[:2] or (60, 120)
    settings = ib_tune.Settings(
        rows=args.rows or 8, micro=args.micro, lr=args.lr, samples=args.samples, beta=args.beta[0],
        repetition_penalty=args.repetition_penalty, summary_tokens=args.summary_tokens, summary_top_p=args.summary_top_p,
        clip=args.clip, seed=args.seed, reweighted=args.reweighted,
        mixed=args.dtype == "auto" and device.type == "cpu" and doors.fast_bfloat16(),
    )  # fmt: skip
    for beta in args.beta:
        dataclasses.replace(settings, beta=beta).check()
    methods = None if args.method is None else [name.strip() for name in args.method.split(",")]
    todo = tuning.jobs(args.stage, methods, steps, args.beta)
    backbone = args.backbone or doors.CHECKPOINTS / "tiny"
    events, annotate = load_events(data) if data else None, RuleAnnotator()
    # Where pretraining read these very events, only those that it kept back may be tuned on.
    before, pretrained = runs.pretraining(backbone), None
    read = simulation.digests(data, events) if events else None
    if read and before["sha256"].get("events") == read["events"]:
        pretrained = a_list(before["settings"].get("leave_out", []), str(backbone / runs.RUN_FILE), "'leave_out'")
    tuned, dev = tuning.choose_events(events, args.leave_out, pretrained, args.batch, annotate, common["half_life"])

    lm = LanguageModel.load(backbone, device=str(device), dtype=dtype, spread=args.shard)
    tuning.check_room(lm, [*tuned, *dev], todo, args.summary_tokens)
    given = {"mean-field": args.mean_field_adapter, "policy": args.policy_adapter, "sft": args.sft_adapter}
    adapters = tuning.find_adapters(todo, args.stage, given, doors.own_adapters(backbone))
    for name, path in adapters.items():
        lm.load_adapter(name, path)
    reward = "policy" if "policy" in adapters else None

    record = runs.provenance(simulation.weights_of(backbone) | simulation.adapter_files(adapters))
    record["sha256"] |= read or simulation.digests(None, [past.event for past in (*tuned, *dev)])
    record["settings"] = {
        **common, "split": args.split, "leave_out": sorted(set(args.leave_out)), "method": args.method,
        **dataclasses.asdict(settings), "steps": steps, "beta": args.beta, "rank": args.rank, "device": device.type,
        "dtype": str(dtype).removeprefix("torch."), "save_every": args.save_every or 20, "shard": args.shard,
    }  # fmt: skip
    record["jobs"] = [dataclasses.asdict(job) for job in todo]
    with runs.open_run(out, record, args.resume) as run:
        if run.finished:
            doors.say(f"{out} is finished: see {out / 'loss.png'}")
            return
        tuner = tuning.Tuner(run, lm, tuned, dev, settings, args.rank, args.save_every or 20, reward, doors.progress(out))
        tuner.all(todo)
        report.loss_curve(runs.read_json_lines(out / "log.jsonl"), out / "loss.png")
        drawn = ["loss.png", *_what_it_changed(tuner, todo, annotate, common["half_life"], known=data is None)]
    doors.say(f"\nEverything is in {out}: see {' and '.join(drawn)}")


def _what_it_changed(tuner: "Tuner", todo: "Sequence[Job]", annotate: "Annotator", half_life: float, known: bool) -> list[str]:
    """Finish a tuning run with numbers, pictures and tables of what its adapters changed; the names of the pictures."""
    from mfllm_ref import report, tuning
    from mfllm_ref.society import rollout
    from mfllm_ref.society.response import LEVELS, WATCHED

    run, lm, dev, settings = tuner.run, tuner.lm, tuner.dev, tuner.settings
    result: dict = {}
    if tuning.draws_plane(todo):
        result["plane"], result["untuned"] = tuning.information_plane(lm, dev, settings, todo, tuner.policy, "sft")
        report.information_plane(result["plane"], result["untuned"], run.out / "information_plane.png")
        points = [{"beta": "untuned"} | result["untuned"], *result["plane"]]
        rows = [[point["beta"], f"{point['kl']:.2f}", f"{point['gain']:.2f}"] for point in points]
        doors.say(report.markdown([["beta", "KL, nats per step", "gain, nats per step"], *rows]))
    if policies := [job.name for job in todo if job.signal in ("mean-field", "empirical")]:
        curves = tuning.responses(lm, dev, annotate, policies[0], known)
        report.response(curves, LEVELS, WATCHED, run.out / "response.png")
        result["response"] = tuning.slopes(curves)
        doors.say(report.slope_table(result["response"]))
    if {job.name for job in todo} >= {"mean-field", "policy"}:
        # short, as the default has ten minutes in all
        plan = rollout.Settings(150, dev[0].batch, 50, summary_tokens=settings.summary_tokens,
                                summary_top_p=settings.summary_top_p, half_life=half_life)  # fmt: skip
        measured = tuning.compare(lm, dev, annotate, ("state", "persistence", "mf-llm-no-ib", "mf-llm"), settings.seed, plan)
        if measured:
            doors.say(report.table(measured))
            doors.say("before tuning: mf-llm-no-ib; after: mf-llm")
            result["kl"] = {name: entry["kl"]["mean"] for name, entry in measured["methods"].items()}
        else:
            doors.say("no table before and after: no dev event has over 100 actions")
    if result:
        tuner.log.append([result])
    run.complete(**result)
    return [name for name, key in (("information_plane.png", "plane"), ("response.png", "response")) if key in result]


def main() -> None:
    options = parser()
    args = options.parse_args()
    options.refuse(args, "tuning" if args.stage == "pretrain" else "pretraining", f"--stage {args.stage}")
    for option, values in (("--split", [args.split] if args.split else []), ("--leave-out", args.leave_out)):
        if values and not args.data:
            raise doors.InputError(f"{option} {values[0]}: needs --data, whose events it selects from")
    out = doors.place(args)
    common = {
        "command": "train.py", "stage": args.stage, "data": str(args.data) if args.data else None, "batch": args.batch,
        "half_life": doors.half_life(args), "seed": args.seed, "threads": doors.threads(args),
    }  # fmt: skip
    data = args.data / args.split if args.data and args.split else args.data
    (pretraining if args.stage == "pretrain" else tuning)(args, data, out, common)
    from mfllm_ref.training import STATE

    (out / STATE).unlink(missing_ok=True)  # only once the run is finished: an interrupted run would start over without its state


if __name__ == "__main__":
    sys.exit(doors.run_door("train.py", main))
