"""Speed and scale, beside what users would otherwise pick: `python -m mfllm_ref.bench throughput|train|scale|predict`.

    throughput   actions a second, against transformers' generate (a) on full prompts, (b) with its own reuse of a prefix
    train        an update of IB-Tune's policy stage, against transformers + peft
    scale        wall time and peak memory of whole rollouts, against agents and against worlds
    predict      the arithmetic of a large run on several accelerators

--prefix, --suffix and --new are tokens: what all agents share, what each has of its own, and what each writes.

Notable:
- A rival has the very same weights (the tensors are shared), prompts, threads and device. Both take turns in one process and
  medians are compared; no time is printed before greedy tokens, or loss and gradient, have agreed in float32.
- Prompts are random tokens of exact lengths and nothing ends early, so rivals neither compute on padding nor on finished rows.
- transformers and peft are dependencies of the tests; they are imported only where they compete.
"""

import argparse
import importlib
import inspect
import itertools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mfllm_ref import doors, ib_tune, pretrain, report, runs
from mfllm_ref.arithmetic import Load, Society
from mfllm_ref.arithmetic import predict as predicted
from mfllm_ref.errors import InputError
from mfllm_ref.lm import LanguageModel
from mfllm_ref.lm.backbone import Backbone
from mfllm_ref.lm.checkpoint import load_backbone
from mfllm_ref.lm.tokenizer import Tokenizer
from mfllm_ref.scale import scale
from mfllm_ref.society.corpus import Document

TINY = doors.CHECKPOINTS / "tiny"
LARGEST = 10**7  # of any number on the command line
TIE = 1e-3  # nats: ten times what the order of float32 sums changes in a log-probability of a large vocabulary
SHAPES = {
    "tiny": pretrain.SHAPES["tiny"],
    "bench-52m": pretrain.Shape(dim=512, layers=12, heads=8, kv_heads=2, intermediate=1536, vocab=32_000),
    "qwen2-0.5b": pretrain.Shape(dim=896, layers=24, heads=14, kv_heads=2, intermediate=4864, vocab=151_936),
    "qwen2-1.5b": pretrain.Shape(dim=1536, layers=28, heads=12, kv_heads=2, intermediate=8960, vocab=151_936),
}


# ---- contestants ---------------------------------------------------------------------------------------------------


def in_turns(contestants: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each; whoever begins changes, so that a machine's slow minutes fall on all of them."""
    names = list(contestants)
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            contestants[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(some) for name, some in taken.items()}


def agree(name: str, lm: LanguageModel, prompts: Sequence[list[int]], ours: Sequence[str], theirs: Sequence[str]) -> int:
    """How many agents' greedy tokens part where the likeliest two are as likely within TIE nats, which rounding decides.
    SystemExit in one line where contestants differ otherwise: their times would mean nothing."""
    ties = 0
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a == b:
            continue
        mine, their = ([int(word) for word in text.split()] for text in (a, b))
        at = next(k for k, (x, y) in enumerate(zip(mine, their, strict=True)) if x != y)
        told = prompts[i] + mine[:at]
        first, second = lm.log_prob([told, told], [mine[at : at + 1], their[at : at + 1]]).tolist()
        if not abs(first - second) < TIE:
            raise SystemExit(f"bench: agent {i}: ours and {name} differ, so no times are printed: {a!r:.200} against {b!r:.200}")
        ties += 1
    return ties


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


def _attention(q: Sequence[int], k: Sequence[int], v: object, dropout: float = 0.0, causal: bool = False, **_: Any) -> int:
    return 4 * math.prod(q) * k[2] // (1 + causal)


def count_flops(run: Callable[[], Any]) -> tuple[Any, int]:
    """(what `run` returns, FLOPs of its matrix products as torch counts them)."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which torch's own table lacks
    with FlopCounterMode(display=False, custom_mapping={attention: _attention}) as counter:
        return run(), counter.get_total_flops()


@torch.no_grad()
def throughput(args: argparse.Namespace) -> None:
    """Greedy actions a second, ours and transformers', for each number of agents."""
    doors.threads(args)
    device, dtype = doors.device_and_dtype(args)
    lm = our_model(args, device, end=False)
    exact, model, config = lm, their_model(lm), lm.backbone.config
    if dtype != torch.float32:  # compared in float32 all the same
        lm = LanguageModel(Backbone(config).requires_grad_(False), exact.tokenizer)
        lm.backbone.load_state_dict(exact.backbone.state_dict())
        lm.backbone.to(device, dtype)
    rival = model if lm is exact else their_model(lm)

    def contestants(lm: LanguageModel, model: Any, ids: np.ndarray) -> dict[str, Callable[[], list[str]]]:
        rows, full = ids.tolist(), torch.from_numpy(ids).to(device)
        greedy = {"attention_mask": torch.ones_like(full), "do_sample": False, "max_new_tokens": args.new, "pad_token_id": 0}

        def texts(out: Tensor) -> list[str]:
            return lm.tokenizer.decode_batch(out[:, full.shape[1] :].tolist())

        def reuse() -> list[str]:
            cache = model(full[:1, : args.prefix], use_cache=True, logits_to_keep=1).past_key_values
            cache.batch_repeat_interleave(len(full))
            named = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # its name before
            return texts(model.generate(full, **{named: cache}, **greedy))

        def ours(graphs: bool) -> list[str]:
            lm.graphs = graphs
            return lm.generate(rows, args.new, temperature=0)

        def whole() -> list[str]:
            return texts(model.generate(full, **greedy))

        run: dict[str, Callable[[], list[str]]] = {"ours": partial(ours, True), "(a)": whole, "(b)": reuse}
        return run | {"no graphs": partial(ours, False)} if device.type == "cuda" else run

    launched = ["ours, no CUDA graphs"] if device.type == "cuda" else []  # where torch can count no FLOPs of a replay
    rows = [["agents", "ours, actions/s", "(a)", "(b)", *launched, "ours / (a)", "ours / (b)", "FLOPs (a) / ours",
             "GFLOP/action, formula", "counted", "ours, GFLOP/s", "KV read (b) / ours"]]  # fmt: skip
    ties = 0
    for agents in args.agents:
        ids = random_prompts(lm, args, agents)
        told, checked = ids.tolist(), contestants(exact, model, ids)
        ours, counted = count_flops(checked.pop("ours"))
        for name, run in checked.items():
            ties += agree(name, exact, told, ours, run())
        timed = contestants(lm, rival, ids)
        if lm is not exact:
            for run in timed.values():  # in this dtype kernels are yet to be made
                run()
        seconds = in_turns(timed, args.repeats)
        load, size = Load(agents, args.prefix, args.suffix, args.new), dtype.itemsize
        costs = [load.cost(config, size), load.cost(config, size, False, False), load.cost(config, size, True, False)]
        times = [seconds[name] / seconds["ours"] for name in ("(a)", "(b)")]
        rows.append([
            agents, *(f"{agents / s:.2f}" for s in seconds.values()), *(f"{x:.2f}" for x in times),
            f"{costs[1].flops / costs[0].flops:.1f}", f"{costs[0].flops / agents / 1e9:.3g}",
            "–" if launched else f"{counted / agents / 1e9:.3g}",
            f"{costs[0].flops / seconds['ours'] / 1e9:.0f}", f"{costs[2].keys / costs[0].keys:.1f}",
        ])  # fmt: skip
    parted = f" but for {ties} ties within {TIE:g} nats" if ties else ""
    doors.say(f"greedy tokens agree in float32{parted}; {setting(args, lm, dtype)}")
    doors.say(report.markdown(rows))


# ---- train ---------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> None:
    """Time of one policy-stage update (forward, backward, AdamW) on one step's agents, ours and peft's."""
    if args.dtype not in ("auto", "float32"):
        raise InputError(f"--dtype {args.dtype}: training steps are compared in float32")
    doors.threads(args)
    device, _ = doors.device_and_dtype(args)
    peft, lm = rival_library("peft"), our_model(args, device, end=True)
    agents, named = args.agents, "policy"
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
    settings, rate = ib_tune.Settings(steps=100, rows=1, micro=1), 1e-3
    tuned = [p for p in model.parameters() if p.requires_grad]
    optimizers = [torch.optim.AdamW(some, lr=rate, betas=(0.9, 0.98), weight_decay=0.0) for some in (parameters, tuned)]
    full = torch.from_numpy(ids).to(device)
    target = F.pad(full[:, start:], (0, 1))  # end of text is token 0

    def ours() -> tuple[float, float]:
        row = ib_tune.apply(lm, ib_tune.policy_update(lm, [document], named, "bench"), optimizers[0], 0, settings)
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
            group["lr"] = ib_tune.learning_rate(0, settings.steps, rate)
        optimizers[1].step()
        return loss.item(), norm.item()

    pairs = list(zip(ours(), theirs(), strict=True))
    gaps = [abs(a - b) / abs(b) for a, b in pairs]
    if not max(gaps) <= 1e-4:
        raise SystemExit(f"bench: (loss, gradient norm) differ, so no times are printed: ours and theirs {pairs}")
    seconds = in_turns({"ours": ours, "theirs": theirs}, args.repeats)
    tokens = [args.prefix + agents * (args.suffix + args.new), agents * (start + args.new)]
    doors.say(f"one policy-stage update, LoRA rank {args.rank} on all linear layers; {setting(args, lm, torch.float32)}")
    doors.say(report.markdown([
        ["agents", "ours, s", "peft, s", "peft / ours", "tokens peft / ours", "loss differs by", "gradient norm by"],
        [agents, *(f"{s:.3f}" for s in seconds.values()), f"{seconds['theirs'] / seconds['ours']:.2f}",
         f"{tokens[1] / tokens[0]:.2f}", *(f"{gap:.0e}" for gap in gaps)],
    ]))  # fmt: skip


# ---- predict -------------------------------------------------------------------------------------------------------


def predict(args: argparse.Namespace) -> None:
    """Time of a large run on several accelerators, by arithmetic alone."""
    config = pretrain.config_for("qwen2", SHAPES[args.config], SHAPES[args.config].vocab)
    if args.utilisation > 1:
        raise InputError(f"--utilisation {args.utilisation:g}: the part of the peak that is reached is at most 1")
    peak = args.tflops * 1e12 * args.utilisation, args.bandwidth * 1e9 * args.utilisation
    table: list[list[object]] = [["worlds", "B", "rounds", "s a round", "of it mean fields", "actions/s", "hours", "GFLOP/action"]]
    for worlds, batch in itertools.product(args.worlds, args.batch):
        given = {field.name: getattr(args, field.name) for field in fields(Society)}
        found = predicted(config, Society(**given | {"worlds": worlds, "batch": batch}), args.gpus, *peak)
        each = found.acting + found.writing
        table.append([
            worlds, batch, found.rounds, f"{each:.3f}", f"{found.writing / each:.0%}", f"{args.agents / found.seconds:.0f}",
            f"{found.seconds / 3600:.2f}", f"{found.flops / 1e9:.0f}",
        ])  # fmt: skip
    doors.say(f"{args.agents} agents on {args.config} in bfloat16, {args.gpus} devices at {args.utilisation:.0%} of"
          f" {args.tflops:g} TFLOP/s and {args.bandwidth:g} GB/s; P {args.prefix}, S {args.suffix}, G {args.new};"
          f" the mean-field model reads {args.head} + {args.listed} B tokens and writes {args.summary}")  # fmt: skip
    doors.say(report.markdown(table))


# ---- the command line ----------------------------------------------------------------------------------------------


amount = doors.whole(1, LARGEST)


def numbers(text: str) -> list[int]:
    """An argparse type: whole numbers, 1 to LARGEST, with commas between them."""
    return [amount(part) for part in text.split(",")]


def above_zero(text: str) -> float:
    """An argparse type: a finite number above 0."""
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def parser() -> doors.Parser:
    raw = argparse.RawDescriptionHelpFormatter
    out = doors.Parser(prog="python -m mfllm_ref.bench", description=__doc__, formatter_class=raw)
    commands = out.add_subparsers(dest="command", required=True)

    def command(run: Callable[[argparse.Namespace], None], **defaults: object) -> argparse.ArgumentParser:
        some = commands.add_parser(run.__name__, help=(run.__doc__ or "").splitlines()[0].rstrip("."))
        some.set_defaults(run=run)
        for name, value in defaults.items():
            kind = {list: numbers, int: amount, float: above_zero}.get(type(value), Path)
            shown = ",".join(map(str, value)) if isinstance(value, list) else value
            some.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value, metavar="N", help=f"default: {shown}")
        return some

    shape = {"prefix": 600, "suffix": 60, "new": 30}
    fast = command(throughput, agents=[64], **shape, repeats=3)
    slow = command(train, agents=16, **shape, rank=16, repeats=3)
    sizes = [16, 64, 256, 1000, 2500, 5000, 10_000, 20_000, 40_000]
    large = command(scale, agents=sizes, worlds=[1, 2, 4, 8, 16, 32], world_agents=256, batch=64, new=48, summary=120,
                    backbone=TINY)  # fmt: skip
    large.add_argument("--out", type=Path, help="folder for scale.json and scale.png (default: runs/<time>)")
    large.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # one size, in this process
    far = command(predict, agents=1_000_000, worlds=[1, 1000], batch=[64, 512], **shape, head=300, listed=30, summary=100, gpus=8,
                  tflops=989.0, bandwidth=3350.0, utilisation=0.4)  # fmt: skip
    for some in (fast, slow, far):
        some.add_argument("--config", choices=SHAPES, default="qwen2-1.5b" if some is far else "bench-52m", help="a shape")
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
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
