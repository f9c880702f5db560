"""Times each kernel against its rivals on this machine: python -m kernels.bench [agent_attention|ib_loss] [--json FILE]

Every figure of a run is of that run: the machine's ceilings (copy bandwidth, matrix product rate), the kernel and its
rivals, timed in turns, so that a disturbance meets all of them; medians. "bound" is the analytic cost model, FLOPs at the
matrix rate plus bytes at the copy rate, of the work that no implementation can avoid; GB/s and TFLOP/s are counted for
that same work whatever an implementation does. On a GPU ms are the GPU's, and host ms what it takes to queue a call: where
they are more, a call alone waits for them. Memory is what a call allocates at its peak beyond its inputs.
On CUDA these are Qwen2-1.5B's shapes in bfloat16 and the Triton kernels, else smaller ones in float32 and the CPU paths.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from kernels import agent_attention, ib_loss
from kernels.agent_attention_plan import Plan
from kernels.ib_loss import ib_loss_reference

Call = Callable[[], object]
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler, which measures memory, logs four lines a call


@dataclass(frozen=True)
class Attention:
    """worlds of `agents` each, `prefix` and `suffix` keys; all of the suffix is new (prefill) or its last token (decode).
    backward: with gradients to queries, keys and values, as in training."""

    worlds: int
    agents: int
    prefix: int
    suffix: int
    q_len: int
    heads: int
    kv_heads: int
    head_dim: int
    backward: bool = False

    def work(self, itemsize: int) -> tuple[float, float]:
        """FLOPs and bytes: scores and averages over the keys that rows see; q, out, every prefix and suffix once. Backwards five
        products of that size for two, and q, out, keys and values read again beside all gradients."""
        agents, t = self.worlds * self.agents, self.q_len
        seen = t * (self.prefix + self.suffix) - t * (t - 1) / 2
        keys = self.worlds * self.prefix + agents * self.suffix
        numbers = 2 * self.kv_heads * self.head_dim * keys + 2 * agents * self.heads * t * self.head_dim
        flops = 4.0 * self.heads * self.head_dim * seen * agents
        return flops * (3.5 if self.backward else 1), float(numbers * itemsize * (3 if self.backward else 1))

    def calls(self, device: str, dtype: torch.dtype) -> dict[str, Call]:
        """agent_attention, and the same through PyTorch's own kernels, the prefix repeated beforehand where they need it."""
        agents, t = self.worlds * self.agents, self.q_len
        q = torch.randn(agents, self.heads, t, self.head_dim, device=device, dtype=dtype)
        prefix_k, prefix_v, suffix_k, suffix_v = (
            torch.randn(n, self.kv_heads, slots, self.head_dim, device=device, dtype=dtype)
            for n, slots in ((self.worlds, self.prefix), (agents, self.suffix)) for _ in "kv"
        )  # fmt: skip
        prefix_len = torch.full((self.worlds,), self.prefix, dtype=torch.int32)
        suffix_len = torch.full((agents,), self.suffix, dtype=torch.int32)
        world = torch.arange(self.worlds, dtype=torch.int32).repeat_interleave(self.agents)
        plan = Plan(self.heads, t, prefix_len, self.prefix, suffix_len, self.suffix, world, device=device)
        rest = (prefix_k, prefix_v, prefix_len, suffix_k, suffix_v, suffix_len, world)
        keys, values = (
            torch.cat((x.repeat_interleave(self.agents, dim=0), y), dim=2)
            for x, y in ((prefix_k, suffix_k), (prefix_v, suffix_v))
        )
        row, key = torch.arange(t)[:, None], torch.arange(self.prefix + self.suffix)
        mask = None if t == 1 else (key <= self.prefix + self.suffix - t + row).to(device)
        calls: dict[str, Call] = {
            "agent_attention": lambda: agent_attention(q, *rest, plan=plan),
            "SDPA, prefix repeated": lambda: F.scaled_dot_product_attention(
                q, keys, values, attn_mask=mask, enable_gqa=True
            ),
        }
        # That SDPA's gradients of copies are not added up yet is untimed, as the copying was.
        inputs = {"agent_attention": [q, prefix_k, prefix_v, suffix_k, suffix_v], "SDPA, prefix repeated": [q, keys, values]}
        if compiles(device):
            name = "FlexAttention, one row a world"
            calls[name], inputs[name] = self._flex(q, prefix_k, prefix_v, suffix_k, suffix_v)
        if not self.backward:
            return calls
        for x in (x for some in inputs.values() for x in some):
            x.requires_grad_()
        up = torch.randn_like(q)
        return {name: partial(_both_ways, call, inputs[name], up) for name, call in calls.items()}

    def _flex(self, q: Tensor, prefix_k: Tensor, prefix_v: Tensor, suffix_k: Tensor, suffix_v: Tensor) -> tuple[Call, list[Tensor]]:
        """A world's agents as one long row of queries, the keys its prefix and then all suffixes, masked by agent."""

        def one_row(x: Tensor) -> Tensor:
            return x.view(self.worlds, self.agents, *x.shape[1:]).transpose(1, 2).flatten(2, 3)

        def seen(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
            own = key - self.prefix
            at = self.suffix - self.q_len + row % self.q_len
            return (own < 0) | ((own // self.suffix == row // self.q_len) & (own % self.suffix <= at))

        query = one_row(q).contiguous()
        k, v = (torch.cat((x, one_row(y)), dim=2) for x, y in ((prefix_k, suffix_k), (prefix_v, suffix_v)))
        block = create_block_mask(seen, None, None, query.shape[2], k.shape[2], device=q.device)
        flex = torch.compile(flex_attention, dynamic=False)
        return lambda: flex(query, k, v, block_mask=block, enable_gqa=True), [query, k, v]


def _both_ways(call: Call, inputs: Sequence[Tensor], up: Tensor) -> Tensor:
    """The gradient to the queries, computed along with those to keys and values."""
    out = call()
    return torch.autograd.grad(out, inputs, up.view(out.shape))[0].reshape(up.shape)


@dataclass(frozen=True)
class Loss:
    """ib_loss, forward and backward."""

    tokens: int
    dim: int
    vocab: int

    def work(self, itemsize: int) -> tuple[float, float]:
        """FLOPs of three matrix products; bytes of the head once, of both hidden states and the gradient."""
        return 6.0 * self.tokens * self.vocab * self.dim, float((self.vocab + 3 * self.tokens) * self.dim * itemsize)

    def calls(self, device: str, dtype: torch.dtype) -> dict[str, Call]:
        hidden, prior = (torch.randn(self.tokens, self.dim, device=device, dtype=dtype) for _ in range(2))
        weight = torch.randn(self.vocab, self.dim, device=device, dtype=dtype) / self.dim**0.5
        targets = torch.randint(self.vocab, (self.tokens,), device=device)
        up = torch.randn(2, self.tokens, device=device)

        def both_ways(function: Callable) -> Call:
            def call() -> Tensor:
                h = hidden.detach().requires_grad_()
                terms = function(h, prior, weight, targets)
                return torch.autograd.grad((terms[0] * up[0] + terms[2] * up[1]).sum(), h)[0]

            return call

        def chunked() -> Tensor:
            done = []
            for h, p, t, u in zip(*(x.split(128) for x in (hidden, prior, targets, up.T)), strict=True):
                h = h.detach().requires_grad_()
                terms = ib_loss_reference(h, p, weight, t)
                done.append(torch.autograd.grad((terms[0] * u[:, 0] + terms[2] * u[:, 1]).sum(), h)[0])
            return torch.cat(done)

        calls = {"ib_loss": both_ways(ib_loss), "materialised": both_ways(materialised), "chunked eager": chunked}
        if compiles(device):
            calls["materialised, torch.compile"] = both_ways(torch.compile(materialised, dynamic=False))
        if device == "cuda" and find_spec("liger_kernel"):  # one scalar, a JSD: not the same terms, but the same products
            from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

            jsd = LigerFusedLinearJSD(jsd_beta=0.5)

            def liger() -> Tensor:
                h = hidden.detach().requires_grad_()
                return torch.autograd.grad(jsd(h, weight, prior, weight), h)[0]

            calls["liger-kernel, fused linear JSD"] = liger
        return calls


def materialised(hidden: Tensor, prior: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, None, Tensor]:
    """What one writes first: logits in the hidden states' dtype, softmaxes in float32."""
    log_mu = F.log_softmax(hidden @ weight.T, dim=-1, dtype=torch.float32)
    log_r = F.log_softmax(prior @ weight.T, dim=-1, dtype=torch.float32)
    return log_mu.gather(1, targets[:, None])[:, 0], None, (log_mu.exp() * (log_mu - log_r)).sum(dim=-1)


SHAPES = {
    ("agent_attention", "cuda"): [
        Attention(32, 256, 2048, 64, 1, 12, 2, 128), Attention(1, 256, 2048, 64, 1, 12, 2, 128),
        Attention(8, 64, 2048, 64, 64, 12, 2, 128), Attention(4, 64, 600, 90, 90, 12, 2, 128, backward=True),
    ],
    ("agent_attention", "cpu"): [
        Attention(1, 64, 600, 60, t, *heads) for heads in ((6, 2, 32), (12, 2, 128)) for t in (1, 60)
    ],
    ("ib_loss", "cuda"): [Loss(4096, 1536, 151_936), Loss(4096, 256, 32_000)],
    ("ib_loss", "cpu"): [
        Loss(512, 192, 2048), Loss(1024, 64, 8192), Loss(1024, 256, 32_000), Loss(512, 1536, 32_000),
        Loss(256, 1536, 151_936),
    ],
}  # fmt: skip


def compiles(device: str) -> bool:
    """Whether torch.compile has what it needs: a GPU, or a C++ compiler."""
    return device == "cuda" or shutil.which("g++") is not None


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
    """Seconds of each call, the median of rounds in which each is timed once; at least 3, at most 50 rounds."""
    with torch.inference_mode(False):
        for call in calls.values():
            call(), call()
        times: dict[str, list[float]] = {name: [] for name in calls}
        start, rounds = time.perf_counter(), 0
        while rounds < 3 or (rounds < 50 and time.perf_counter() - start < budget):
            for name, call in calls.items():
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
    times = medians({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, device, 3.0)
    return 2 * n / times["copy"], 2 * size**3 / times["product"]


def measure(
    shape: Attention | Loss, device: str, dtype: torch.dtype, copy: float, matmul: float, budget: float = 10.0
) -> list[dict]:  # fmt: skip
    """One row a call: its median time, rates and peak memory, and its time over the kernel's (the first row's)."""
    calls = shape.calls(device, dtype)
    times = medians(calls, device, budget)
    flops, size = shape.work(dtype.itemsize)
    bound, ours, rows = flops / matmul + size / copy, next(iter(times.values())), []
    for name, taken in times.items():
        rows.append({
            "kernel": type(shape).__name__, **asdict(shape), "name": name, "milliseconds": taken * 1e3,
            "bound_milliseconds": bound * 1e3, "of_bound": bound / taken, "gigabytes_per_second": size / taken / 1e9,
            "of_copy_bandwidth": size / taken / copy, "teraflops": flops / taken / 1e12,
            "of_matmul_rate": flops / taken / matmul, "peak_bytes": peak_bytes(calls[name], device),
            "ratio": taken / ours, "host_milliseconds": (queued(calls[name]) if device == "cuda" else taken) * 1e3,
        })  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("kernel", nargs="?", choices=("agent_attention", "ib_loss"), help="default: both")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row here too")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    copy, matmul = ceilings(device, dtype)
    print(f"{where}, torch {torch.__version__}, {dtype}: copies {copy / 1e9:.0f} GB/s, products {matmul / 1e12:.3g} TFLOP/s")
    rows: list[dict] = []
    for kernel in (options.kernel,) if options.kernel else ("agent_attention", "ib_loss"):
        for shape in SHAPES[kernel, device]:
            print(f"\n{shape}\n{'':34}{'ms':>9}{'of bound':>10}{'GB/s':>8}{'of copy':>9}{'TFLOP/s':>9}"
                  f"{'of product':>11}{'peak MB':>9}{'ratio':>7}"
                  + (f"{'host ms':>9}" if device == "cuda" else ""))  # fmt: skip
            for row in measure(shape, device, dtype, copy, matmul):
                rows.append(row)
                print(f"{row['name']:34}{row['milliseconds']:9.3f}{row['of_bound']:10.0%}"
                      f"{row['gigabytes_per_second']:8.1f}{row['of_copy_bandwidth']:9.0%}{row['teraflops']:9.3f}"
                      f"{row['of_matmul_rate']:11.0%}{row['peak_bytes'] / 1e6:9.1f}{row['ratio']:7.2f}"
                      + (f"{row['host_milliseconds']:9.3f}" if device == "cuda" else ""))  # fmt: skip
            print(f"{'bound':34}{rows[-1]['bound_milliseconds']:9.3f}")
    if options.json:
        run = {"machine": where, "torch": torch.__version__, "dtype": str(dtype), "copy_bytes_per_second": copy,
               "matmul_flops_per_second": matmul, "rows": rows}  # fmt: skip
        options.json.write_text(json.dumps(run, indent=1) + "\n")


if __name__ == "__main__":
    main()
