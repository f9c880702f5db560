"""The shapes that the benchmark times: of each its cost model, the kernel's call and those of its rivals on the same inputs."""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from kernels import agent_attention, ib_loss
from kernels.agent_attention_plan import Plan

Call = Callable[[], Tensor]
CHUNK = 128  # tokens at once of ib_loss's rivals that go piece by piece: 0.39 GB at 151,936 words in bfloat16


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
            try:
                calls[name], inputs[name] = self._flex(q, prefix_k, prefix_v, suffix_k, suffix_v)
            except Exception as error:  # whatever it is: a rival that does not run must not end the run
                left_out(name, error)
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

        def both_ways(function: Callable, size: int = self.tokens) -> Call:
            def call() -> Tensor:
                done = []
                for h, p, t, u in zip(*(x.split(size) for x in (hidden, prior, targets, up.T)), strict=True):
                    h = h.detach().requires_grad_()
                    terms = function(h, p, weight, t)
                    done.append(torch.autograd.grad((terms[0] * u[:, 0] + terms[2] * u[:, 1]).sum(), h)[0])
                return torch.cat(done) if len(done) > 1 else done[0]

            return call

        calls = {
            "ib_loss": both_ways(ib_loss), "materialised": both_ways(materialised), "chunked eager": both_ways(materialised, CHUNK),
        }  # fmt: skip
        if compiles(device):
            compiled = torch.compile(materialised, dynamic=False)
            calls |= {"materialised, torch.compile": both_ways(compiled), "chunked, torch.compile": both_ways(compiled, CHUNK)}
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


SHAPES: dict[tuple[str, str], Sequence[Attention | Loss]] = {
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
    """Whether torch.compile may have what it needs: a GPU, or the C++ compiler that it would call."""
    usual = "clang++" if sys.platform == "darwin" else "g++"
    return device == "cuda" or shutil.which(os.environ.get("CXX", usual)) is not None


def left_out(name: str, error: Exception) -> None:
    """Says why a rival is not timed, on one line."""
    reason = (str(error).strip() or "no reason given").splitlines()[0]
    print(f"{name}: left out, {type(error).__name__}: {reason}")


def runnable(calls: dict[str, Call]) -> dict[str, Call]:
    """The calls that run at all; each is called twice, so that compiling is over. The first is the kernel, which must run."""
    able: dict[str, Call] = {}
    for name, call in calls.items():
        try:
            call(), call()
        except Exception as error:
            if not able:
                raise
            left_out(name, error)
        else:
            able[name] = call
    return able
