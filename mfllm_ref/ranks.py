"""Several processes on one piece of work, started by torchrun. Alone, all of this costs nothing and imports nothing.

Notable:
- Work is cut into parts by what it is, never by how many processes there are. A rank computes its share of the parts and is
  told the others' results, in the order of the parts: every number comes from the same shapes as in a single process.
- What goes wrong in a part goes wrong on every rank. A process that dies is noticed by the others (its connection closes, and
  torchrun asks them to end): they raise `Lost`. Only the first process that reports an error prints it, so that a user reads
  one line.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from mfllm_ref.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Part = TypeVar("Part")
Result = TypeVar("Result")
_rank, _size, _store, _in_step = 0, 1, None, False


class Lost(BaseException):
    """Another process of this job has ended. A BaseException, as KeyboardInterrupt is: it may come at any moment."""


@contextlib.contextmanager
def job() -> Iterator[None]:
    """Within it this process belongs to those that torchrun started with it (gloo for what is on the CPU, nccl for CUDA), if
    it started this one at all. Only rank 0 prints."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    global _rank, _size, _store
    import torch
    import torch.distributed as dist

    signal.signal(signal.SIGTERM, _lost)  # what torchrun sends to the others when one has ended
    with _together():
        _store, rank, size = next(dist.rendezvous("env://"))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=_store, rank=rank, world_size=size)
    _rank, _size = rank, size
    with contextlib.ExitStack() as stack:
        if rank:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            yield
        except RuntimeError as error:  # steps taken together are inside the backbone, which knows nothing of `Lost`
            if _in_step and any(name in str(error).lower() for name in ("gloo", "nccl")):
                _lost()
            raise
    dist.destroy_process_group()


def _lost(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what this process has to write and to say comes now
    raise Lost


def rank() -> int:
    """This process among `world_size()`; 0 writes all files and says everything."""
    return _rank


def world_size() -> int:
    return _size


def local_rank() -> int:
    """This process among the `local_size()` of its machine: which of its devices it takes."""
    return int(os.environ["LOCAL_RANK"]) if _size > 1 else 0


def local_size() -> int:
    return int(os.environ["LOCAL_WORLD_SIZE"]) if _size > 1 else 1


def keep_step() -> None:
    """From now on all processes run the same passes: FSDP's collectives need them in lockstep (`checkpoint.shard`)."""
    global _in_step
    _in_step = True


def in_step() -> bool:
    return _in_step


def sharing() -> bool:
    """Whether other processes compute parts of the work."""
    return _size > 1 and not _in_step


@contextlib.contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError:  # of gloo, nccl or the store: somebody is no longer there
        _lost()


def gather(value: Any) -> list[Any]:
    """Every rank's `value` (picklable, tensors on the CPU), in rank order. Also a barrier."""
    if _size == 1:
        return [value]
    import torch.distributed as dist

    out = [None] * _size
    with _together():
        dist.all_gather_object(out, value)
    return out


def owners(costs: Sequence[float]) -> list[int]:
    """Which rank computes each part: greedily, the most expensive first, each to the least loaded rank. Deterministic."""
    load, owner = [0.0] * _size, [0] * len(costs)
    for part in sorted(range(len(costs)), key=lambda part: -costs[part]):
        owner[part] = min(range(_size), key=load.__getitem__)
        load[owner[part]] += costs[part]
    return owner


def compute(work: Callable[[Part], Result], parts: Sequence[Part], costs: Sequence[float]) -> list[Result]:
    """[work(part) for part in parts], by all ranks together. Results must be of the CPU. An InputError or FloatingPointError in
    any part is raised on every rank: that of the first such part."""
    if not sharing():
        return [work(part) for part in parts]
    mine: dict[int, Result] = {}
    failed: dict[int, Exception] = {}
    for number, owner in enumerate(owners(costs)):
        if owner == _rank and not failed:
            try:
                mine[number] = work(parts[number])
            except (InputError, FloatingPointError) as error:
                failed[number] = error
    found: dict[int, Result] = {}
    failures: dict[int, Exception] = {}
    for theirs, wrong in gather((mine, failed)):
        found, failures = found | theirs, failures | wrong
    if failures:
        raise failures[min(failures)]
    return [found[number] for number in range(len(parts))]


def add_gradients(
    parameters: Sequence["Tensor"], made: Mapping[int, Sequence["Tensor"]], costs: Sequence[float]
) -> None:
    """Put into `parameters`' .grad, on every rank, the sum of the gradients of all parts (those that `compute` shared by
    `costs`; `made`: this rank's by number). Part after part, as one process adds them: the sum has the same bits."""
    if not sharing():
        return
    import torch
    import torch.distributed as dist

    sizes = [p.numel() for p in parameters]
    for number, owner in enumerate(owners(costs)):
        flat = torch.cat([g.flatten() for g in made[number]]) if owner == _rank else parameters[0].new_empty(sum(sizes))
        with _together():
            dist.broadcast(flat, owner)
        for p, g in zip(parameters, flat.split(sizes), strict=True):
            p.grad = g.view_as(p) if p.grad is None else p.grad + g.view_as(p)


def first_to_report() -> bool:
    """True for the first process that asks, which then prints why the job ends."""
    if _size == 1:
        return True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # chosen to report: it must not be killed before it has
    try:
        return _store.add("ended", 1) == 1
    except RuntimeError:  # the store went with the process that held it
        return True
