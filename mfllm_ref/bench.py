"""Speed and scale, beside what users would otherwise pick: `python -m mfllm_ref.bench throughput|train|scale|predict`.

    throughput   actions a second, against transformers' generate (a) on full prompts, (b) with its own reuse of a prefix
    train        an update of IB-Tune's policy stage, against transformers + peft
    scale        wall time and peak memory of whole rollouts, against agents and against worlds
    predict      the arithmetic of a large run on several accelerators

Notable:
- A rival has the very same weights (the tensors are shared), prompts, threads and device. Both take turns in one process and
  medians are compared; no time is printed before greedy tokens, or loss and gradient, have agreed in float32.
- Prompts are random tokens of exact lengths and nothing ends early, so rivals neither compute on padding nor on finished rows.
- transformers and peft are dependencies of the tests; they are imported only where they compete.
"""

import argparse
import importlib
import itertools
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mfllm_ref import doors, ib_tune, metrics, pretrain, report, runs, simulation
from mfllm_ref.errors import InputError
from mfllm_ref.lm import LanguageModel
from mfllm_ref.lm.backbone import Backbone
from mfllm_ref.lm.checkpoint import load_backbone
from mfllm_ref.lm.config import Config
from mfllm_ref.lm.tokenizer import Tokenizer
from mfllm_ref.society import agora, prompts
from mfllm_ref.society.annotate import RuleAnnotator
from mfllm_ref.society.corpus import Document
from mfllm_ref.society.events import Event
from mfllm_ref.society.rollout import METHODS, Settings, World

TINY = Path(__file__).resolve().parents[1] / "checkpoints" / "tiny"
SHAPES = {
    "tiny": pretrain.SHAPES["tiny"],
    "bench-52m": pretrain.Shape(dim=512, layers=12, heads=8, kv_heads=2, intermediate=1536, vocab=32_000),
    "qwen2-0.5b": pretrain.Shape(dim=896, layers=24, heads=14, kv_heads=2, intermediate=4864, vocab=151_936),
    "qwen2-1.5b": pretrain.Shape(dim=1536, layers=28, heads=12, kv_heads=2, intermediate=8960, vocab=151_936),
}
FITTED_FROM = 1000  # agents: below, starting costs hide how a run scales


# ---- arithmetic ----------------------------------------------------------------------------------------------------


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
        """The README's formulas. computed_once: a world's prefix is run once, not once an agent; stored_once: and its
        keys and values are kept and read once. itemsize: bytes a number."""
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
    """Least-squares slope of log seconds on log size. InputError for under two sizes."""
    if len(set(sizes)) < 2:
        raise InputError("a scaling exponent needs two sizes")
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def predict(args: argparse.Namespace) -> None:
    """Print what a run of many agents would take: rounds of one step a world, agents (or whole worlds) spread over devices."""
    config, itemsize = pretrain.config_for("qwen2", SHAPES[args.config], SHAPES[args.config].vocab), 2
    flops, bandwidth = args.tflops * 1e12 * args.utilisation, args.bandwidth * 1e9 * args.utilisation
    rows = [["worlds", "rounds", "s a round", "of it mean field", "actions a s", "hours", "GFLOP an action", "TB a device"]]
    for worlds in args.worlds:
        rounds = math.ceil(args.agents / worlds / args.batch)
        agents, here = (args.batch, worlds / args.gpus) if worlds >= args.gpus else (args.batch * worlds / args.gpus, 1)
        acting = Load(agents, args.prefix, args.suffix, args.new, here).cost(config, itemsize)
        writing = Load(1, 0, args.head + args.batch * args.listed, args.summary, max(1, here)).cost(config, itemsize)
        each = [cost.seconds(flops, bandwidth) for cost in (acting, writing)]
        total = rounds * sum(each)
        giga = (acting.flops / agents / here + writing.flops / args.batch / max(1, here)) / 1e9
        read = rounds * (acting.bytes + writing.bytes) / 1e12
        rows.append([worlds, rounds, f"{sum(each):.3f}", f"{each[1] / sum(each):.0%}", f"{args.agents / total:.0f}",
                     f"{total / 3600:.2f}", f"{giga:.0f}", f"{read:.1f}"])  # fmt: skip
    print(f"{args.agents} agents on {args.config}, bfloat16, {args.gpus} devices at {args.utilisation:.0%} of {args.tflops:g} TFLOP/s "
          f"and {args.bandwidth:g} GB/s; B {args.batch}, P {args.prefix}, S {args.suffix}, G {args.new}, "
          f"Q {args.head} + {args.listed} an action, T {args.summary}")  # fmt: skip
    print_table(rows)


# ---- contestants ---------------------------------------------------------------------------------------------------


def print_table(rows: Sequence[Sequence[object]]) -> None:
    """As Markdown, the first row being the head."""
    for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]):
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


def in_turns(contestants: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each; whoever begins changes, so that a machine's slow minutes fall on all of them."""
    names, taken = list(contestants), {name: [] for name in contestants}
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            contestants[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(some) for name, some in taken.items()}


def agree(name: str, ours: Sequence[Any], theirs: Sequence[Any]) -> None:
    """SystemExit in one line where two contestants' results differ: then no time of theirs means anything."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a != b:
            raise SystemExit(f"bench: agent {i}: ours and {name} differ, so there is no time to tell: {a!r:.200} against {b!r:.200}")


def rival_library(name: str) -> ModuleType:
    """transformers or peft. InputError, saying how to get it, where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"{name} is needed to compare with: pip install -e '.[test]'") from None


def their_model(lm: LanguageModel) -> nn.Module:
    """The backbone as a transformers model on the same tensors."""
    transformers = rival_library("transformers")
    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(**lm.backbone.config.to_json())
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=lm.dtype)
    model.load_state_dict(lm.backbone.state_dict(), assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(lm.device)  # its angles are no part of the state
    model.generation_config.eos_token_id = None
    return model.eval()


def our_model(args: argparse.Namespace, device: torch.device, end: bool) -> LanguageModel:
    """A float32 backbone whose token i is the word i; `end`: word 0 ends a text, else nothing does. InputError where its
    weights are not to be had."""
    if args.config == "tiny" and not args.random_weights:
        backbone = load_backbone(TINY, device)
    elif args.config.startswith("qwen2") and not args.random_weights:
        raise InputError(f"--config {args.config}: there are no weights of it here; --random-weights makes some")
    else:
        torch.manual_seed(args.seed)
        shape = SHAPES[args.config]
        backbone = Backbone(pretrain.config_for("qwen2", shape, shape.vocab)).requires_grad_(False).to(device)
    words = {str(i): i for i in range(backbone.config.vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    with tempfile.TemporaryDirectory() as folder:
        runs.write_bytes(Path(folder) / "tokenizer.json", tokenizer.to_str().encode())
        runs.write_json(Path(folder) / "tokenizer_config.json", {"eos_token": "0"} if end else {})
        return LanguageModel(backbone, Tokenizer.load(folder))


def random_prompts(lm: LanguageModel, args: argparse.Namespace, agents: int, action: int = 0) -> np.ndarray:
    """int64 [agents, prefix + suffix + action]: one prefix for all, then tokens of their own. Token 0 does not occur."""
    rng = np.random.default_rng(args.seed)
    ids = rng.integers(1, lm.backbone.config.vocab_size, (agents, args.prefix + args.suffix + action))
    ids[:, : args.prefix] = ids[0, : args.prefix]
    return ids


def setting(args: argparse.Namespace, lm: LanguageModel, dtype: torch.dtype) -> str:
    kind = torch.cuda.get_device_name() if lm.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    versions = f"torch {torch.__version__}, transformers {rival_library('transformers').__version__}"
    size = sum(p.numel() for p in lm.backbone.parameters()) / 1e6
    return (f"{args.config} ({size:.1f} M parameters), {str(dtype).removeprefix('torch.')}, {kind}, prefix {args.prefix}, "
            f"suffix {args.suffix}, new {args.new}, medians of {args.repeats} turns, {versions}")  # fmt: skip


# ---- throughput ----------------------------------------------------------------------------------------------------


def _causal_on_cpu(q: Sequence[int], k: Sequence[int], v: Sequence[int], dropout: float = 0.0, causal: bool = False, **_: Any) -> int:
    return 4 * math.prod(q) * k[2] // (1 + causal)


def count_flops(run: Callable[[], Any]) -> tuple[Any, int]:
    """(what `run` returns, FLOPs of its matrix products as torch counts them)."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which torch's own table lacks
    with FlopCounterMode(display=False, custom_mapping={attention: _causal_on_cpu}) as counter:
        return run(), counter.get_total_flops()


@torch.no_grad()
def throughput(args: argparse.Namespace) -> None:
    """Greedy actions a second of `LanguageModel.generate` and of transformers, for each number of agents."""
    doors.threads(args)
    device, dtype = doors.device_and_dtype(args)
    lm = our_model(args, device, end=False)
    exact, model, config = lm, their_model(lm), lm.backbone.config
    if dtype != torch.float32:  # compared in float32 all the same
        lm = LanguageModel(Backbone(config).requires_grad_(False), exact.tokenizer)
        lm.backbone.load_state_dict(exact.backbone.state_dict())
        lm.backbone.to(device, dtype)
    rival = model if lm is exact else their_model(lm)

    def contestants(lm: LanguageModel, model: nn.Module, ids: np.ndarray) -> dict[str, Callable[[], list[str]]]:
        rows, full = ids.tolist(), torch.from_numpy(ids).to(device)
        greedy = {"attention_mask": torch.ones_like(full), "do_sample": False, "max_new_tokens": args.new, "pad_token_id": 0}

        def texts(out: Tensor) -> list[str]:
            return lm.tokenizer.decode_batch(out[:, full.shape[1] :].tolist())

        def reuse() -> list[str]:
            cache = model(full[:1, : args.prefix], use_cache=True, logits_to_keep=1).past_key_values
            cache.batch_repeat_interleave(len(full))
            return texts(model.generate(full, past_key_values=cache, **greedy))

        return {
            "ours": lambda: lm.generate(rows, args.new, temperature=0),
            "(a)": lambda: texts(model.generate(full, **greedy)), "(b)": reuse,
        }  # fmt: skip

    rows = [["agents", "ours, actions/s", "(a)", "(b)", "ours / (a)", "ours / (b)", "FLOPs (a) / ours",
             "GFLOP/action, formula", "counted", "ours, GFLOP/s", "KV read (b) / ours"]]  # fmt: skip
    for agents in args.agents:
        ids = random_prompts(lm, args, agents)
        checked = contestants(exact, model, ids)
        ours, counted = count_flops(checked.pop("ours"))
        for name, run in checked.items():
            agree(name, ours, run())
        seconds = in_turns(contestants(lm, rival, ids), args.repeats)
        load, size = Load(agents, args.prefix, args.suffix, args.new), dtype.itemsize
        costs = [load.cost(config, size), load.cost(config, size, False, False), load.cost(config, size, True, False)]
        times = [seconds[name] / seconds["ours"] for name in ("(a)", "(b)")]
        rows.append([
            agents, *(f"{agents / s:.2f}" for s in seconds.values()), *(f"{x:.2f}" for x in times),
            f"{costs[1].flops / costs[0].flops:.1f}", f"{costs[0].flops / agents / 1e9:.2f}", f"{counted / agents / 1e9:.2f}",
            f"{costs[0].flops / seconds['ours'] / 1e9:.0f}", f"{costs[2].keys / costs[0].keys:.1f}",
        ])  # fmt: skip
    print(f"greedy tokens agree in float32; {setting(args, lm, dtype)}")
    print_table(rows)


# ---- train ---------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> None:
    """One update of IB-Tune's policy stage, forward, backward and AdamW, on one step's agents: ours and transformers + peft."""
    doors.threads(args)
    device, _ = doors.device_and_dtype(args)
    peft, lm = rival_library("peft"), our_model(args, device, end=True)
    (agents,), named = args.agents, "policy"
    ids, start = random_prompts(lm, args, agents, args.new), args.prefix + args.suffix
    texts = [[" ".join(map(str, part)) for part in np.split(row, (args.prefix, start))] for row in ids]
    document = Document(texts[0][0] + " ", tuple((suffix + " ", action) for _, suffix, action in texts))
    lm.add_adapter(named, args.rank, 2.0 * args.rank, "all-linear", seed=args.seed)
    parameters = lm.adapters.parameters(named)
    with torch.no_grad():
        for b in parameters[1::2]:  # a fresh adapter changes nothing, so agreement would say little of it
            b.normal_(std=0.02, generator=torch.Generator(device).manual_seed(args.seed))
    with tempfile.TemporaryDirectory() as folder:
        lm.save_adapter(named, folder)
        model = peft.PeftModel.from_pretrained(their_model(lm), folder, is_trainable=True)
    settings = ib_tune.Settings(rows=1, micro=1)
    tuned = [p for p in model.parameters() if p.requires_grad]
    optimizers = [torch.optim.AdamW(some, lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.0) for some in (parameters, tuned)]
    full = torch.from_numpy(ids).to(device)
    target = F.pad(full[:, start:], (0, 1))  # end of text is token 0

    def ours() -> tuple[float, float]:
        row = ib_tune.apply(lm, ib_tune.policy_update(lm, [document], settings, named, "bench"), optimizers[0], 0, settings)
        return row["loss"], row["gradient_norm"]

    def theirs() -> tuple[float, float]:
        optimizers[1].zero_grad()
        # Logits of the actions alone, which is the best one can ask of it: of all tokens they would take gigabytes.
        keep = target.shape[1]
        logits = model(full, attention_mask=torch.ones_like(full), use_cache=False, logits_to_keep=keep).logits
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(tuned, settings.clip)
        for group in optimizers[1].param_groups:
            group["lr"] = ib_tune.learning_rate(0, settings.steps, settings.lr)
        optimizers[1].step()
        return loss.item(), norm.item()

    pairs = list(zip(ours(), theirs(), strict=True))
    gaps = [abs(a - b) / abs(b) for a, b in pairs]
    if not max(gaps) <= 1e-4:
        raise SystemExit(f"bench: (loss, gradient norm) differ, so there is no time to tell: ours and theirs {pairs}")
    seconds = in_turns({"ours": ours, "theirs": theirs}, args.repeats)
    tokens = [args.prefix + agents * (args.suffix + args.new), agents * (start + args.new)]
    print(f"one policy-stage update, LoRA rank {args.rank} on all linear layers; {setting(args, lm, torch.float32)}")
    print_table([
        ["agents", "ours, s", "transformers + peft, s", "theirs / ours", "tokens theirs / ours", "loss differs by", "gradient norm by"],
        [agents, *(f"{s:.3f}" for s in seconds.values()), f"{seconds['theirs'] / seconds['ours']:.2f}",
         f"{tokens[1] / tokens[0]:.2f}", *(f"{gap:.0e}" for gap in gaps)],
    ])  # fmt: skip


# ---- scale ---------------------------------------------------------------------------------------------------------


def long_event(actions: int) -> Event:
    """An event of so many actions: those of the built-in train split's events, one after the other, round and round."""
    events = (agora.event("train", i % agora.SPLITS["train"]) for i in itertools.count())
    cycled = itertools.islice((action for event in events for action in event.actions), actions)
    return replace(agora.event("train", 0), id=f"agora-train-{actions}", actions=tuple(cycled), posts=())


def peak_memory() -> int:
    """The most bytes this process ever had in memory. Linux's rusage would begin with those of the process that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def rollout(args: argparse.Namespace) -> dict[str, float]:
    """One rollout of `args.agents` actions in `args.worlds` worlds, from the event to metrics.json's numbers, by way of files."""
    doors.threads(args)
    device, dtype = doors.device_and_dtype(args)
    lm = LanguageModel.load(args.backbone, device, dtype)
    (agents,), (count,) = args.agents, args.worlds
    event, method = long_event(agents), METHODS["mf-llm-no-ib"]
    worlds = [World(event, method, args.seed + k) for k in range(count)]
    settings = Settings(None, args.batch, 0, args.seed, args.new, args.summary)
    loaded = peak_memory()
    with tempfile.TemporaryDirectory() as folder, runs.open_run(Path(folder), {"settings": {}, "sha256": {}}) as run:
        common = (lm, worlds, settings, RuleAnnotator(), None)
        _, seconds = simulation.roll_out(run, "", *common, likelihood=False, progress=sys.stderr.isatty())
        rolled, started = peak_memory(), time.perf_counter()
        metrics.evaluate(metrics.collect(runs.read_json_lines(run.out / "trajectory.jsonl")), {event.id: event.domain})
        measured, over = time.perf_counter() - started, peak_memory()
        files = sum(path.stat().st_size for path in run.out.iterdir())
        acted = [row["text"] for row in runs.read_json_lines(run.out / "trajectory.jsonl")]
        fields = [row["text"] for row in runs.read_json_lines(run.out / "mean_field.jsonl")]

    def mean(texts: Sequence[str]) -> float:
        return float(np.mean([len(ids) for ids in lm.tokenizer.encode_batch(texts)])) if texts else 0.0

    told = [prompts.policy_shared(event.language, event.topic, (), ib_tune.signal_of(text)) for text in fields or [""]]
    first = [(action.agent.profile, text) for action, text in zip(event.actions[: args.batch], acted)]
    listing = prompts.mean_field_prompt(event.language, event.topic, (), "".join(fields[:1]), first)
    private = [prompts.policy_private(event.language, action.agent.profile) for action in event.actions]
    return {
        "agents": agents, "worlds": count, "seconds": seconds, "evaluating": measured, "loaded": loaded, "rolled": rolled,
        "peak": over, "files": files, "prefix": mean(told), "suffix": mean(private), "new": mean(acted) + 1,
        "listing": mean([listing]), "summary": mean(fields) + 1 if fields else 0.0, "steps": len(fields) // count + 1,
    }  # fmt: skip


def scale(args: argparse.Namespace) -> None:
    """Rollouts of growing size, each in a process of its own, and what they say of the arithmetic and the exponents."""
    if args.measure:
        print(json.dumps(rollout(args)))
        return
    out = args.out or runs.default_out()
    runs.check_place(out, resume=False)
    config = load_backbone(args.backbone).config

    def measured(agents: int, worlds: int) -> dict[str, float]:
        names = ("backbone", "batch", "new", "summary", "device", "dtype", "seed", *(["threads"] if args.threads else []))
        given = [f"--{name}={getattr(args, name)}" for name in names]
        command = [sys.executable, "-m", "mfllm_ref.bench", "scale", f"--agents={agents}", f"--worlds={worlds}", "--measure"]
        done = subprocess.run([*command, *given], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"bench: the run of {agents} agents in {worlds} worlds failed")
        return json.loads(done.stdout)

    def rows(found: Sequence[Mapping[str, float]]) -> list[list[object]]:
        table: list[list[object]] = [["agents", "worlds", "s", "actions/s", "MB before", "MB peak", "with metrics", "metrics, s",
                                      "MB of files", "TFLOP", "GFLOP/s", "told everything, TFLOP"]]  # fmt: skip
        for row in found:
            acting, all_told = _work(config, row, args.batch)
            row["flops"], row["told_flops"] = acting, all_told
            megabytes = [f"{row[key] / 1e6:.0f}" for key in ("loaded", "rolled", "peak")]
            table.append([
                row["agents"], row["worlds"], f"{row['seconds']:.1f}", f"{row['agents'] * row['worlds'] / row['seconds']:.1f}",
                *megabytes, f"{row['evaluating']:.1f}", f"{row['files'] / 1e6:.1f}", f"{acting / 1e12:.3g}",
                f"{acting / row['seconds'] / 1e9:.1f}", f"{all_told / 1e12:.3g}",
            ])  # fmt: skip
        return table

    found = [[measured(n, 1) for n in args.agents], [measured(args.world_agents, n) for n in args.worlds]]
    for some in found:
        print_table(rows(some))
    fits = {}
    for key, some, least in (("agents", found[0], FITTED_FROM), ("worlds", found[1], 1)):
        pairs = [(row[key], row["seconds"]) for row in some if row[key] >= least]
        if len(pairs) > 1:
            fits[key] = exponent(*zip(*pairs))
            print(f"seconds grow as {key} ^ {fits[key]:.3f} (from {pairs[0][0]} on)")
    out.mkdir(parents=True, exist_ok=True)
    runs.write_json(out / "scale.json", {"agents": found[0], "worlds": found[1], "exponents": fits})
    report.scaling(found[0], found[1], fits, out / "scale.png")
    print(f"see {out / 'scale.png'}")


def _work(config: Config, row: Mapping[str, float], batch: int) -> tuple[float, float]:
    """FLOPs of a measured rollout by its mean token counts, and of the same where everyone is told everything."""
    load = Load(min(batch, row["agents"]), row["prefix"], row["suffix"], row["new"])
    acting = load.cost(config).flops / load.agents * row["agents"]
    summaries = Load(1, 0, row["listing"], row["summary"]).cost(config).flops * (row["steps"] - 1) if row["summary"] else 0.0
    return (acting + summaries) * row["worlds"], told_everything(config, load, int(row["agents"])) * row["worlds"]


# ---- the command line ----------------------------------------------------------------------------------------------


def numbers(text: str) -> list[int]:
    """An argparse type: positive whole numbers with commas between them."""
    return [doors.positive(part) for part in text.split(",")]


def parser() -> doors.Parser:
    out = doors.Parser(prog="python -m mfllm_ref.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = out.add_subparsers(dest="command", required=True)

    def command(run: Callable[[argparse.Namespace], None], **defaults: object) -> argparse.ArgumentParser:
        some = commands.add_parser(run.__name__, help=(run.__doc__ or "").split(":")[0].split(".")[0])
        some.set_defaults(run=run)
        for name, value in defaults.items():
            kind = {list: numbers, int: doors.positive, Path: Path, type(TINY): Path}.get(type(value), type(value))
            shown = ",".join(map(str, value)) if isinstance(value, list) else value
            some.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value, metavar="N", help=f"default: {shown}")
        return some

    shape = {"prefix": 600, "suffix": 60, "new": 30}
    fast = command(throughput, agents=[64], **shape, repeats=3)
    slow = command(train, agents=[16], **shape, rank=16, repeats=3)
    sizes = [16, 64, 256, 1000, 2500, 5000, 10_000, 20_000, 40_000]
    large = command(scale, agents=sizes, worlds=[1, 2, 4, 8, 16, 32], world_agents=256, batch=64, new=48, summary=120, backbone=TINY)
    large.add_argument("--out", type=Path, help="folder for scale.json and scale.png (default: runs/<time>)")
    large.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # one size, in this process
    far = command(predict, agents=1_000_000, worlds=[1, 1000], batch=64, prefix=600, suffix=60, new=30, head=300, listed=30,
                  summary=100, gpus=8, tflops=989.0, bandwidth=3350.0, utilisation=0.4)  # fmt: skip
    for some in (fast, slow, far):
        some.add_argument("--config", choices=SHAPES, default="qwen2-1.5b" if some is far else "bench-52m", help="the backbone's shape")
    for some in (fast, slow):
        some.add_argument("--random-weights", action="store_true", help="instead of a checkpoint's: speed is the same")
    for some in (fast, slow, large):
        doors.add_machine(some)
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        args = parser().parse_args(arguments)
        args.run(args)
    except (InputError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
