"""IB-Tune: the information-bottleneck fine-tuning of the mean-field model and of the policy (README, IB-Tune).

From min I(m; X, c) - beta I(m; Y), with the usual variational bounds:

    stage "mean-field":  L_mu(phi)   = E_{m~mu}[ KL(mu || r) - beta R(m) ],   R(m) = sum_i log pi_theta(a*_i | c, s_i, m)
    stage "policy":      L_pi(theta) = - E_{m~mu}[ R(m) ]

Notable:
- The mean field is text, so the first gradient goes through samples: `surrogate` is a number whose gradient is an unbiased
  estimate of it. The KL of every position is exact, over the whole vocabulary; what is sampled is only how a token changes
  the KL of later positions and the reward, each against a leave-one-out baseline.
- Three distributions, one backbone: pi = backbone + policy adapter, mu = backbone + mean-field adapter, r = bare.
- All agents of a step are scored against one prefix, computed once and differentiated once (`LanguageModel.log_prob`).
- Chains: mu reads its own last summary and the real actions, m_{t-1} held fixed (a myopic semi-gradient), and goes on with
  sample 1, never with the best.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mfllm_ref import ranks
from mfllm_ref.errors import InputError
from mfllm_ref.lm import LanguageModel
from mfllm_ref.society import prompts
from mfllm_ref.society.corpus import Document, Past
from mfllm_ref.society.events import hashed
from mfllm_ref.society.prompts import Signal
from mfllm_ref.training import at, finite


@dataclass(frozen=True, slots=True)
class Settings:
    """How an adapter is tuned. `rows` is how many steps of populations an update learns from, `micro` how many of them
    are differentiated at once (gradients accumulate)."""

    steps: int = 100
    rows: int = 8
    micro: int = 4
    lr: float | None = None  # None: the job's, see tuning.jobs
    samples: int = 4  # K
    beta: float = 30.0
    repetition_penalty: float = 0.0  # taken off the reward for each token that the summary has had before
    summary_tokens: int = 120
    summary_top_p: float = prompts.SUMMARY_TOP_P  # of summaries that a policy reads; a gradient's are drawn from all tokens
    clip: float = 1.0
    seed: int = 0
    mixed: bool = False  # gradients by products in bfloat16 of float32 weights
    reweighted: float = 0.0  # of the steps that a policy learns from, where it is told something: see Past.reweighted

    def check(self) -> None:
        """Raises InputError for what cannot be."""
        if not self.beta > 0 or math.isinf(self.beta):
            raise InputError(f"--beta {self.beta:g}: must be a positive number")
        if self.samples < 2:
            raise InputError(f"--samples {self.samples}: the leave-one-out baseline needs at least 2")
        if self.lr is not None and not 0 < self.lr < 1:
            raise InputError(f"--lr {self.lr:g}: must lie between 0 and 1")
        if not self.clip > 0 or math.isinf(self.clip):
            raise InputError(f"--clip {self.clip:g}: must be a positive number")
        if not 0 <= self.reweighted <= 1:
            raise InputError(f"--reweighted {self.reweighted:g}: must lie between 0 and 1")
        if not 0 <= self.repetition_penalty < math.inf:
            raise InputError(f"--repetition-penalty {self.repetition_penalty:g}: must be a number of at least 0")


# ---- the objective -------------------------------------------------------------------------------------------------


def surrogate(log_prob: Tensor, kl: Tensor, reward: Tensor, beta: float) -> Tensor:
    """A number whose gradient estimates that of L_mu without bias, from K samples of each summary.

        grad = 1/K sum_k sum_j [ grad k_j + grad log mu(m_j | m_<j) * (A_j - b_j) ],   A_j = sum_{l>j} k_l - beta R

    log_prob, kl [..., K, positions]: log mu(m_j | m_<j) and k_j = KL(mu(. | m_<j) || r(. | m_<j)), 0 behind a sample's
    end; reward [..., K]; all in nats. b_j is the mean of A_j over the other K - 1 samples: independent of this one, so it
    takes variance off and adds no bias. Returns [...]. ValueError for K < 2.
    """
    samples = kl.shape[-2]
    if samples < 2:
        raise ValueError("a leave-one-out baseline needs at least 2 samples")
    fixed = kl.detach()
    future = fixed.flip(-1).cumsum(-1).flip(-1) - fixed
    cost = future - beta * reward.detach()[..., None]
    others = (cost.sum(-2, keepdim=True) - cost) / (samples - 1)
    return (kl + log_prob * (cost - others)).sum(-1).mean(-1)


def log_likelihood(lm: LanguageModel, documents: Sequence[Document]) -> tuple[Tensor, Tensor]:
    """(R of each document, its tokens): the log-likelihood in nats of its actions, end of text included, under the active
    adapter. Both [documents]; R is differentiable where gradients are enabled."""
    told = [document.prefix + private for document in documents for private, _ in document.branches]
    acted = [action for document in documents for _, action in document.branches]
    worlds = [w for w, document in enumerate(documents) for _ in document.branches]
    values = lm.log_prob(told, acted, worlds=worlds, end_of_text=True)
    index = torch.tensor(worlds, device=values.device)
    tokens = torch.tensor([len(ids) + 1 for ids in lm.tokenizer.encode_batch(acted)], device=values.device)
    zero = values.new_zeros(len(documents))
    return zero.index_add(0, index, values), zero.index_add(0, index, tokens.to(zero.dtype))


def as_summary(text: str) -> str:
    """A sampled summary as the policy reads it, and as a rollout cuts it: its first line."""
    return " ".join(text.split("\n", 1)[0].split())


def signal_of(summary: str) -> Signal | None:
    return Signal("population", (summary,)) if summary else None


# ---- chains of mean fields -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Chain:
    """A mean field on its way through one event's real actions: `summary` is m_{step-1}, the next one guides `step`.
    `number`: how many chains its row has had before this one."""

    past: int
    step: int
    summary: str = ""
    number: int = 0


def begun(pasts: Sequence[Past], past: int, step: int) -> Chain:
    """A chain from `step` on: the summary before states the exact shares. An empty one belongs to an event's beginning."""
    return Chain(past, step, pasts[past].population[step - 1])


class Chains:
    """As many chains as an update has rows. A chain that has passed its event begins another. `state` is all that is needed to
    resume."""

    def __init__(self, pasts: Sequence[Past], rows: int, seed: int, state: Sequence[Sequence] = ()) -> None:
        self.pasts, self.seed = pasts, seed
        self.chains = [Chain(*some) for some in state] or [self._begin(row, 0) for row in range(rows)]

    def _begin(self, row: int, number: int) -> Chain:
        """The row's next event from its first step on; the very first one from anywhere, so that rows are out of phase."""
        rng = np.random.default_rng([self.seed, 2, row, number])
        past = int(rng.integers(len(self.pasts)))
        step = 1 if number else int(rng.integers(1, self.pasts[past].steps))
        return replace(begun(self.pasts, past, step), number=number)

    @property
    def state(self) -> list[tuple]:
        return [astuple(chain) for chain in self.chains]

    def advance(self, summaries: Sequence[str]) -> None:
        """Go on with these summaries m_step."""
        for row, (chain, summary) in enumerate(zip(self.chains, summaries, strict=True)):
            over = chain.step + 1 >= self.pasts[chain.past].steps
            self.chains[row] = self._begin(row, chain.number + 1) if over else replace(chain, step=chain.step + 1, summary=summary)


@dataclass(frozen=True, slots=True)
class Sampled:
    """K summaries of each of some chains, with their log-likelihoods: texts and ids [chains][K], reward [chains, K]."""

    texts: list[list[str]]
    ids: list[list[list[int]]]
    reward: Tensor
    tokens: float  # of the actions of all chains, once


@torch.no_grad()
def draw(
    lm: LanguageModel, pasts: Sequence[Past], chains: Sequence[Chain], samples: int, settings: Settings, key: object,
    mean_field: str | None, policy: str | None,
) -> Sampled:  # fmt: skip
    """Sample summaries that guide the chains' steps from adapter `mean_field`; score those steps' real actions under
    adapter `policy`. `key` makes the noise."""
    told = [pasts[chain.past].summarise(chain.step - 1, chain.summary) for chain in chains]
    seeds = [hashed("ib-tune", settings.seed, key, row, k) for row in range(len(chains)) for k in range(samples)]
    worlds = [row for row in range(len(chains)) for _ in range(samples)]
    with lm.adapter(mean_field):
        ids = lm.sample([told[row] for row in worlds], settings.summary_tokens, seeds, worlds)
    texts = [as_summary(text) for text in lm.texts(ids)]
    documents = [
        pasts[chains[row].past].told(chains[row].step, signal_of(text)) for row, text in zip(worlds, texts, strict=True)
    ]
    with lm.adapter(policy):
        reward, tokens = log_likelihood(lm, documents)
    cut = [slice(row * samples, (row + 1) * samples) for row in range(len(chains))]
    reward, each = reward.view(len(chains), samples), float(tokens.sum()) / samples
    return Sampled([texts[s] for s in cut], [ids[s] for s in cut], reward, each)


def information_terms(
    lm: LanguageModel, pasts: Sequence[Past], chains: Sequence[Chain], ids: Sequence[Sequence[Sequence[int]]],
    mean_field: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(log mu, k) of sampled summaries, each [chains, K, positions], under adapter `mean_field`; differentiable."""
    told = [pasts[c.past].summarise(c.step - 1, c.summary) for c, some in zip(chains, ids, strict=True) for _ in some]
    bare = [prompts.prior_prompt(pasts[c.past].event.language) for c, some in zip(chains, ids, strict=True) for _ in some]
    worlds = [row for row, some in enumerate(ids) for _ in some]
    with lm.adapter(mean_field):
        terms = lm.ib_terms(told, [sample for some in ids for sample in some], bare, worlds)
    shape = (len(chains), len(ids[0]), -1)
    return terms.log_prob.view(shape), terms.kl.view(shape)


def repeated(ids: Sequence[int]) -> int:
    """How many tokens of a summary it has had before."""
    return len(ids) - len(set(ids))


@torch.no_grad()
def summaries(
    lm: LanguageModel, pasts: Sequence[Past], adapter: str | None, settings: Settings, until: int | None = None,
    progress: bool = False,
) -> list[list[str]]:  # fmt: skip
    """m_0 = "", m_1, m_2, ... of each past (before step `until`), written by mean-field `adapter` along its real actions, all
    pasts in lockstep."""
    out = [[""] for _ in pasts]
    steps = max(past.steps for past in pasts)
    for step in tqdm(range(1, min(steps, until or steps)), desc="summaries", unit="step", disable=not progress):
        going = [i for i, past in enumerate(pasts) if step < past.steps]
        told = [pasts[i].summarise(step - 1, out[i][-1]) for i in going]
        seeds = [hashed("ib-tune", settings.seed, "summaries", pasts[i].event.id, step) for i in going]
        with lm.adapter(adapter):
            written = lm.generate(
                told, settings.summary_tokens, top_p=settings.summary_top_p, seeds=seeds, stop=("\n",), worlds=going
            )
        for i, text in zip(going, written, strict=True):
            out[i].append(as_summary(text))
    return out


# ---- the training loop ---------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float, warmup: float = 0.1) -> float:
    """Linear warm-up over the first tenth, then half a cosine down to 0."""
    start = max(1, round(warmup * steps))
    return peak * (step + 1) / start if step < start else peak * (1 + math.cos(math.pi * (step - start) / (steps - start))) / 2


@dataclass(frozen=True, slots=True)
class Update:
    """What an update learns from and how. `loss` makes (the mean loss of some of its `rows` in nats a step, their part of the
    sums), called for a few rows at a time; `numbers` turns the sums over all rows into log.jsonl's numbers."""

    rows: int
    loss: Callable[[slice], tuple[Tensor, dict[str, float]]]
    numbers: Callable[[Mapping[str, float]], dict[str, float]]
    batch: str  # says which steps of which events, for error messages
    started: float = field(default_factory=time.perf_counter)


def mean_field_update(
    lm: LanguageModel, chains: Chains, settings: Settings, step: int, adapter: str, policy: str | None
) -> Update:  # fmt: skip
    """One update of L_mu from the chains where they are; moves them on. Raises FloatingPointError, naming step and batch, where
    the model's numbers are not finite."""
    started, now, pasts = time.perf_counter(), list(chains.chains), chains.pasts
    named = ", ".join(f"{pasts[c.past].event.id} step {c.step}" for c in now)
    with at(step, named):
        sampled = draw(lm, pasts, now, settings.samples, settings, step, adapter, policy)
    chains.advance([texts[0] for texts in sampled.texts])
    penalty = sampled.reward.new_tensor([[repeated(ids) for ids in some] for some in sampled.ids])
    reward = sampled.reward - settings.repetition_penalty * penalty

    def loss(some: slice) -> tuple[Tensor, dict[str, float]]:
        log_prob, kl = information_terms(lm, pasts, now[some], sampled.ids[some], adapter)
        return surrogate(log_prob, kl, reward[some], settings.beta).mean(), {"kl": float(kl.detach().sum())}

    def numbers(sums: Mapping[str, float]) -> dict[str, float]:
        kl = sums["kl"] / reward.numel()
        return {
            "kl": kl, "reward": float(sampled.reward.mean()), "loss": kl - settings.beta * float(reward.mean()),
            "action_nll": -float(sampled.reward.mean(1).sum()) / sampled.tokens,
            "tokens": sum(len(ids) for ids in sum(sampled.ids, [])),
        }  # fmt: skip

    return Update(len(now), loss, numbers, named, started)


def policy_update(lm: LanguageModel, documents: Sequence[Document], adapter: str, named: str) -> Update:
    """One update of L_pi (or of supervised fine-tuning, which is the same without a mean field)."""

    def loss(some: slice) -> tuple[Tensor, dict[str, float]]:
        with lm.adapter(adapter):
            reward, counts = log_likelihood(lm, documents[some])
        return -reward.mean(), {"nats": -float(reward.detach().sum()), "tokens": float(counts.sum())}

    def numbers(sums: Mapping[str, float]) -> dict[str, float]:
        nats = sums["nats"] / len(documents)
        return {"loss": nats, "reward": -nats, "action_nll": sums["nats"] / sums["tokens"], "tokens": sums["tokens"]}

    return Update(len(documents), loss, numbers, named)


def apply(
    lm: LanguageModel, update: Update, optimizer: torch.optim.Optimizer, step: int, settings: Settings
) -> dict[str, float]:  # fmt: skip
    """Differentiate an update and take one optimizer step, at the schedule's fraction of the optimizer's initial rate; returns
    its row of log.jsonl (losses and KL in nats a step). Processes share the update's parts and come by the same gradient.

    Raises FloatingPointError, naming step and batch, where the model's numbers, the loss or its gradient are not finite: nothing
    is changed then.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()
    made: dict[int, list[Tensor]] = {}  # by part, where other processes make the rest
    rows = range(update.rows)
    parts = rows[:: settings.micro]

    def differentiate(first: int) -> dict[str, float]:
        some = slice(first, first + settings.micro)
        with torch.autocast(lm.device.type, torch.bfloat16, enabled=settings.mixed):
            loss, sums = update.loss(some)
        finite("loss", loss.item())
        # The loss sums over a step's agents; the scale of its gradient is left to clipping and AdamW.
        (loss * (len(rows[some]) / len(rows))).backward()
        if ranks.sharing():
            made[first // settings.micro] = [p.grad for p in parameters]
            optimizer.zero_grad()
        return sums

    costs = [1.0] * len(parts)
    with at(step, update.batch):
        found = ranks.compute(differentiate, parts, costs)
        ranks.add_gradients(parameters, made, costs)
        norm = finite("gradient", torch.nn.utils.clip_grad_norm_(parameters, settings.clip).item())
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, settings.steps, optimizer.defaults["lr"])
    optimizer.step()
    seconds = time.perf_counter() - update.started
    numbers = update.numbers({key: sum(sums[key] for sums in found) for key in found[0]})
    speed = numbers.pop("tokens") / seconds
    return {"step": step, **numbers, "gradient_norm": norm, "seconds": seconds, "tokens_per_second": speed}


# ---- what a dev split says -----------------------------------------------------------------------------------------


@torch.no_grad()
def information(
    lm: LanguageModel, pasts: Sequence[Past], settings: Settings, mean_field: str | None, policy: str | None,
    blind: str | None = None, length: int = 3,
) -> dict[str, float]:  # fmt: skip
    """What mean-field adapter `mean_field` costs and gives on fixed steps of `pasts` with fixed noise (one chain of `length`
    summaries a past, begun anywhere), in nats a step: "kl", KL(mu || r), the bound on I(m; X, c); "reward", R(m); and where
    `blind` names the adapter of a policy that is told nothing, "blind", its log-likelihood of the same actions."""
    now = [begun(pasts, i, 1 + hashed("dev", past.event.id) % max(1, past.steps - length)) for i, past in enumerate(pasts)]
    found: dict[str, list[Tensor]] = {"kl": [], "reward": [], "blind": []}
    for turn in range(length):
        now = [chain for chain in now if chain.step < pasts[chain.past].steps]
        sampled = draw(lm, pasts, now, 1, settings, f"dev {turn}", mean_field, policy)
        found["kl"].append(information_terms(lm, pasts, now, sampled.ids, mean_field)[1].sum(-1)[:, 0])
        found["reward"].append(sampled.reward[:, 0])
        if blind is not None:
            with lm.adapter(blind):
                documents = [pasts[chain.past].told(chain.step, None) for chain in now]
                found["blind"].append(log_likelihood(lm, documents)[0])
        now = [replace(c, step=c.step + 1, summary=texts[0]) for c, texts in zip(now, sampled.texts, strict=True)]
    return {key: float(torch.cat(some).mean()) for key, some in found.items() if some}
