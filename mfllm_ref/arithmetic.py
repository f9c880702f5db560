"""What a batch of agents costs in floating-point operations and bytes: the README's formulas, and what they say of large runs.

With M numbers in the matrices of L layers, V x D in the head, h query and g key heads of size d, e bytes a number, one step of B
agents that share a prefix of P tokens, read S of their own and write G takes about

    FLOPs   (1 - 1/L) [2 M (P + B S) + 4 L h d (P^2 / 2 + B S (P + S/2))]  +  B G [2 M + 2 V D + 4 L h d (P + S + G/2)]
    bytes   G e [M + V D + 2 L g d (P + B (S + G/2))]                          while it writes

(reading a prompt, the last layer runs for one token alone; a matrix product of m x k and k x n is 2 m k n FLOPs). Where each
agent computes the prefix for itself, B P stands in the place of P, and all layers run for all tokens; where each reads its own
copy of it, B P stands there among the bytes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from mfllm_ref.lm.config import Config
from mfllm_ref.lm.language_model import LOGITS, ROWS


class Cost(NamedTuple):
    """Of one batch: FLOPs to read its prompts; FLOPs to write, and bytes of weights and of keys and values read meanwhile."""

    prefill: float
    decode: float
    weights: float
    keys: float

    @property
    def flops(self) -> float:
        return self.prefill + self.decode

    @property
    def bytes(self) -> float:
        return self.weights + self.keys

    def seconds(self, flops: float, bandwidth: float) -> float:
        """Roofline time at `flops` a second and `bandwidth` bytes a second."""
        return self.prefill / flops + max(self.decode / flops, self.bytes / bandwidth)


@dataclass(frozen=True, slots=True)
class Load:
    """A batch in tokens: in each of `worlds`, `agents` B share a `prefix` P, read a `suffix` S of their own each and write
    `new` G."""

    agents: float
    prefix: float
    suffix: float
    new: float
    worlds: float = 1

    def cost(self, config: Config, itemsize: int = 4, computed_once: bool = True, stored_once: bool = True) -> Cost:
        """The formulas above, with the first token's pass counted apart. computed_once: a world's prefix is run once, not once
        an agent; stored_once: and its keys and values are kept and read once. itemsize: bytes a number."""
        layer = config.dim * (2 * config.heads + 2 * config.kv_heads) * config.head_dim + 3 * config.dim * config.intermediate
        matrices, head = config.layers * layer, config.vocab_size * config.dim
        pair = 4 * config.layers * config.heads * config.head_dim  # FLOPs of one query on one key, all layers
        cached = 2 * config.layers * config.kv_heads * config.head_dim * itemsize  # bytes a token
        b, p, s, g = self.agents, self.prefix, self.suffix, self.new
        if computed_once:  # the last layer runs for the last token alone
            prefill = (1 - 1 / config.layers) * (2 * matrices * (p + b * s) + pair * (p * p / 2 + b * s * (p + s / 2)))
            passes = g - 1 + 1 / config.layers
        else:
            prefill, passes = b * (2 * matrices * (p + s) + pair * (p + s) ** 2 / 2), g - 1
        decode = b * (passes * (2 * matrices + pair * (p + s + g / 2)) + 2 * g * head)
        keys = p + b * (s + g / 2) if stored_once else b * (p + s + g / 2)
        w = self.worlds
        return Cost(w * prefill, w * decode, g * itemsize * (matrices + head), g * w * cached * keys)


def told_everything(config: Config, load: Load, agents: int) -> float:
    """FLOPs of simulating `agents` in steps of load.agents if each were told all previous actions, the listing being run once
    a step: quadratic in agents. `load.prefix` is what they are told besides."""
    steps = -(-agents // int(load.agents))
    return sum(
        replace(load, agents=min(load.agents, agents - k * load.agents), prefix=load.prefix + k * load.agents * load.new)
        .cost(config).flops for k in range(steps)
    )  # fmt: skip


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Least-squares slope of log seconds on log size, of two sizes at least."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def measured_flops(config: Config, row: Mapping[str, float], batch: int) -> tuple[float, float]:
    """(FLOPs of a rollout, the same where everyone is told everything), by a row of `scale.rollout`: mean token counts of prefix,
    suffix, action ("new"), the mean-field model's prompt ("listing") and summary, and its agents, worlds and steps."""
    load = Load(min(batch, row["agents"]), row["prefix"], row["suffix"], row["new"])
    acting = load.cost(config).flops / load.agents * row["agents"]
    writing = Load(1, 0, row["listing"], row["summary"]).cost(config).flops * (row["steps"] - 1) if row["steps"] > 1 else 0.0
    return (acting + writing) * row["worlds"], told_everything(config, load, int(row["agents"])) * row["worlds"]


@dataclass(frozen=True, slots=True)
class Society:
    """A large run: `agents` actions in `worlds` of steps of `batch`; tokens as in `Load`, and the mean-field model reads
    `head` + batch * `listed` and writes `summary`."""

    agents: int
    worlds: int
    batch: int
    prefix: int
    suffix: int
    new: int
    head: int
    listed: int
    summary: int


class Prediction(NamedTuple):
    """Rounds of one step in every world; seconds a round for the actions and for the mean fields; FLOPs an action."""

    rounds: int
    acting: float
    writing: float
    flops: float

    @property
    def seconds(self) -> float:
        return self.rounds * (self.acting + self.writing)


def predict(config: Config, run: Society, devices: int, flops: float, bandwidth: float, itemsize: int = 2) -> Prediction:
    """What `devices` of so many FLOPs and bytes a second need (sharing costs nothing): whole worlds are spread over them, or,
    where there are fewer, the agents of each step, in the chunks that a GPU's steps are cut into (`language_model.ROWS`, LOGITS);
    a world's prefix and mean field are then computed on every device. The fullest device sets the time."""
    here = math.ceil(run.worlds / devices)  # worlds on a device
    chunks = math.ceil(run.batch / min(ROWS[0], max(1, LOGITS // config.vocab_size)))
    agents = math.ceil(run.batch / max(1, min(devices // run.worlds, chunks)))
    acting = Load(agents, run.prefix, run.suffix, run.new, here).cost(config, itemsize)
    writing = Load(1, 0, run.head + run.batch * run.listed, run.summary, here).cost(config, itemsize)
    rounds = math.ceil(run.agents / run.worlds / run.batch)
    act, write = (cost.seconds(flops, bandwidth) for cost in (acting, writing))
    return Prediction(rounds, act, write, acting.flops / agents / here + writing.flops / run.batch / here)
