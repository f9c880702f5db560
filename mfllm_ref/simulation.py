"""A simulation's parts: which events and methods, the rollout on disk, likelihoods, floors, effects of interventions.

What `simulate.py` does, as functions that a notebook or `train.py` can call. Notable: a rollout is written a step at a
time and goes on from its last complete step; memory holds the worlds' short histories, the files hold their texts.
"""

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mfllm_ref import metrics, ranks
from mfllm_ref.errors import InputError
from mfllm_ref.fields import a_list, number_field, read_json, text_field
from mfllm_ref.lm import LanguageModel, lora
from mfllm_ref.lm.checkpoint import INDEX
from mfllm_ref.runs import RUN_FILE, Run, read_json_lines, sha256
from mfllm_ref.society import agora, prompts
from mfllm_ref.society.events import Event
from mfllm_ref.society.methods import METHODS, Method
from mfllm_ref.society.readers import load_events
from mfllm_ref.society.rollout import (
    Annotator, Intervention, Rows, Settings, State, World, check_end, complete_steps, fitting, horizon, rollout,
)  # fmt: skip

# What a run without arguments simulates: one event of each domain, one window of 60 actions behind the warm-up.
BUILT_IN_EVENTS, BUILT_IN_AGENTS = 7, 110
CONTINUATIONS = 4  # true continuations that agora's floor and true effect are means of


def choose_events(data: Path | None, split: str | None, ids: Sequence[str], limit: int | None) -> list[Event]:
    """Events of `data` (None: the built-in world), those of `ids` or the first `limit`.

    split: of the built-in world (default test), or a folder of that name in `data`. InputError for what is not there.
    """
    own = split or "test"
    if data is None:
        numbers = {f"agora-{own}-{index:04d}": index for index in range(agora.SPLITS[own])}
        place = f"the built-in {own} split ({next(iter(numbers))} to {list(numbers)[-1]})"
    else:
        if split is not None and not (data / split).is_dir():
            raise InputError(f"--split {split}: {data} has no folder of that name")
        events = {event.id: event for event in load_events(data / split if split else data)}
        numbers, place = dict.fromkeys(events, 0), f"{data} ({', '.join(list(events)[:3])}, ...)"
    for name in ids:
        if name not in numbers:
            raise InputError(f"--event {name}: not in {place}")
    if ids and limit:
        raise InputError(f"--events {limit}: the events are named by --event")
    chosen = list(dict.fromkeys(ids)) or list(numbers)[: limit or (BUILT_IN_EVENTS if data is None else None)]
    return [agora.event(own, numbers[name]) if data is None else events[name] for name in chosen]


def long_enough(events: Sequence[Event], settings: Settings, named: bool) -> tuple[list[Event], list[str]]:
    """The events of which the warm-up leaves something to simulate, and a line about each of the others.

    Raises InputError where it leaves nothing of any, or of one that was asked for by name (`named`).
    """
    found: list[Event] = []
    refused: list[InputError] = []
    for event in events:
        try:
            horizon(event, settings)
            found.append(event)
        except InputError as error:
            refused.append(error)
    if refused and (named or not found):
        raise refused[0]
    return found, [f"{short}; left out" for short in refused]


def check_room(lm: LanguageModel, events: Sequence[Event], methods: Sequence[Method], settings: Settings) -> None:
    """InputError naming an event whose prompts cannot fit into the backbone's positions, before anything is written. Of the
    prompts that tell of nobody but the agent it looks at the one that needs most tokens with what follows, an action or the real
    one that is scored; of a mean field's, at one that lists no action."""
    writer = next((method for method in methods if not method.resamples), None)
    reader = next((method for method in methods if method.signal == "mean-field"), None)
    if writer is not None:
        check_end(lm)
    for event in events:
        acting = event.actions[settings.warmup : horizon(event, settings)]
        private = [prompts.policy_private(event.language, action.agent.profile) for action in acting]
        told, said = map(lm.tokenizer.encode_batch, (private, [prompts.continuation(action.text) for action in acting]))
        rooms = [max(settings.action_tokens, len(ids) + 1) for ids in said]
        room, most = max(zip(rooms, range(len(rooms)), strict=True), key=lambda pair: pair[0] + len(told[pair[1]]))
        acts = prompts.policy_shared(event.language, event.topic) + private[most]
        sums_up = prompts.mean_field_prompt(event.language, event.topic, (), "", (), prompts.MANY)
        for method, prompt, room in ((writer, acts, room), (reader, sums_up, settings.summary_tokens)):
            if method is not None:
                fitting(lm, State(World(event, method, 0), settings, {}), settings, [room], lambda _: [prompt])


def find_adapters(folder: Path | None, given: Mapping[str, Path | None]) -> dict[str, Path]:
    """Where the adapters are that METHODS name: `given` ones first, else subfolders of `folder` that hold one."""
    if folder is not None and not folder.is_dir():
        raise InputError(f"--adapters {folder}: no such folder")
    found = {}
    for name in dict.fromkeys(name for m in METHODS.values() for name in (m.policy, m.mean_field) if name):
        path = given.get(name) or (folder / name if folder else None)
        if path is not None and (path / "adapter_config.json").is_file():
            found[name] = path
        elif given.get(name):  # refused even where no method asks for it
            raise InputError(f"--{name}-adapter {path}: holds no adapter_config.json")
    if folder is not None and not found:
        raise InputError(f"--adapters {folder}: holds no adapter, neither policy/ nor mean-field/ nor that of another method")
    return found


def choose_methods(names: str | None, adapters: Mapping[str, Path], warmup: int) -> list[Method]:
    """The methods called `names` (a,b,c), in the order of METHODS; None: every one whose adapters exist."""

    def lacks(method: Method) -> list[str]:
        return [name for name in (method.policy, method.mean_field) if name and name not in adapters]

    if names is None:
        return [m for m in METHODS.values() if not lacks(m) and not (m.resamples and warmup == 0)]
    wanted = {name.strip() for name in names.split(",")}
    for name in sorted(wanted - set(METHODS)):
        raise InputError(f"--method {name!r}: no such method; there are {', '.join(METHODS)}")
    chosen = [method for name, method in METHODS.items() if name in wanted]
    for method in chosen:
        if lacks(method):
            raise InputError(f"--method {method.name}: needs the adapter {lacks(method)[0]}/ in --adapters")
        if method.resamples and warmup == 0:
            raise InputError(f"--method {method.name}: has nothing to draw from with --warmup 0")
    return chosen


def read_intervention(path: Path, events: Sequence[Event], settings: Settings) -> dict[int, list[tuple[str, str]]]:
    """Inserted actions by step, (profile, text) each, from a JSON file (README, Your own events and models). InputError names
    the fault."""
    items = read_json(path)
    if not isinstance(items, list) or not items:
        raise InputError(f'{path}: must be a list of {{"step", "actions"}}, with at least one')
    steps = max(-(-horizon(event, settings) // settings.batch) for event in events)
    out: dict[int, list[tuple[str, str]]] = {}
    for number, item in enumerate(items):
        where = f"{path}: item {number}"
        if not isinstance(item, dict) or set(item) != {"step", "actions"}:
            raise InputError(f'{where}: must be an object with "step" and "actions"')
        step = item["step"]
        if steps < 2:
            raise InputError(f"{path}: a run of these events has one step only, so no step could follow an intervention")
        if type(step) is not int or not 0 <= step < steps - 1:
            raise InputError(f"{where}: 'step' must be a whole number from 0 to {steps - 2}, so that a step follows")
        for action in a_list(item["actions"], where, "'actions'"):
            if not isinstance(action, dict) or set(action) != {"profile", "text"}:
                raise InputError(f'{where}: an action must be an object with "profile" and "text"')
            out.setdefault(step, []).append((text_field(action, "profile", where), text_field(action, "text", where)))
    if not out:
        raise InputError(f"{path}: inserts no action")
    return out


def roll_out(
    run: Run, suffix: str, lm: LanguageModel, worlds: Sequence[World], settings: Settings, annotate: Annotator,
    intervention: Intervention | None, likelihood: bool, progress: bool,
) -> tuple[int, float]:  # fmt: skip
    """Roll the worlds out into the run's trajectory<suffix>.jsonl, mean_field<suffix>.jsonl and (with `likelihood`)
    likelihood.jsonl, or go on there.

    Returns how many actions the language model wrote now, and the seconds that took.
    """
    names = [f"trajectory{suffix}.jsonl", f"mean_field{suffix}.jsonl", *(["likelihood.jsonl"] if likelihood else [])]
    files = [run.lines(name) for name in names]
    for file in files:
        for number, row in enumerate(file, 1):
            try:
                _check(row, file.path)
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{file.path}:{number}: damaged, cannot resume ({type(error).__name__}: {error})") from None
    done = Rows(*files)  # read from the disk as they are replayed
    for file, count in zip(files, complete_steps(worlds, settings, done.counts(), likelihood)[1]):
        file.keep(count)
    written, started = 0, time.perf_counter()
    total = sum(horizon(w.event, settings) - settings.warmup for w in worlds if not w.method.resamples)
    with tqdm(total=total, initial=_spoken(done.trajectory), unit="action", disable=not progress, smoothing=0) as bar:
        for rows in rollout(lm, worlds, settings, annotate, intervention, done, likelihood):
            # The trajectory last: a step is complete only when it is.
            for file, new in reversed(list(zip(files, (rows.trajectory, rows.mean_field, rows.likelihood)))):
                file.append(new)
            written += _spoken(rows.trajectory)
            bar.update(_spoken(rows.trajectory))
    ranks.gather(None)  # the files are whole for all who read them
    return written, time.perf_counter() - started


def _check(row: Mapping, path: Path) -> None:
    """KeyError, TypeError or ValueError where a row of an earlier run cannot be counted or measured; which one it is, `rollout`
    checks."""
    if not {"event", "method", "seed", "step"} <= row.keys() or row["method"] not in METHODS:
        raise ValueError("names no world and step")
    if path.name.startswith("trajectory"):
        metrics.encode([row["labels"], row["real_labels"]])
        if row["phase"] not in ("warmup", "rollout"):
            raise ValueError(f"phase {row['phase']!r:.40}")
    if path.name.startswith("likelihood"):
        for key in ("nll", "tokens"):
            number_field(row, key, str(path))


def _spoken(rows: Iterable[Mapping]) -> int:
    return sum(row["phase"] == "rollout" and not METHODS[str(row["method"])].resamples for row in rows)


def nll(rows: Iterable[Mapping]) -> dict[str, float]:
    """Mean negative log-likelihood in nats per token of the real actions by method, from likelihood.jsonl's rows."""
    total: dict[str, np.ndarray] = {}
    for row in rows:
        total[row["method"]] = total.get(row["method"], np.zeros(2)) + (row["nll"], row["tokens"])
    return {name: float(nats / tokens) for name, (nats, tokens) in total.items() if tokens}


def _continued(
    event: Event, settings: Settings, annotate: Annotator, items: Sequence[Mapping] | None = None
) -> Iterator[list[dict[str, str]]]:
    """Labels of the rollout actions in CONTINUATIONS runs of the event's true process."""
    for seed in range(CONTINUATIONS):
        actions = agora.true_rollout(event, settings.warmup, items, seed, batch=settings.batch)
        texts = [action.text for action in actions[settings.warmup : horizon(event, settings)]]
        yield annotate(texts, event.language)


def floors(events: Sequence[Event], settings: Settings, annotate: Annotator) -> dict[str, np.ndarray]:
    """The floor of built-in events, {event: KL [dimensions]}: their true process against continuations of itself."""
    out = {}
    for event in events:
        texts = [action.text for action in event.actions[settings.warmup : horizon(event, settings)]]
        real = metrics.encode(annotate(texts, event.language))
        others = map(metrics.encode, _continued(event, settings, annotate))
        out[event.id] = np.mean([metrics.kl_between(real, other) for other in others], axis=0)
    return out


def effect(
    run: Run, events: Sequence[Event] | None, settings: Settings, annotate: Annotator, intervention: Intervention, why: str = ""
) -> dict:
    """What an intervention changed, from its next step on, by the rows with and without it on disk: {"from_step",
    "effect", "true_effect"}. events: of the built-in world, whose true process is asked too; None where it cannot be, and `why`."""
    start = min(intervention) + 1
    files = (read_json_lines(run.out / name) for name in ("trajectory.jsonl", "trajectory-without.jsonl"))
    sides = [metrics.collect(row for row in rows if row["step"] >= start) for rows in files]
    out: dict[str, Any] = {"from_step": start, "true_effect": None}
    pairs = ((key[1], world.simulated, sides[1][key].simulated) for key, world in sides[0].items())
    out["effect"] = metrics.share_changes(pairs)
    if events is None:
        return {**out, "note": f"true_effect is null: {why}"}
    inserted = [
        {"step": step, "actions": [{"profile": profile, "text": text} for profile, text in actions]}
        for step, actions in intervention.items()
    ]
    first = max(start * settings.batch - settings.warmup, 0)
    pairs = (
        ("truth", metrics.encode(after[first:]), metrics.encode(before[first:]))
        for event in events if horizon(event, settings) > start * settings.batch
        for after, before in zip(*(_continued(event, settings, annotate, items) for items in (inserted, None)))
    )  # fmt: skip
    return {**out, "true_effect": metrics.share_changes(pairs)["truth"]}


def digest(events: Sequence[Event]) -> str:
    """SHA-256 of what the events say, wherever they lie: it changes if the built-in world does."""
    whole = hashlib.sha256()
    for event in events:
        whole.update(repr(event).encode() + b"\n")
    return whole.hexdigest()


def digests(data: Path | None, events: Sequence[Event]) -> dict[str, str]:
    """For run.json's sha256: "events", what a run has read of `data` (None: the built-in world), and "data", the file's bytes
    where it is one. A folder may hold anything else beside its events, the run's own output too, so there it is the events'."""
    read = digest(events)
    return {"data": sha256(data) if data is not None and data.is_file() else read, "events": read}


def adapter_files(adapters: Mapping[str, Path]) -> dict[str, Path]:
    """The files of PEFT folders, by what they are: for run.json's sha256."""
    return {f"adapters/{name}/{file}": path / file for name, path in adapters.items() for file in (lora.CONFIG, lora.WEIGHTS)}


def weights_of(backbone: Path) -> dict[str, Path]:
    """The files of a checkpoint that decide what it computes, by what they are: for run.json's sha256. Not the record of its own
    pretraining, which has times in it."""
    kinds = {".safetensors": "weights", ".json": "tokenizer", ".model": "tokenizer", ".jinja": "tokenizer"}
    files = sorted(path for path in backbone.iterdir() if path.suffix in kinds and path.name != RUN_FILE and path.is_file())
    known = {"config.json": "config", INDEX: "weights"}
    return {f"{known.get(path.name, kinds[path.suffix])}/{path.name}": path for path in files}
