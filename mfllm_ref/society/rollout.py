"""The mean-field loop: all worlds (event x method x seed) step in lockstep, a step of B agents at a time.

One step, for every world at once: read the signal m_t, let the step's agents act given it (the first W actions of an event
are the real ones), annotate what they wrote, and update the population: the history that the simple signals are read from,
and, for methods with a mean-field model, m_{t+1} ~ mu(. | c, m_t, s_t, a_t). The generations of all worlds, whatever
their adapters, are one batch. Nothing of a real action after the warm-up is read, but who acts next (profile and reach).

Beside each simulated world a twin can run whose past stays real: it scores the real actions under the method (teacher
forcing). Twins share the simulated worlds' batches, which makes them cheap: a mean field takes as many decoding steps for
one world as for a hundred.
"""

import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from mfllm_ref.errors import InputError, Notice
from mfllm_ref.fields import show
from mfllm_ref.lm import LanguageModel
from mfllm_ref.runs import JsonLines
from mfllm_ref.society import prompts
from mfllm_ref.society.events import HALF_LIFE, Event, action_ids, hashed
from mfllm_ref.society.methods import Method
from mfllm_ref.society.signals import History, Seen

TOO_LONG = "a prompt is longer than the backbone's positions: part of what it tells of the population is left out"
SPARE = 8  # tokens that a tokenizer may put in front of a text

Annotator = Callable[[Sequence[str], str], list[dict[str, str]]]
Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class Settings:
    """How a rollout runs. `agents` counts an event's actions, warm-up included; None means all of them."""

    agents: int | None = None
    batch: int = 10
    warmup: int = 50
    action_tokens: int = 48
    summary_tokens: int = 120
    chat: bool = False
    summary_top_p: float = prompts.SUMMARY_TOP_P
    half_life: float = HALF_LIFE  # actions, of the population that `empirical` tells of


@dataclass(frozen=True, slots=True)
class World:
    """One simulation: an event under a method, with the seed of its noise."""

    event: Event
    method: Method
    seed: int


# Inserted actions, step -> (profile, text) of each: what the JSON file of --intervene says.
Intervention = Mapping[int, Sequence[tuple[str, str]]]


def horizon(event: Event, settings: Settings) -> int:
    """How many of the event's actions the rollout covers.

    Raises InputError where the warm-up leaves nothing to simulate.
    """
    count = len(event.actions) if settings.agents is None else min(settings.agents, len(event.actions))
    if settings.warmup >= count:
        raise InputError(f"event {show(event.id)}: --warmup {settings.warmup} leaves none of its {count} actions to simulate")
    return count


class State:
    """One world in motion: what its population has done so far, as far as the next step may know it."""

    def __init__(self, world: World, settings: Settings, intervention: Intervention, forced: bool = False) -> None:
        self.world, self.settings, self.intervention = world, settings, intervention
        self.count = horizon(world.event, settings)
        self.real = self.count if forced else settings.warmup  # so many first actions are the real ones
        self.ids = action_ids(world.event.actions[: self.count])
        # An author whose reach is not given has the popularity of their real posts so far, and no later one's.
        self.reach: dict[str, float] = {}
        for action in world.event.actions[: settings.warmup]:
            self.reach[action.agent.id] = max(action.popularity, self.reach.get(action.agent.id, 0.0))
        self.history = History(settings.batch, settings.half_life)
        self.mean_field = ""  # m_t, empty before the first update

    def indices(self, step: int) -> range:
        return range(step * self.settings.batch, min((step + 1) * self.settings.batch, self.count))

    def guides(self, step: int) -> bool:
        """Whether a mean field is written to guide `step`."""
        return self.world.method.signal == "mean-field" and len(self.indices(step)) > 0

    def posts(self, step: int) -> list[str]:
        """Public posts that everyone has seen by the start of `step`."""
        return [post.text for post in self.world.event.posts if post.index <= step * self.settings.batch]

    def shared(self, step: int, drop: int = 0) -> str:
        """What all agents of the step are told; `drop` of it, the oldest first, left out: of the signal, then of the posts."""
        event = self.world.event
        signal = self.history.signal(self.world.method.signal, event.language, self.mean_field)
        lines = signal.lines if signal else ()
        if drop and signal:
            # Lines of `recent` go from old to new; of `popular` the least popular goes first.
            kept = lines[drop:] if signal.kind == "recent" else lines[: max(0, len(lines) - drop)]
            signal = replace(signal, lines=kept) if kept else None
        posts = self.posts(step)[max(0, drop - len(lines)) :]
        return prompts.policy_shared(event.language, event.topic, posts, signal)

    def policy_prompts(self, step: int, indices: Sequence[int], drop: int = 0) -> list[str]:
        event, shared = self.world.event, self.shared(step, drop)
        return [shared + prompts.policy_private(event.language, event.actions[i].agent.profile) for i in indices]

    def seen(self, step: int, texts: Sequence[str], labels: Sequence[Mapping[str, str]]) -> list[Seen]:
        """The step's actions as the population sees them; a simulated one has its author's reach and answers nobody."""
        out = []
        for i, text, row in zip(self.indices(step), texts, labels, strict=True):
            action = self.world.event.actions[i]
            popularity, parent = action.popularity, action.parent
            if i >= self.real:
                known = action.agent.reach
                popularity, parent = self.reach.get(action.agent.id, 0.0) if known is None else known, None
            out.append(Seen(self.ids[i], i, action.agent.profile, text, row, popularity, parent))
        return out

    def inserted(self, step: int, annotate: Annotator) -> list[Seen]:
        actions = self.intervention.get(step, ())
        labels = annotate([text for _, text in actions], self.world.event.language) if actions else []
        return [
            Seen(f"inserted#{step}#{k}", None, profile, text, row, 0.0)
            for k, ((profile, text), row) in enumerate(zip(actions, labels, strict=True))
        ]

    def mean_field_prompt(self, step: int, actions: Sequence[Seen], drop: int = 0) -> str:
        """The prompt of m_{step+1}; agents are exchangeable, so the order is canonical (by text, then id). `drop` things
        are left out: the mean field before, then posts, the oldest first, then actions from the end of that order."""
        event, posts, before = self.world.event, self.posts(step), self.mean_field
        listed = [(a.profile, a.text) for a in sorted(actions, key=lambda a: (a.text, a.id))]
        if drop and before:
            before, drop = "", drop - 1
        listed = listed[: max(0, len(listed) - max(0, drop - len(posts)))]
        return prompts.mean_field_prompt(event.language, event.topic, posts[drop:], before, listed, self.indices(step).stop)


def _prompt(lm: LanguageModel, text: str, settings: Settings) -> str | tuple[int, ...]:
    return tuple(lm.tokenizer.chat([{"role": "user", "content": text}])) if settings.chat else text


def fitting(
    lm: LanguageModel, state: State, settings: Settings, rooms: Sequence[int], build: Callable[[int], list[str]]
) -> list[str | tuple[int, ...]]:  # fmt: skip
    """The prompts of build(0). One that leaves fewer than its `rooms` of the backbone's positions free is replaced by that of
    build(1), build(2), ..., which tell less and less of the population, until it fits. Raises InputError naming the event where
    not even the shortest does."""
    limit, built = lm.backbone.config.max_positions, cache(build)
    out: list[str | tuple[int, ...]] = [""] * len(rooms)
    for i, room in enumerate(rooms):

        def fits(dropped: int) -> bool:
            out[i] = _prompt(lm, built(dropped)[i], settings)
            return not _longer(lm, out[i], limit - room)

        low = high = 0  # `low` drops too little; twice as much until it fits, then by bisection
        while not fits(high):
            if high and built(high)[i] == built(low)[i]:
                raise InputError(
                    f"event {show(state.world.event.id)}, method {state.world.method.name}: even the shortest prompt "
                    f"does not fit into the backbone's {limit} positions with {room} tokens to follow"
                )
            low, high = high, 2 * high or 1
        if high:
            fits(low + 1 + bisect_left(range(low + 1, high), True, key=fits))
            warnings.warn(TOO_LONG, Notice, stacklevel=2)
    return out


def check_end(lm: LanguageModel) -> None:
    """InputError where the checkpoint names no end of text, with which actions are scored, or one that its backbone lacks."""
    if lm.tokenizer.end_id is None or lm.tokenizer.end_id >= lm.backbone.config.vocab_size:
        raise InputError(f"{lm.tokenizer.folder}: names no end of text token (eos_token_id) that the backbone has")


def _longer(lm: LanguageModel, prompt: str | tuple[int, ...], limit: int) -> bool:
    """Whether a prompt has more than `limit` tokens, with the one that some tokenizers put in front; none has less than a byte."""
    if isinstance(prompt, str) and len(prompt.encode()) + SPARE <= limit:
        return False
    return len(lm.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt) + 1 > limit


def _steps(states: Sequence[State]) -> range:
    return range(max((-(-state.count // state.settings.batch) for state in states), default=0))


def _act(lm: LanguageModel, states: Sequence[State], step: int, settings: Settings) -> list[list[str]]:
    """The texts of the step's actions in every world: real ones of the warm-up, simulated ones after it."""
    out: list[list[str]] = []
    texts, seeds, owners = list[str | tuple[int, ...]](), list[int](), list[int]()
    for k, state in enumerate(states):
        actions, simulated = state.world.event.actions, [i for i in state.indices(step) if i >= state.real]
        out.append([actions[i].text for i in state.indices(step) if i < state.real])
        noise = [_seed(state, step, i) for i in simulated]
        if state.world.method.resamples:
            pool = sorted(action.text for action in actions[: settings.warmup])  # exchangeable
            if not pool:
                raise InputError(f"--warmup 0: method {state.world.method.name} has no actions to draw from")
            out[k] += [pool[seed % len(pool)] for seed in noise]
        else:
            texts += fitting(lm, state, settings, [settings.action_tokens] * len(simulated),
                              lambda drop: state.policy_prompts(step, simulated, drop))  # fmt: skip
            seeds += noise
            owners += [k] * len(simulated)
    if texts:
        adapters = [states[k].world.method.policy for k in owners]
        written = lm.generate(texts, settings.action_tokens, seeds=seeds, stop=("\n",), worlds=owners, adapters=adapters)
        for k, text in zip(owners, written, strict=True):
            out[k].append(text.strip())
    return out


def _seed(state: State, step: int, index: int) -> int:
    return hashed(state.world.seed, state.world.event.id, step, state.ids[index])


def _update_mean_fields(
    lm: LanguageModel, states: Sequence[State], step: int, actions: Sequence[list[Seen]], settings: Settings
) -> None:
    """m_{step+1} of every world that has a mean-field model and a next step to guide."""
    asked = {}
    for k, state in enumerate(states):
        if state.guides(step + 1):
            prompt, = fitting(lm, state, settings, [settings.summary_tokens],
                               lambda drop: [state.mean_field_prompt(step, actions[k], drop)])  # fmt: skip
            seed = hashed(state.world.seed, state.world.event.id, step + 1, "mean field")
            asked[k] = prompt, seed, state.world.method.mean_field
    if not asked:
        return
    # Equal questions are asked once: pasts are equal through the warm-up, and those of many twins to the end.
    texts, seeds, adapters = zip(*(once := dict.fromkeys(asked.values())), strict=True)
    options = {"seeds": seeds, "stop": ("\n",), "worlds": range(len(once)), "adapters": adapters, "top_p": settings.summary_top_p}
    written = dict(zip(once, lm.generate(texts, settings.summary_tokens, **options), strict=True))
    for k, question in asked.items():
        states[k].mean_field = " ".join(written[question].split())


def _score(lm: LanguageModel, twins: Sequence[State], step: int, settings: Settings) -> list[tuple[float, int]]:
    """Of each twin's real actions of `step` after the warm-up: minus their log-likelihood in nats, and their tokens, end
    of text included."""
    out = [(0.0, 0)] * len(twins)
    for name in dict.fromkeys(twin.world.method.policy for twin in twins if twin.indices(step)[-1] >= settings.warmup):
        texts, spoken, owners, tokens = list[str | tuple[int, ...]](), list[str](), list[int](), list[int]()
        for k, twin in enumerate(twins):
            future = [i for i in twin.indices(step) if i >= settings.warmup and twin.world.method.policy == name]
            said = [prompts.continuation(twin.world.event.actions[i].text) for i in future]
            sizes = [len(ids) + 1 for ids in lm.tokenizer.encode_batch(said)]
            rooms = [max(settings.action_tokens, size) for size in sizes]
            texts += fitting(lm, twin, settings, rooms, lambda drop: twin.policy_prompts(step, future, drop))
            spoken, owners, tokens = spoken + said, owners + [k] * len(future), tokens + sizes
        with lm.adapter(name), torch.no_grad():
            nats = -lm.log_prob(texts, spoken, worlds=owners, end_of_text=True).double().cpu().numpy()
        for k in dict.fromkeys(owners):
            mine = np.array(owners) == k
            out[k] = float(nats[mine].sum()), int(np.array(tokens)[mine].sum())
    return out


@dataclass(frozen=True, slots=True)
class Rows:
    """What one step adds to trajectory.jsonl, mean_field.jsonl and likelihood.jsonl, which has a row
    {event, method, seed, step, nll, tokens, text} a twin and step: `text` is the mean field that its real past led to."""

    trajectory: Sequence[Row] | JsonLines = ()
    mean_field: Sequence[Row] | JsonLines = ()
    likelihood: Sequence[Row] | JsonLines = ()

    def counts(self) -> tuple[int, ...]:
        return len(self.trajectory), len(self.mean_field), len(self.likelihood)


def _expected(states: Sequence[State], twins: Sequence[State], step: int) -> tuple[int, ...]:
    """How many rows of each file `step` makes."""
    acted, told = sum(len(s.indices(step)) for s in states), sum(s.guides(step + 1) for s in states)
    return acted, told, sum(len(twin.indices(step)) > 0 for twin in twins)


def _states(
    worlds: Sequence[World], settings: Settings, intervention: Intervention, likelihood: bool
) -> tuple[list[State], list[State]]:
    """The simulated worlds, and the twins of those of the first seed that have a model."""
    first = min((world.seed for world in worlds), default=0)
    chosen = [w for w in worlds if likelihood and w.seed == first and not w.method.resamples]
    states = [State(world, settings, intervention) for world in worlds]
    return states, [State(world, settings, {}, forced=True) for world in chosen]


def complete_steps(
    worlds: Sequence[World], settings: Settings, rows: tuple[int, ...], likelihood: bool = False
) -> tuple[int, tuple[int, ...]]:
    """How many steps are complete in files of so many `rows` (as `Rows.counts`), and how many rows those steps have."""
    states, twins = _states(worlds, settings, {}, likelihood)
    used: tuple[int, ...] = (0, 0, 0)
    for step in _steps(states):
        after = tuple(map(sum, zip(used, _expected(states, twins, step), strict=True)))
        if any(a > b for a, b in zip(after, rows, strict=True)):
            return step, used
        used = after
    return len(_steps(states)), used


def rollout(
    lm: LanguageModel, worlds: Sequence[World], settings: Settings, annotate: Annotator,
    intervention: Intervention | None = None, done: Rows = Rows(), likelihood: bool = False,
) -> Iterator[Rows]:  # fmt: skip
    """Run all worlds to their ends, yielding the rows of one step at a time.

    done: the rows of an earlier, interrupted run of the same worlds and settings; its complete steps are replayed, not
    computed again, and not yielded. likelihood: run twins that score the real actions (first seed, methods with a model).
    Raises InputError (see `horizon`), and where `done` holds other rows.
    """
    states, twins = _states(worlds, settings, intervention or {}, likelihood)
    events = {state.world.event.id: state for state in states}
    real = {
        name: annotate([action.text for action in state.world.event.actions[: state.count]], state.world.event.language)
        for name, state in events.items()
    }
    earlier = tuple(map(iter, (done.trajectory, done.mean_field, done.likelihood)))
    replayed, _ = complete_steps(worlds, settings, done.counts(), likelihood)
    for step in _steps(states):
        active = [state for state in states if len(state.indices(step)) > 0]
        forced = [twin for twin in twins if len(twin.indices(step)) > 0]
        if step < replayed:
            rows = Rows(*([next(file) for _ in range(n)] for file, n in zip(earlier, _expected(states, twins, step), strict=True)))
            remaining = iter(rows.trajectory)
            phase = ("rollout", "warmup")
            texts = [
                [_said(remaining, {**_key(s), "step": step, "index": i, "phase": phase[i < settings.warmup]}) for i in s.indices(step)]
                for s in active
            ]
        else:
            texts = _act(lm, active, step, settings)
            scores = _score(lm, forced, step, settings)
        texts += [[twin.world.event.actions[i].text for i in twin.indices(step)] for twin in forced]
        labels = [annotate(written, state.world.event.language) for state, written in zip(active + forced, texts, strict=True)]
        actions = []
        for state, written, row in zip(active + forced, texts, labels, strict=True):
            actions.append(state.seen(step, written, row) + state.inserted(step, annotate))
            state.history.update(actions[-1])
        if step < replayed:
            fields, twin_fields = iter(rows.mean_field), iter(rows.likelihood)
            for state in active:
                state.mean_field = _said(fields, {**_key(state), "step": step + 1}) if state.guides(step + 1) else ""
            for twin in forced:
                twin.mean_field = _said(twin_fields, {**_key(twin), "step": step})
            continue
        _update_mean_fields(lm, active + forced, step, actions, settings)
        yield Rows(
            [row for state, some, marks in zip(active, texts, labels) for row in _rows(state, step, some, marks, real)],
            [{**_key(s), "step": step + 1, "text": s.mean_field} for s in active if s.guides(step + 1)],
            [{**_key(t), "step": step, "nll": x, "tokens": n, "text": t.mean_field} for t, (x, n) in zip(forced, scores, strict=True)],
        )


def _said(rows: Iterator[Mapping[str, object]], expected: Row) -> str:
    """The text of an earlier run's next row, which must be of the world, step and action that are expected."""
    row = next(rows)
    text = row.get("text")
    if not isinstance(text, str) or any(row.get(key) != value for key, value in expected.items()):
        raise InputError(f"damaged, cannot resume: a row {row!r:.120} in the place of that of {expected}")
    return text


def _key(state: State) -> Row:
    return {"event": state.world.event.id, "method": state.world.method.name, "seed": state.world.seed}


def _rows(
    state: State, step: int, texts: Sequence[str], labels: Sequence[Mapping[str, str]],
    real: Mapping[str, Sequence[Mapping[str, str]]],
) -> Iterator[Row]:  # fmt: skip
    for i, text, row in zip(state.indices(step), texts, labels, strict=True):
        action = state.world.event.actions[i]
        phase = "warmup" if i < state.settings.warmup else "rollout"
        yield {
            **_key(state), "step": step, "index": i, "agent": action.agent.id, "phase": phase, "text": text,
            "real_text": action.text, "labels": dict(row), "real_labels": dict(real[state.world.event.id][i]),
        }  # fmt: skip
