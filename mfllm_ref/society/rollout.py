"""The mean-field loop: all worlds (event x method x seed) step in lockstep, a step of B agents at a time.

One step, for every world at once: read the signal m_t, let the step's agents act given it (the first W actions of an event
are the real ones), annotate what they wrote, and update the population: the history that the simple signals are read from,
and, for methods with a mean-field model, m_{t+1} ~ mu(. | c, m_t, s_t, a_t). Generations of all worlds that use the same
adapters are one batch. Nothing of a real action after the warm-up is read, but who acts next (profile and reach).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mfllm_ref.errors import InputError
from mfllm_ref.lm import LanguageModel
from mfllm_ref.society import prompts
from mfllm_ref.society.events import Event, action_ids, hashed
from mfllm_ref.society.signals import History, Seen

Annotator = Callable[[Sequence[str], str], list[dict[str, str]]]
Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class Method:
    """What an agent is told (`signal`) and which adapters write its action and its mean field; None is the bare backbone."""

    name: str
    signal: str  # "none", "recent", "popular", "empirical" or "mean-field"
    policy: str | None = None
    mean_field: str | None = None
    resamples: bool = False  # no model: actions are drawn from the warm-up's


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("state", "none"),
        Method("recent", "recent"),
        Method("popular", "popular"),
        Method("persistence", "none", resamples=True),
        Method("empirical", "empirical"),
        Method("mf-llm-no-ib", "mean-field"),
        Method("sft", "none", policy="sft"),
        Method("recent-sft", "recent", policy="recent-sft"),
        Method("popular-sft", "popular", policy="popular-sft"),
        Method("empirical-sft", "empirical", policy="empirical-sft"),
        Method("mf-llm-no-ib-policy", "mean-field", mean_field="mean-field"),
        Method("mf-llm-no-ib-mf", "mean-field", policy="policy-no-ib-mf"),
        Method("mf-llm", "mean-field", policy="policy", mean_field="mean-field"),
    )
}


@dataclass(frozen=True, slots=True)
class Settings:
    """How a rollout runs. `agents` counts an event's actions, warm-up included; None means all of them."""

    agents: int | None = None
    batch: int = 10
    warmup: int = 50
    seed: int = 0
    action_tokens: int = 48
    summary_tokens: int = 120
    chat: bool = False


@dataclass(frozen=True, slots=True)
class World:
    """One simulation: an event under a method, with the seed of its noise."""

    event: Event
    method: Method
    seed: int


# Inserted actions, step -> (profile, text) of each: the intervention file of DESIGN section 3.
Intervention = Mapping[int, Sequence[tuple[str, str]]]


def horizon(event: Event, settings: Settings) -> int:
    """How many of the event's actions the rollout covers.

    Raises InputError where the warm-up leaves nothing to simulate.
    """
    count = len(event.actions) if settings.agents is None else min(settings.agents, len(event.actions))
    if settings.warmup >= count:
        raise InputError(f"event {event.id}: --warmup {settings.warmup} leaves none of its {count} actions to simulate")
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
        self.history = History(settings.batch)
        self.mean_field = ""  # m_t, empty before the first update

    def indices(self, step: int) -> range:
        return range(step * self.settings.batch, min((step + 1) * self.settings.batch, self.count))

    def guides(self, step: int) -> bool:
        """Whether a mean field is written to guide `step`."""
        return self.world.method.signal == "mean-field" and len(self.indices(step)) > 0

    def posts(self, step: int) -> list[str]:
        """Public posts that everyone has seen by the start of `step`."""
        return [post.text for post in self.world.event.posts if post.index <= step * self.settings.batch]

    def shared(self, step: int) -> str:
        event = self.world.event
        signal = self.history.signal(self.world.method.signal, event.language, self.mean_field)
        return prompts.policy_shared(event.language, event.topic, self.posts(step), signal)

    def policy_prompts(self, step: int, indices: Sequence[int]) -> list[str]:
        event, shared = self.world.event, self.shared(step)
        return [shared + prompts.policy_private(event.language, event.actions[i].agent.profile) for i in indices]

    def seen(self, step: int, texts: Sequence[str], labels: Sequence[Mapping[str, str]]) -> list[Seen]:
        """The step's actions as the population sees them; a simulated one has its author's reach and answers nobody."""
        out = []
        for i, text, row in zip(self.indices(step), texts, labels, strict=True):
            action = self.world.event.actions[i]
            popularity, parent = action.popularity, action.parent
            if i >= self.real:
                popularity, parent = max(action.agent.reach, self.reach.get(action.agent.id, 0.0)), None
            out.append(Seen(self.ids[i], i, action.agent.profile, text, row, popularity, parent))
        return out

    def inserted(self, step: int, annotate: Annotator) -> list[Seen]:
        actions = self.intervention.get(step, ())
        labels = annotate([text for _, text in actions], self.world.event.language) if actions else []
        return [
            Seen(f"inserted#{step}#{k}", None, profile, text, row, 0.0)
            for k, ((profile, text), row) in enumerate(zip(actions, labels, strict=True))
        ]

    def mean_field_prompt(self, step: int, actions: Sequence[Seen]) -> str:
        """The prompt of m_{step+1}; agents are exchangeable, so the order is canonical (by text, then id)."""
        event = self.world.event
        listed = [(a.profile, a.text) for a in sorted(actions, key=lambda a: (a.text, a.id))]
        return prompts.mean_field_prompt(event.language, event.topic, self.posts(step), self.mean_field, listed)


def _prompt(lm: LanguageModel, text: str, settings: Settings) -> str | list[int]:
    return lm.tokenizer.chat([{"role": "user", "content": text}]) if settings.chat else text


def _groups(states: Sequence[State], adapter: Callable[[Method], str | None]) -> list[tuple[str | None, list[int]]]:
    """Indices of `states` by adapter, the bare backbone first: each group is one batch of the language model."""
    names = sorted({adapter(state.world.method) for state in states}, key=lambda name: (name is not None, name or ""))
    return [(name, [k for k, s in enumerate(states) if adapter(s.world.method) == name]) for name in names]


def _steps(states: Sequence[State]) -> range:
    return range(max((-(-state.count // state.settings.batch) for state in states), default=0))


def _act(lm: LanguageModel, states: Sequence[State], step: int, settings: Settings) -> list[list[str]]:
    """The texts of the step's actions in every world: real ones of the warm-up, simulated ones after it."""
    out: list[list[str]] = []
    for state in states:
        out.append([state.world.event.actions[i].text for i in state.indices(step) if i < state.real])
        simulated = [i for i in state.indices(step) if i >= state.real]
        if state.world.method.resamples:
            pool = [action.text for action in state.world.event.actions[: settings.warmup]]
            if not pool:
                raise InputError(f"--warmup 0: method {state.world.method.name} has no actions to draw from")
            out[-1] += [pool[int(_seed(state, step, i) % len(pool))] for i in simulated]
    speaking = [k for k, state in enumerate(states) if not state.world.method.resamples]
    for name, members in _groups([states[k] for k in speaking], lambda method: method.policy):
        texts, worlds, seeds, owners = [], [], [], []
        for k in (speaking[m] for m in members):
            simulated = [i for i in states[k].indices(step) if i >= states[k].real]
            texts += [_prompt(lm, text, settings) for text in states[k].policy_prompts(step, simulated)]
            seeds += [_seed(states[k], step, i) for i in simulated]
            worlds += [k] * len(simulated)
            owners += [k] * len(simulated)
        with lm.adapter(name):
            written = lm.generate(texts, settings.action_tokens, seeds=seeds, stop=("\n",), worlds=worlds)
        for k, text in zip(owners, written, strict=True):
            out[k].append(text.strip())
    return out


def _seed(state: State, step: int, index: int) -> int:
    return hashed(state.world.seed, state.world.event.id, step, state.ids[index])


def _update_mean_fields(
    lm: LanguageModel, states: Sequence[State], step: int, actions: Sequence[list[Seen]], settings: Settings
) -> list[Row]:
    """m_{step+1} of every world that has a mean-field model and a next step to guide."""
    chosen = [k for k, state in enumerate(states) if state.guides(step + 1)]
    rows: dict[int, Row] = {}
    for name, members in _groups([states[k] for k in chosen], lambda method: method.mean_field):
        owners = [chosen[m] for m in members]
        texts = [_prompt(lm, states[k].mean_field_prompt(step, actions[k]), settings) for k in owners]
        seeds = [hashed(states[k].world.seed, states[k].world.event.id, step + 1, "mean field") for k in owners]
        with lm.adapter(name):
            written = lm.generate(texts, settings.summary_tokens, seeds=seeds, stop=("\n",), worlds=owners)
        for k, text in zip(owners, written, strict=True):
            states[k].mean_field = " ".join(text.split())
            rows[k] = {**_key(states[k]), "step": step + 1, "text": states[k].mean_field}
    return [rows[k] for k in chosen]


def _key(state: State) -> Row:
    return {"event": state.world.event.id, "method": state.world.method.name, "seed": state.world.seed}


def rollout(
    lm: LanguageModel | None,
    worlds: Sequence[World],
    settings: Settings,
    annotate: Annotator,
    intervention: Intervention | None = None,
    done: tuple[Sequence[Row], Sequence[Row]] = ((), ()),
) -> Iterator[tuple[list[Row], list[Row]]]:
    """Run all worlds to their ends; yields one (trajectory rows, mean-field rows) a step.

    Rows are DESIGN section 3's. `done` are the rows of an earlier, interrupted run of the same worlds and settings: its
    complete steps are replayed, not computed again, and not yielded. Raises InputError (see `horizon`).
    """
    states = [State(world, settings, intervention or {}) for world in worlds]
    events = {state.world.event.id: state for state in states}
    real = {
        name: annotate([action.text for action in state.world.event.actions[: state.count]], state.world.event.language)
        for name, state in events.items()
    }
    done_rows, done_fields = iter(done[0]), iter(done[1])
    replayed = complete_steps(worlds, settings, len(done[0]), len(done[1]))[0]
    for step in _steps(states):
        active = [state for state in states if len(state.indices(step)) > 0]
        replay = step < replayed
        rows: list[Row] = [next(done_rows) for state in active for _ in state.indices(step)] if replay else []
        texts = _texts(rows, active, step) if replay else _act(lm, active, step, settings)
        actions = []
        for state, written in zip(active, texts, strict=True):
            event = state.world.event
            labels = annotate(written, event.language)
            if not replay:
                rows += _rows(state, step, written, labels, real[event.id])
            actions.append(state.seen(step, written, labels) + state.inserted(step, annotate))
            state.history.update(actions[-1])
        if replay:
            for state in active:
                if state.guides(step + 1):
                    state.mean_field = str(next(done_fields)["text"])
        else:
            yield rows, _update_mean_fields(lm, active, step, actions, settings)


def complete_steps(worlds: Sequence[World], settings: Settings, rows: int, fields: int) -> tuple[int, int, int]:
    """How many steps are complete in files of `rows` trajectory rows and `fields` mean-field rows, and their row counts.

    A step is complete when all its actions and all mean fields they lead to are written.
    """
    states = [State(world, settings, {}) for world in worlds]
    used_rows = used_fields = 0
    for step in _steps(states):
        next_rows = used_rows + sum(len(state.indices(step)) for state in states)
        next_fields = used_fields + sum(state.guides(step + 1) for state in states)
        if next_rows > rows or next_fields > fields:
            return step, used_rows, used_fields
        used_rows, used_fields = next_rows, next_fields
    return len(_steps(states)), used_rows, used_fields


def _texts(rows: Sequence[Row], active: Sequence[State], step: int) -> list[list[str]]:
    remaining = iter(rows)
    return [[str(next(remaining)["text"]) for _ in state.indices(step)] for state in active]


def _rows(
    state: State, step: int, texts: Sequence[str], labels: Sequence[Mapping[str, str]], real: Sequence[Mapping[str, str]]
) -> list[Row]:
    out = []
    for i, text, row in zip(state.indices(step), texts, labels, strict=True):
        action = state.world.event.actions[i]
        phase = "warmup" if i < state.settings.warmup else "rollout"
        out.append({
            **_key(state), "step": step, "index": i, "agent": action.agent.id, "phase": phase, "text": text,
            "real_text": action.text, "labels": dict(row), "real_labels": dict(real[i]),
        })  # fmt: skip
    return out


def teacher_forced(
    lm: LanguageModel, worlds: Sequence[World], settings: Settings, annotate: Annotator
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Score the real actions of the rollout phase under each world's method, the past being real too (DESIGN section 6, nll).

    Yields, a step at a time, (world index, negative log-likelihoods in nats, token counts), end of text included. Methods
    without a model are left out.
    """
    states = [State(world, settings, {}, forced=True) for world in worlds]
    numbers = {id(state): k for k, state in enumerate(states)}
    for step in _steps(states):
        active = [s for s in states if len(s.indices(step)) > 0 and not s.world.method.resamples]
        scored = [s for s in active if s.indices(step)[-1] >= settings.warmup]
        for name, members in _groups(scored, lambda method: method.policy):
            texts, spoken, owners = [], [], []
            for state in (scored[m] for m in members):
                future = [i for i in state.indices(step) if i >= settings.warmup]
                texts += [_prompt(lm, text, settings) for text in state.policy_prompts(step, future)]
                spoken += [prompts.continuation(state.world.event.actions[i].text) for i in future]
                owners += [numbers[id(state)]] * len(future)
            with lm.adapter(name):
                nll = -lm.log_prob(texts, spoken, worlds=owners, end_of_text=True).double().cpu().numpy()
            tokens = np.array([len(lm.tokenizer.encode(text)) + 1 for text in spoken])
            for k in dict.fromkeys(owners):
                mine = np.array(owners) == k
                yield k, nll[mine], tokens[mine]
        actions = []
        for state in active:
            texts = [state.world.event.actions[i].text for i in state.indices(step)]
            actions.append(state.seen(step, texts, annotate(texts, state.world.event.language)))
            state.history.update(actions[-1])
        _update_mean_fields(lm, active, step, actions, settings)

