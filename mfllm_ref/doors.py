"""What both doors share: common options, the choice of device, and exit codes."""

import argparse
import io
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mfllm_ref import ranks
from mfllm_ref.errors import InputError, Notice
from mfllm_ref.fields import number_field
from mfllm_ref.society.events import HALF_LIFE
from mfllm_ref.society.prompts import SUMMARY_TOP_P

if TYPE_CHECKING:
    import torch

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"  # what runs use by default: tiny/ and tiny-adapters/
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
KEPT_SHAPES = 256  # matrix shapes whose compiled products oneDNN, and PyTorch on top of it, keep cached


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong option is one line on stderr, like any other bad input."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)

    def refuse(self, args: argparse.Namespace, title: str, where: str) -> None:
        """InputError for an option of the group `title` that was given although `where` ignores it."""
        for group in self._action_groups:
            for action in group._group_actions if group.title == title else ():
                if getattr(args, action.dest) != action.default:
                    raise InputError(f"{action.option_strings[0]} is for {title}; {where} does not read it")


def add_common(parser: argparse.ArgumentParser) -> None:
    """The options of both doors."""
    group = parser.add_argument_group("running")
    add_machine(group)
    group.add_argument("--out", type=Path, default=None, help="folder to write to (default: runs/<time>)")
    group.add_argument("--shard", action="store_true", help="spread the frozen backbone over torchrun's processes, where it "
                       "is too large for one device; they then share no other work")  # fmt: skip
    group.add_argument("--resume", action="store_true", help="go on with the interrupted run in --out")


def add_machine(parser: argparse._ActionsContainer) -> None:
    """The options of everything that computes."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; auto: bfloat16 where the "
                        "device multiplies it fast (training on a CPU: in products alone), else float32")  # fmt: skip
    parser.add_argument("--seed", type=natural, default=0, help="of all sampling (default: 0)")
    parser.add_argument("--threads", type=whole(1, 1024), default=None, help="CPU threads of a process "
                        "(default: all cores, divided among torchrun's processes)")  # fmt: skip


def whole(least: int, most: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` to `most`."""

    def integer(text: str) -> int:
        if not least <= (value := int(text)) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        return value

    return integer


natural, positive = whole(0, 2**62), whole(1, 2**62)


def fraction(text: str) -> float:
    """An argparse type: a number above 0, at most 1."""
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def add_half_life(parser: argparse._ActionsContainer) -> None:
    """How long a population remembers, to both doors alike."""
    parser.add_argument("--half-life", type=positive, metavar="N", help="half-life, in actions, of the population's label "
                        f"shares (default: that of the backbone's pretraining where it was done here, else {HALF_LIFE})")  # fmt: skip


def half_life(args: argparse.Namespace) -> int:
    """--half-life, by default that of the pretraining that made --backbone. InputError for a damaged record of it."""
    from mfllm_ref import runs

    if args.half_life or args.backbone is None:
        return args.half_life or HALF_LIFE
    where = str(args.backbone / runs.RUN_FILE)
    found = number_field(runs.pretraining(args.backbone)["settings"], "half_life", where, HALF_LIFE)
    if found < 1:
        raise InputError(f"{where}: 'half_life' must be at least 1, not {found:g}")
    return int(found)


def add_summaries(parser: argparse._ActionsContainer) -> None:
    """How summaries of the population are written, to both doors alike."""
    parser.add_argument("--summary-tokens", type=positive, default=120, metavar="N", help="longest summary of the population "
                        "(default: 120)")  # fmt: skip
    parser.add_argument("--summary-top-p", type=fraction, default=SUMMARY_TOP_P, metavar="P", help="draw a summary's tokens "
                        f"from the likeliest that have this probability (default: {SUMMARY_TOP_P}; 1: from all)")  # fmt: skip


def threads(args: argparse.Namespace) -> int:
    """Set torch's threads from --threads (explicitly: launchers like torchrun preset 1) and return their number.

    Also bounds what a CPU's bfloat16 products keep: every step has lengths of its own, and by default what oneDNN made for
    the last 1,024 shapes stays in memory, over half a megabyte each.
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # read when the first product is made
        os.environ.setdefault(cache, str(KEPT_SHAPES))
    with interrupted_after():
        import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = args.threads or max(1, cores // ranks.local_size())
    torch.set_num_threads(count)
    return count


def device_and_dtype(args: argparse.Namespace, training: bool = True) -> tuple["torch.device", "torch.dtype"]:
    """(device, dtype) from --device and --dtype. InputError where cuda is asked for and absent.

    What auto means depends on what the CPU is able to do, never on a timing: one machine, one answer.
    """
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no CUDA device that torch can use")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        if ranks.local_rank() >= torch.cuda.device_count():
            devices = torch.cuda.device_count()
            raise InputError(f"--nproc-per-node: each process needs its own CUDA device; this machine has {devices}")
        torch.cuda.set_device(ranks.local_rank())  # what "cuda" means from now on
    automatic = torch.bfloat16 if device.type != "cpu" or not training and fast_bfloat16() else torch.float32
    return device, automatic if args.dtype == "auto" else getattr(torch, args.dtype)


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32."""
    import torch

    able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return able.get("avx512_bf16", False)


@contextmanager
def _notices(name: str) -> Iterator[None]:
    """Within, a `Notice` is one line that begins with the door's name; other warnings look as ever."""
    usual = warnings.formatwarning

    def formatted(message: Warning | str, category: type[Warning], *place: Any, **line: Any) -> str:
        return f"{name}: {message}\n" if issubclass(category, Notice) else usual(message, category, *place, **line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = usual


def own_adapters(backbone: Path) -> Path | None:
    """The committed adapters, for the backbone that they were tuned on."""
    own = CHECKPOINTS / "tiny-adapters"
    return own if own.is_dir() and os.path.realpath(backbone) == os.path.realpath(CHECKPOINTS / "tiny") else None


@contextmanager
def interrupted_after() -> Iterator[None]:
    """Within, Ctrl-C waits for the end: packages that it hits while they are imported lose it, or stay half imported."""
    held: list[int] = []
    usual = signal.getsignal(signal.SIGINT)
    mine = threading.current_thread() is threading.main_thread() and callable(usual)
    if mine:
        signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGINT, usual)
    if held:
        raise KeyboardInterrupt


def place(args: argparse.Namespace) -> Path:
    """The folder of this run: --out, by default a new one. InputError where a run cannot be there, or --resume names none."""
    from mfllm_ref import runs

    if args.resume and args.out is None:
        raise InputError("--resume needs --out, the folder of the run to go on with")
    out = args.out or runs.default_out()
    runs.check_place(out, args.resume)
    return out


def progress(out: Path) -> bool:
    """Whether stderr is a terminal, which gets a progress bar; it is first told where the run is."""
    if show := sys.stderr is not None and sys.stderr.isatty():  # it may be closed
        print(f"writing to {out}", file=sys.stderr)
    return show


def say(text: str) -> None:
    """Print. A closed pipe (`| head`) or a full disk does not end the run: what is said is in the run's files too."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_door(name: str, main: Callable[[], None]) -> int:
    """Run a door: exit code 0, 2 with one line on stderr for bad input, 130 on Ctrl-C. Under torchrun one process prints
    that line, and the code is 1 where another process has ended without one."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: no path may end the run
    try:
        with _notices(name), ranks.job():
            main()
        return 0
    except (InputError, OSError) as error:  # OSError from the system: a path too long, permission denied
        code, said = 2, str(error)
    except FloatingPointError as error:  # weights that overflow: no NaN goes on into a file
        code, said = 2, f"{error} (damaged weights, or a --dtype too narrow for them)"
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error))):
            raise
        code, said = 2, f"out of memory ({str(error).splitlines()[0][:200] if str(error) else 'a smaller run may fit'})"
    except (KeyboardInterrupt, ranks.Lost) as error:
        code, why = (130, "interrupted") if isinstance(error, KeyboardInterrupt) else (1, "another process of this job has ended")
        said = "; ".join([why, *getattr(error, "__notes__", [])])
    if ranks.first_to_report() and sys.stderr is not None:
        print(f"{name}: {' '.join(said.split())}", file=sys.stderr)
    return code
