"""What both doors share: common options, the choice of device, and exit codes (DESIGN section 3)."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from mfllm_ref.errors import InputError

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong option is one line on stderr, like any other bad input."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def add_common(parser: argparse.ArgumentParser) -> None:
    """The options of both doors."""
    group = parser.add_argument_group("running")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; auto: float32 on CPU")
    group.add_argument("--seed", type=natural, default=0, help="of all sampling (default: 0)")
    group.add_argument("--threads", type=positive, default=None, help="CPU threads (default: all cores)")
    group.add_argument("--out", type=Path, default=None, help="folder to write to (default: runs/<time>)")
    group.add_argument("--resume", action="store_true", help="go on with the interrupted run in --out")


def natural(text: str) -> int:
    value = int(text)
    if value < 0 or value >= 2**62:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2**62")
    return value


def positive(text: str) -> int:
    value = int(text)
    if value < 1 or value >= 2**62:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return value


def threads(args: argparse.Namespace) -> int:
    """Set torch's threads from --threads (explicitly: launchers like torchrun preset 1) and return their number."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = args.threads or cores
    if count > 1024:
        raise InputError(f"--threads {count}: this machine has {cores} cores")
    torch.set_num_threads(count)
    return count


def device_and_dtype(args: argparse.Namespace) -> tuple["torch.device", "torch.dtype"]:  # noqa: F821
    """(device, dtype) from --device and --dtype. InputError where cuda is asked for and absent."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no CUDA device that torch can use")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    automatic = torch.float32 if device.type == "cpu" else torch.bfloat16
    return device, automatic if args.dtype == "auto" else getattr(torch, args.dtype)


def run_door(name: str, main: Callable[[], None]) -> int:
    """Run a door: exit code 0, 2 with one line on stderr for bad input, 130 on Ctrl-C."""
    try:
        main()
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; --resume goes on from what is on disk", file=sys.stderr)
        return 130
    return 0
