"""Times each kernel against its rivals on this machine: python -m kernels.bench [agent_attention|ib_loss] [--json FILE]

Every figure that a run prints was measured in that run: the machine's ceilings (copy bandwidth, matrix product rate), the
kernel and its rivals, timed in turns, so that a disturbance meets all of them; medians. "bound" is the analytic cost model,
FLOPs at the matrix rate plus bytes at the copy rate, of the work that no implementation can avoid; GB/s and TFLOP/s are counted
for that same work whatever an implementation does. On a GPU ms are the GPU's, and host ms what it takes to queue a call: where
host ms exceed ms, a single call waits for the host. Memory is what a call allocates at its peak beyond its inputs. On CUDA
these are Qwen2-1.5B's shapes in bfloat16 and the Triton kernels, else smaller ones in float32 and the CPU paths.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from kernels.bench_shapes import SHAPES, Attention, Call, Loss, runnable

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler, which measures memory, logs four lines a call


@cache
def _flood() -> Tensor:
    return torch.zeros(2**29, dtype=torch.int32, device="cuda")


def seconds(call: Call, device: str) -> float:
    """Time of one call; on a GPU the GPU's own, `host_seconds` being what the call asks of the processor that launches it."""
    if device != "cuda":
        return host_seconds(call)
    # Reading 2 GiB drives out what the second-level cache held, and leaves time to queue the call's launches.
    _flood().sum()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def host_seconds(call: Call) -> float:
    """Until the call returns: on a GPU launches are queued by then, not done."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def queued(call: Call) -> float:
    """Median of `host_seconds` with an idle GPU."""
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        times.append(host_seconds(call))
    torch.cuda.synchronize()
    return statistics.median(times)


def medians(calls: dict[str, Call], device: str, budget: float) -> dict[str, float]:
    """Seconds of each call, the median of rounds in which each is made twice and the second one timed: in a model, too, one layer
    follows the other, with threads awake and, on a CPU, its own numbers in cache. At least 3, at most 50 rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    start, rounds = time.perf_counter(), 0
    while rounds < 3 or (rounds < 50 and time.perf_counter() - start < budget):
        for name, call in calls.items():
            call()
            times[name].append(seconds(call, device))
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(call: Call, device: str) -> int:
    """The most that a call holds beyond what was there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def ceilings(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Copy bandwidth, bytes read and written a second, and FLOPs a second of a large matrix product."""
    n, size = (2**30, 8192) if device == "cuda" else (2**27, 2048)
    source = torch.zeros(n, dtype=torch.uint8, device=device)
    target, (a, b) = torch.empty_like(source), (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = medians(runnable({"copy": lambda: target.copy_(source), "product": lambda: a @ b}), device, 3.0)
    return 2 * n / times["copy"], 2 * size**3 / times["product"]


def measure(
    shape: Attention | Loss, device: str, dtype: torch.dtype, copy: float, matmul: float, budget: float = 10.0
) -> list[dict]:  # fmt: skip
    """One row a call: its median time, rates and peak memory, and its time over the kernel's (the first row's)."""
    calls = runnable(shape.calls(device, dtype))
    times = medians(calls, device, budget)
    flops, size = shape.work(dtype.itemsize)
    bound, ours, rows = flops / matmul + size / copy, next(iter(times.values())), []
    for name, taken in times.items():
        rows.append({
            "kernel": type(shape).__name__, **asdict(shape), "name": name, "flops": flops, "bytes": size,
            "milliseconds": taken * 1e3, "bound_milliseconds": bound * 1e3, "of_bound": bound / taken,
            "gigabytes_per_second": size / taken / 1e9,
            "of_copy_bandwidth": size / taken / copy, "teraflops": flops / taken / 1e12,
            "of_matmul_rate": flops / taken / matmul, "peak_bytes": peak_bytes(calls[name], device),
            "ratio": taken / ours, "host_milliseconds": (queued(calls[name]) if device == "cuda" else taken) * 1e3,
        })  # fmt: skip
    return rows


class _Parser(argparse.ArgumentParser):
    """argparse, but a wrong option is one line on stderr."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def models(kernels: tuple[str, ...], devices: tuple[str, ...]) -> list[dict]:
    """The analytic cost model of every shape: FLOPs and bytes that no implementation can avoid."""
    rows = []
    for device, kernel in ((device, kernel) for device in devices for kernel in kernels):
        itemsize = (torch.bfloat16 if device == "cuda" else torch.float32).itemsize
        for shape in SHAPES.get((kernel, device), []):
            flops, size = shape.work(itemsize)
            rows.append({"device": device, "kernel": kernel, **asdict(shape), "flops": flops, "bytes": size})
            print(f"{device:5}{shape}: {flops / 1e9:.4g} GFLOP, {size / 1e6:.4g} MB")
    return rows


def main(arguments: list[str] | None = None) -> int:
    """The command line: exit code 0, 2 for bad arguments, 130 on Ctrl-C, with what was measured until then in FILE."""
    parser = _Parser(prog="python -m kernels.bench", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("kernel", nargs="?", choices=("agent_attention", "ib_loss"), help="default: both")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row here too, a shape at a time")
    options = parser.parse_args(arguments)
    if options.json is not None:  # tried at once and not after minutes of measuring
        try:
            open(options.json, "a").close()
        except (OSError, ValueError) as error:
            parser.error(f"argument --json: cannot write {str(options.json)!r}: {getattr(error, 'strerror', None) or error}")
    run: dict = {"rows": []}
    try:
        for _ in _measured(run, (options.kernel,) if options.kernel else ("agent_attention", "ib_loss")):
            _save(run, options.json)
            sys.stdout.flush()  # what cannot be written is said here, not when Python ends
    except KeyboardInterrupt:
        _save(run, options.json)
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:  # a full disk, or nobody reads stdout any more
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def _save(run: dict, path: Path | None) -> None:
    if path is None:
        return
    beside = path.with_name(f".{path.name}.part") if path.is_file() else path  # a file whole or not at all; a device as it is
    try:
        beside.write_text(json.dumps(run, indent=1) + "\n")
        os.replace(beside, path)
    except OSError as error:
        if beside != path:
            beside.unlink(missing_ok=True)
        raise OSError(f"{path}: {error.strerror}") from error


def _measured(run: dict, kernels: tuple[str, ...]) -> Iterator[None]:
    """Prints and fills `run`, a step each time: the machine and the cost model, then one shape after another."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    print("what each shape costs at least; those of a GPU also where there is none, in bfloat16:")
    run["models"] = models(kernels, ("cuda",) if device == "cuda" else ("cpu", "cuda"))
    where = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    copy, matmul = ceilings(device, dtype)
    run |= {"machine": where, "torch": torch.__version__, "dtype": str(dtype), "copy_bytes_per_second": copy,
            "matmul_flops_per_second": matmul}  # fmt: skip
    print(f"\n{where}, torch {torch.__version__}, {dtype}: copies {copy / 1e9:.0f} GB/s, products {matmul / 1e12:.3g} TFLOP/s")
    yield
    for shape in (shape for kernel in kernels for shape in SHAPES[kernel, device]):
        print(f"\n{shape}\n{'':34}{'ms':>9}{'of bound':>10}{'GB/s':>8}{'of copy':>9}{'TFLOP/s':>9}"
              f"{'of product':>11}{'peak MB':>9}{'ratio':>7}"
              + (f"{'host ms':>9}" if device == "cuda" else ""))  # fmt: skip
        for row in measure(shape, device, dtype, copy, matmul):
            run["rows"].append(row)
            print(f"{row['name']:34}{row['milliseconds']:9.3f}{row['of_bound']:10.0%}"
                  f"{row['gigabytes_per_second']:8.1f}{row['of_copy_bandwidth']:9.0%}{row['teraflops']:9.3f}"
                  f"{row['of_matmul_rate']:11.0%}{row['peak_bytes'] / 1e6:9.1f}{row['ratio']:7.2f}"
                  + (f"{row['host_milliseconds']:9.3f}" if device == "cuda" else ""))  # fmt: skip
        print(f"{'bound':34}{run['rows'][-1]['bound_milliseconds']:9.3f}")
        yield


if __name__ == "__main__":
    sys.exit(main())
