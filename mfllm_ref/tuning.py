"""A tuning run: which adapters to tune on which events, selection on held-out ones, its files, and going on after a break.

What `train.py` does apart from pretraining, as functions. Every adapter is tuned by one `Job`: the mean-field model's, or that of
a policy under one signal. An adapter is selected among its versions by loss on the dev events; the untuned one counts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mfllm_ref import ib_tune, metrics, ranks
from mfllm_ref.errors import InputError
from mfllm_ref.fields import an_object, read_json, show
from mfllm_ref.ib_tune import Chains, Settings, Update
from mfllm_ref.lm import LanguageModel
from mfllm_ref.runs import Run, write_json
from mfllm_ref.society import agora, rollout
from mfllm_ref.society.corpus import KINDS, Past, pretraining_part
from mfllm_ref.society.events import HALF_LIFE, Event, hashed
from mfllm_ref.society.methods import METHODS
from mfllm_ref.society.prompts import Signal
from mfllm_ref.society.response import response_curves, slope, true_response
from mfllm_ref.society.rollout import Annotator
from mfllm_ref.training import STATE, at, finite, load_optimizer_tensors, load_state, optimizer_tensors, save_state

MEAN_FIELD, POLICY = "mean-field", "policy"
RIVALS = ("sft", "recent-sft", "popular-sft", "empirical-sft")
DEV_EVENTS, DEV_STEPS = 24, (3, 8)  # held-out events that select an adapter, and the steps of each that a policy is scored on
SELECTIONS = 5  # how often the dev events are looked at after the first time, which is before any update
# Peak learning rates. The plane's is higher, so that as few updates move its points apart.
MEAN_FIELD_LR, PLANE_LR, POLICY_LR = 5e-4, 4e-3, 1e-3
SHOWN = 7  # events that the table before and after is made of


@dataclass(frozen=True, slots=True)
class Job:
    """One adapter to tune: `signal` is what its agents are told (None: it is the mean-field model's own, tuned at `beta`),
    written by adapter `mean_field` where that is a mean field."""

    name: str
    signal: str | None
    mean_field: str | None
    steps: int
    lr: float  # unless the settings name one
    beta: float = 1.0
    start: str | None = None  # the adapter that it goes on from, where it is not a fresh one


def jobs(stage: str, methods: Sequence[str] | None, steps: tuple[int, int], betas: Sequence[float]) -> list[Job]:
    """What to tune, in order. stage "mean-field", "policy", "sft" or "all"; methods: those that the adapters are for, by
    default mf-llm, or the four rivals of stage "sft"; steps: updates of the mean-field stage and of the policy stage. A rival
    gets as many as both. Several betas: a mean-field adapter each, called beta-<X>/mean-field, from the largest down, each going on
    from the one before: a smaller beta keeps part of what a larger one keeps of a summary.

    Raises InputError for methods that do not exist or that the stage cannot tune.
    """
    if len(betas) > 1 and stage != MEAN_FIELD:
        raise InputError("--beta: several values are for --stage mean-field")
    tunable = {name: method for name, method in METHODS.items() if method.policy or method.mean_field}
    every = methods is not None and list(methods) == ["all"]
    if methods is None:
        methods = RIVALS if stage == "sft" else ("mf-llm",)
    elif every:
        methods = list(tunable)
    for name in methods:
        if name not in tunable:
            raise InputError(f"--method {name!r}: nothing to tune; there are all, {', '.join(tunable)}")
    chosen = [method for name, method in tunable.items() if name in methods]
    found: dict[str, Job] = {}
    if stage in ("all", MEAN_FIELD) and any(m.mean_field for m in chosen):
        found[MEAN_FIELD] = Job(MEAN_FIELD, None, None, steps[0], MEAN_FIELD_LR, betas[0])
    for method in sorted(chosen, key=lambda m: m.policy != POLICY):
        if method.policy and stage in ("all", "sft" if method.name in RIVALS else POLICY):
            updates = sum(steps) if method.name in RIVALS else steps[1]
            found[method.policy] = Job(method.policy, method.signal, method.mean_field, updates, POLICY_LR)
    served = {m.name for m in chosen if m.policy in found or (m.mean_field in found and stage != POLICY)}
    if idle := [] if every else [name for name in methods if name not in served]:
        raise InputError(f"--method {','.join(idle)}: stage {stage} tunes no adapter of it")
    if len(betas) > 1:
        places = {f"beta-{beta!r}".removesuffix(".0") + f"/{MEAN_FIELD}": beta for beta in sorted(betas, reverse=True)}
        starts = [None, *places]
        return [Job(place, None, None, steps[0], PLANE_LR, beta, start) for (place, beta), start in zip(places.items(), starts)]
    return list(found.values())


def draws_plane(todo: Sequence[Job]) -> bool:
    """Whether the jobs are points of the information plane."""
    return any(job.signal is None and job.name != MEAN_FIELD for job in todo)


def find_adapters(
    todo: Sequence[Job], stage: str, given: Mapping[str, Path | None], own: Path | None
) -> dict[str, Path]:  # fmt: skip
    """Where the adapters are that the jobs read and do not make, by name: `given` ones first, else subfolders of `own`. InputError
    for one that is missing, and for one given that no job reads."""
    made = {job.name for job in todo}
    needed = {job.mean_field for job in todo if job.mean_field} - made
    if draws_plane(todo):
        needed.add("sft")  # whose likelihood its gains are over
    optional = {POLICY} if any(job.signal is None for job in todo) else set()  # whose likelihood is the reward
    found = {}
    for name, path in given.items():
        if name in needed and path is None and own is not None and (own / name).is_dir():
            path = own / name
        if name in needed and path is None:
            raise InputError(f"--{name}-adapter: stage {stage} needs one")
        if path is not None and name in made:
            raise InputError(f"--{name}-adapter {path}: this run tunes that adapter itself")
        if path is not None and name not in needed | optional:
            raise InputError(f"--{name}-adapter {path}: stage {stage} reads none")
        if path is not None:
            found[name] = path
    return found


def check_ids(events: Sequence[Event], leave_out: Sequence[str]) -> None:
    """InputError for a name that no event has."""
    for name in leave_out:
        if name not in {event.id for event in events}:
            raise InputError(f"--leave-out {name}: no such event")


def choose_events(
    data: Sequence[Event] | None, leave_out: Sequence[str], pretrained: Sequence[str] | None, batch: int, annotate: Annotator,
    half_life: float = HALF_LIFE,
) -> tuple[list[Past], list[Past]]:  # fmt: skip
    """(pasts to tune on, pasts to select on): agora's train and dev splits, or outside events, a fifth of which selects.

    pretrained: what pretraining on the same outside events was told to leave out; then only what it has kept is used. None: it
    has read none of them. Raises InputError where nothing is left to tune or to select on.
    """
    if data is None:
        splits = ([agora.event(split, i) for i in range(agora.SPLITS[split])] for split in ("train", "dev"))
        fitted, held = (sorted(events, key=lambda event: hashed("tuning", event.id)) for events in splits)
    else:
        check_ids(data, leave_out)
        kept = list(data) if pretrained is None else pretraining_part(data, pretrained)[1]
        read = len(data) - len(kept)
        kept = [event for event in kept if event.id not in leave_out and len(event.actions) > 2 * batch]
        # Those too short to select stand last.
        kept.sort(key=lambda event: (len(event.actions) <= DEV_STEPS[0] * batch, hashed("selection", event.id)))
        cut = max(1, len(kept) // 5)
        held, fitted = kept[:cut], kept[cut:]
        if not fitted:
            gone = f", as pretraining has read {read}" if read else ""
            raise InputError(
                f"{len(data)} events: an empty split, {len(kept)} with over {2 * batch} actions are left to tune and select on{gone}; "
                "two are needed"
            )
    tuned, dev = ([Past(event, annotate, batch, half_life) for event in some] for some in (fitted, held[:DEV_EVENTS]))
    if all(past.steps <= DEV_STEPS[0] for past in dev):
        raise InputError(f"an empty split: no event to select on has over {DEV_STEPS[0]} steps of --batch {batch} actions")
    return tuned, dev


def check_room(lm: LanguageModel, pasts: Sequence[Past], todo: Sequence[Job], summary_tokens: int) -> None:
    """InputError naming an event of which a prompt and what follows may not fit into the backbone's positions: tuning leaves
    nothing out of a prompt. Looks at the longest prompts, in bytes, of each event; the summary before may be one that was sampled
    or the words of the exact shares."""
    rollout.check_end(lm)
    kinds, limit = {job.signal for job in todo if job.signal in KINDS}, lm.backbone.config.max_positions
    for past in pasts:
        steps = range(past.steps)
        documents = [past.told(step, told) for step in steps for told in (None, *(past.signals[step][k] for k in kinds))]
        acts = (document.prefix + max(map("".join, document.branches), key=_size) for document in documents)
        sums_up = (past.summarise(step, "") for step in steps[:-1])
        before = max(summary_tokens, *map(len, lm.tokenizer.encode_batch([past.population[step] for step in steps])))
        for prompts, room in ((acts, before + 1), (sums_up, before + summary_tokens)):
            if (length := len(lm.tokenizer.encode(max(prompts, key=_size)))) + room > limit:
                raise InputError(
                    f"event {show(past.event.id)}: a prompt of {length} tokens and --summary-tokens {summary_tokens} are more than "
                    f"the backbone's {limit} positions hold"
                )


def _size(text: str) -> int:
    return len(text.encode())


class Tuner:
    """What the jobs of a run share."""

    def __init__(
        self, run: Run, lm: LanguageModel, tuned: Sequence[Past], dev: Sequence[Past], settings: Settings, rank: int,
        save_every: int, policy: str | None = None, progress: bool = False,
    ) -> None:  # fmt: skip
        """policy: the adapter whose likelihood is the mean-field stage's reward (None: the bare backbone)."""
        self.run, self.lm, self.tuned, self.dev = run, lm, tuned, dev
        self.settings, self.rank, self.save_every, self.policy, self.progress = settings, rank, save_every, policy, progress
        self.log, self.state = run.lines("log.jsonl"), run.out / STATE

    def all(self, todo: Sequence[Job]) -> None:
        """Tune the jobs' adapters in order, or go on where the run's folder stands."""
        earlier = load_state(self.state, self.lm.device)
        names = [job.name for job in todo]
        done = names.index(earlier[0]["job"]) if earlier else 0
        self.log.keep(earlier[0]["rows"] if earlier else 0)
        for job in todo[:done]:
            self.lm.load_adapter(job.name, self.run.out / job.name)
        for number, job in enumerate(todo[done:], start=done):
            self.one(job, earlier if earlier and earlier[0]["job"] == job.name else None)
            if number + 1 < len(todo):
                save_state(self.state, {"job": names[number + 1], "rows": self.log.count, "step": 0})
        ranks.gather(None)  # the log is whole for all who read it

    def one(self, job: Job, earlier: tuple[dict, dict[str, dict[str, Tensor]]] | None) -> None:
        """Tune one adapter and save it; `earlier` is the state to go on from."""
        lm, settings = self.lm, self.settings
        settings = replace(settings, steps=job.steps, beta=job.beta)
        lm.add_adapter(job.name, self.rank, 2.0 * self.rank, "all-linear", seed=hashed("adapter", settings.seed) % 2**31)
        parameters = lm.adapters.parameters(job.name)
        if job.start is not None:
            with torch.no_grad():
                for parameter, value in zip(parameters, lm.adapters.parameters(job.start), strict=True):
                    parameter.copy_(value)
        best = [p.detach().clone() for p in parameters]
        optimizer = torch.optim.AdamW(parameters, lr=settings.lr or job.lr, betas=(0.9, 0.98), weight_decay=0.0)
        facts: dict[str, Any] = {"job": job.name, "step": 0, "best": None, "chains": []}
        if earlier is not None and earlier[1]:
            facts = earlier[0]
            with torch.no_grad():
                for i, p in enumerate(parameters):
                    p.copy_(earlier[1]["adapter"][str(i)])
                    best[i] = earlier[1]["best"][str(i)]
            load_optimizer_tensors([optimizer], earlier[1]["optimizer"])
        if job.signal is None:
            update, select, state = self._mean_field(job, settings, facts)
        else:
            update, select, state = self._policy(job, job.signal, settings)
        every, pending = max(1, job.steps // SELECTIONS), []
        bar = tqdm(total=job.steps, initial=facts["step"], unit="step", desc=job.name, disable=not self.progress)
        try:
            for step in range(facts["step"], job.steps + 1):
                row: dict = {"stage": job.name, "step": step}
                if step % every == 0 and step + every <= job.steps or step == job.steps:
                    with at(step, "the dev events"):
                        row["dev_loss"] = finite("loss", select())
                    if facts["best"] is None or row["dev_loss"] < facts["best"]:
                        facts["best"], best = row["dev_loss"], [p.detach().clone() for p in parameters]
                if step < job.steps:
                    row |= ib_tune.apply(lm, update(step), optimizer, step, settings)
                    bar.update()
                    bar.set_postfix_str(f"loss {row['loss']:.2f}")
                pending.append(row)
                if step + 1 < job.steps and (step + 1) % self.save_every == 0:
                    self.log.append(pending)
                    pending = []
                    facts |= {"step": step + 1, "rows": self.log.count, "chains": state()}
                    numbered = ({str(i): t for i, t in enumerate(some)} for some in (parameters, best))
                    save_state(self.state, facts, **dict(zip(("adapter", "best"), numbered)), optimizer=optimizer_tensors([optimizer]))
        except FloatingPointError as error:
            self._keep(job, best)
            self.log.append(pending)
            raise InputError(f"{self.run.out}: {error}; {job.name}/ holds the best adapter so far") from None
        finally:
            bar.close()
        self._keep(job, best)
        self.log.append(pending)

    def _keep(self, job: Job, best: Sequence[Tensor]) -> None:
        """The selected adapter: in the language model from now on, and on disk."""
        with torch.no_grad():
            for parameter, value in zip(self.lm.adapters.parameters(job.name), best, strict=True):
                parameter.copy_(value)
                parameter.requires_grad_(False)
        self.lm.save_adapter(job.name, self.run.out / job.name)

    def _mean_field(self, job: Job, settings: Settings, facts: Mapping) -> tuple[Callable, Callable, Callable]:
        chains = Chains(self.tuned, settings.rows, settings.seed, facts["chains"])

        def update(step: int) -> Update:
            return ib_tune.mean_field_update(self.lm, chains, settings, step, job.name, self.policy)

        def select() -> float:
            found = ib_tune.information(self.lm, self.dev, settings, job.name, self.policy)
            return found["kl"] - settings.beta * found["reward"]

        return update, select, lambda: chains.state

    def _policy(self, job: Job, signal: str, settings: Settings) -> tuple[Callable, Callable, Callable]:
        pasts = self.tuned
        if signal == "mean-field":  # so many events that a step comes up about once: mean fields take time to write,
            # but a policy that sees few topics often learns their populations by heart instead of reading the summary
            steps = np.cumsum([past.steps - 1 for past in pasts])
            pasts = pasts[: int(np.searchsorted(steps, job.steps * settings.rows)) + 1]
            mine = self._fields(f"{job.name}.train", job, pasts, settings, None)
            theirs = self._fields(f"{job.name}.dev", job, self.dev, settings, max(DEV_STEPS) + 1)
        else:
            mine, theirs = ([[told[signal] for told in past.signals] for past in some] for some in (pasts, self.dev))
        # A made-up population has no written mean field: its exact shares stand in.
        kind = "empirical" if signal == "mean-field" else signal
        fixed = [past.told(step, told[step]) for past, told in zip(self.dev, theirs) for step in DEV_STEPS if step < past.steps]

        def update(step: int) -> Update:
            rng = np.random.default_rng([settings.seed, 3, step])
            rows = [int(i) for i in rng.integers(len(pasts), size=settings.rows)]
            places = [(i, int(rng.integers(1, pasts[i].steps))) for i in rows]
            named = ", ".join(f"{pasts[i].event.id} step {place}" for i, place in places)
            documents = [
                pasts[i].reweighted(kind, pasts[i].batch, rng) if kind != "none" and rng.random() < settings.reweighted
                else pasts[i].told(place, mine[i][place]) for i, place in places
            ]  # fmt: skip
            return ib_tune.policy_update(self.lm, documents, job.name, named)

        def select() -> float:
            with torch.no_grad(), self.lm.adapter(job.name):
                parts = [ib_tune.log_likelihood(self.lm, fixed[i : i + 16])[0] for i in range(0, len(fixed), 16)]
            return -float(torch.cat(parts).mean())

        return update, select, lambda: []

    def _fields(
        self, name: str, job: Job, pasts: Sequence[Past], settings: Settings, until: int | None
    ) -> list[list[Signal | None]]:
        """The mean fields that a policy is tuned on, by past and step, written once a run (to summaries/<name>.json, by event)."""
        path = self.run.out / "summaries" / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            with at(0, f"the summaries that {job.name} is tuned on"):
                written = ib_tune.summaries(self.lm, pasts, job.mean_field, settings, until, self.progress)
            write_json(path, {past.event.id: texts for past, texts in zip(pasts, written, strict=True)})
            ranks.gather(None)  # all read the file below
        written, told = an_object(read_json(path), str(path), "what holds the summaries"), []
        for past in pasts:
            texts, steps = written.get(past.event.id), min(past.steps, until or past.steps)
            if not isinstance(texts, list) or len(texts) != steps or not all(isinstance(text, str) for text in texts):
                raise InputError(f"{path}: damaged, cannot resume (event {show(past.event.id)} needs {steps} summaries)")
            told.append([ib_tune.signal_of(text) for text in texts])
        return told


# ---- what tuning changed -------------------------------------------------------------------------------------------


def responses(lm: LanguageModel, dev: Sequence[Past], annotate: Annotator, policy: str, known: bool) -> dict[str, dict]:
    """Response curves {"before", "after", "truth"}: {dimension: shares acted}; truth only where the process is `known`."""
    some = dev[:SHOWN]
    out = {key: response_curves(lm, some, annotate, adapter=name) for key, name in (("before", None), ("after", policy))}
    if known:
        out["truth"] = true_response(some)
    return out


def slopes(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, float]]:
    return {key: {d: round(slope(acted), 3) for d, acted in some.items()} for key, some in curves.items()}


def compare(
    lm: LanguageModel, dev: Sequence[Past], annotate: Annotator, methods: Sequence[str], seed: int,
    settings: rollout.Settings,
) -> dict:  # fmt: skip
    """`metrics.evaluate` of a few held-out events under `methods`: the table before and after."""
    events = [past.event for past in dev if len(past.event.actions) > settings.warmup + 50][:SHOWN]
    if not events:
        return {}
    worlds = [rollout.World(event, METHODS[name], seed) for event in events for name in methods]
    rows: Iterator[dict] = (row for step in rollout.rollout(lm, worlds, settings, annotate) for row in step.trajectory)
    return metrics.evaluate(metrics.collect(rows), {event.id: event.domain for event in events})


def information_plane(
    lm: LanguageModel, dev: Sequence[Past], settings: Settings, todo: Sequence[Job], policy: str | None, sft: str
) -> tuple[list[dict[str, float]], dict[str, float]]:  # fmt: skip
    """(a point a job, that is a beta; the untuned mean field's), in nats a step: "kl", the bound on I(m; X, c), and "gain" in
    action log-likelihood of the reward's policy, told m, over the `sft` policy, told nothing: an estimate of I(m; Y)."""
    names = [None, *(job.name for job in todo)]
    found = [ib_tune.information(lm, dev, settings, name, policy, sft) for name in names]
    untuned, *points = [{"kl": point["kl"], "gain": point["reward"] - point["blind"]} for point in found]
    return [{"beta": job.beta} | point for job, point in zip(todo, points, strict=True)], untuned
