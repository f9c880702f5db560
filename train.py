"""Train a backbone: `python train.py --stage pretrain` makes checkpoints/tiny from the built-in world.

    python train.py --stage pretrain --out runs/tiny
    python train.py --stage pretrain --data PATH --out runs/backbone     # on real events, e.g. Weibo's

The folder it writes loads in `simulate.py --backbone`, in `LanguageModel.load` and in transformers.
"""

import sys
import time
from pathlib import Path

from mfllm_ref import doors


def parser() -> doors.Parser:
    out = doors.Parser(prog="train.py", description="Pretrain a small backbone from scratch, on the built-in world or your events.")
    out.add_argument("--stage", choices=("pretrain",), default="pretrain", help="what to train (default: pretrain)")
    out.add_argument("--data", type=Path, help="events to pretrain on; a fifth of them is left out, for tuning "
                     "(default: the built-in world's pretrain split)")  # fmt: skip
    out.add_argument("--model-type", choices=("qwen2", "qwen3", "llama", "mistral"), default="qwen2")
    out.add_argument("--shape", choices=("tiny", "small"), help="size: tiny 2.8 M parameters, small 6.6 M "
                     "(default: tiny for the built-in world, small for --data)")  # fmt: skip
    out.add_argument("--steps", type=doors.positive, default=1500, help="optimizer steps (default: 1500)")
    out.add_argument("--rows", type=doors.positive, default=12, help="documents a step (default: 12)")
    out.add_argument("--lr", type=float, default=4e-3, help="peak learning rate (default: 0.004)")
    out.add_argument("--batch", type=doors.positive, default=10, help="actions a population step (default: 10)")
    out.add_argument("--save-every", type=doors.positive, default=100, help="steps between states on disk (default: 100)")
    doors.add_common(out)
    return out


def main() -> None:
    args = parser().parse_args()
    if not 0 < args.lr < 1:
        raise doors.InputError(f"--lr {args.lr}: must lie between 0 and 1")
    from mfllm_ref import runs

    count = doors.threads(args)
    device, _ = doors.device_and_dtype(args)
    out = args.out or runs.default_out()
    settings = {
        "command": "train.py", "stage": args.stage, "data": str(args.data) if args.data else None,
        "model_type": args.model_type, "shape": args.shape or ("small" if args.data else "tiny"), "steps": args.steps,
        "rows": args.rows, "lr": args.lr, "batch": args.batch, "seed": args.seed, "threads": count,
        "device": device.type, "save_every": args.save_every,
    }  # fmt: skip
    from mfllm_ref import pretrain, report
    from mfllm_ref.society.readers import load_events

    events = load_events(args.data) if args.data else None
    record = {"settings": settings, **runs.provenance({"data": args.data} if args.data else {})}
    with runs.open_run(out, record, args.resume) as run:
        if run.finished:
            print(f"{out} is finished")
            return
        started = time.perf_counter()
        result = pretrain.run(run, settings, events, device, progress=sys.stderr.isatty())
        report.loss_curve(list(runs.read_json_lines(out / "log.jsonl")), out / "loss.png")
        run.complete(**result)
        print(f"{out}: {result['parameters'] / 1e6:.1f} M parameters in {time.perf_counter() - started:.0f} s")
        print("share acted per share said by the signal (slope; 1 follows it, 0 ignores it):")
        print("  " + "  ".join(f"{dimension} {slope:.2f}" for dimension, slope in result["response"].items()))


if __name__ == "__main__":
    sys.exit(doors.run_door("train.py", main))
