"""What people look at: the table by method, the picture of a simulation, and the curves of a training run.

Notable: pictures are drawn without pyplot (no window system, no global state) and carry no date or version, so equal
numbers give equal bytes. Colours are Okabe and Ito's, told apart by most colour-blind readers; a method's family has a
colour, its tuned or ablated members have their own dashes, and the names beside the KL panel are the legend.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mfllm_ref.metrics import LABELS, OURS, SHARE_WINDOW, Worlds, label_shares, windows
from mfllm_ref.runs import write_bytes

_FAMILIES = {  # the longest matching name decides
    "state": "#56B4E9", "sft": "#56B4E9", "recent": "#009E73", "popular": "#E69F00", "persistence": "#8C8C8C",
    "empirical": "#CC79A7", "mf-llm": "#D55E00", "mf-llm-no-ib": "#0072B2",
}  # fmt: skip
LOSSES = {"loss": "#0072B2", "dev_loss": "#D55E00"}  # of a training log, and their colours
_DASHES = {"sft": (0, (5, 2)), "-policy": (0, (3, 1, 1, 1)), "-mf": (0, (1, 1))}


def _style(method: str) -> dict:
    family = max((name for name in _FAMILIES if method.startswith(name)), key=len, default="")
    dashes = next((dash for ending, dash in _DASHES.items() if method.endswith(ending)), "-")
    width = 2.4 if method == OURS else 1.3
    return {"color": _FAMILIES.get(family, "#332288"), "linestyle": dashes, "linewidth": width}


# ---- the table -----------------------------------------------------------------------------------------------------


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    cells = ([row[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:])] for row in rows)
    return ["  ".join(row).rstrip() for row in cells]


def markdown(rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown, the first row being its head."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def table(metrics: Mapping) -> str:
    """The measures by method (what metrics.json holds) as plain text, at most 100 columns.

    Means over dimensions; KL and its floor in nats, nll in nats a token.
    """
    compared = bool(metrics["reduction"])
    head = ["method", "KL", "95% interval", "W1", "DTW", "macroF1", "microF1", "nll"]
    rows = [head + ["reduction", "closed"] * compared]
    for method, entry in metrics["methods"].items():
        means = [_number(entry[name]["mean"]) for name in ("kl", "wasserstein", "dtw", "macro_f1", "micro_f1")]
        interval = "-".join(map(_number, entry["kl_ci95"] or ())) or "-"
        against = [_number(metrics[name].get(method), ".0%") for name in ("reduction", "gap_closed")]
        rows.append([method, means[0], interval, *means[1:], _number(entry["nll"])] + against * compared)
    rows.append(["floor", _number(metrics["floor"]["mean"])] + [""] * (len(rows[0]) - 2))
    lines = _aligned(rows)
    rule = "-" * max(map(len, lines))
    lines = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
    if compared:
        lines.append(f"reduction: how far {OURS}'s KL is below the method's; closed: how much of its gap to the floor")
    if metrics["excluded_dimensions"]:
        lines.append("not in the means (real labels hardly vary): " + ", ".join(metrics["excluded_dimensions"]))
    return "\n".join(lines)


def effect_table(intervention: Mapping) -> str:
    """What an intervention changed in the shares of stances, by method and in the true process, as plain text."""
    rows = [["change of stance", *LABELS["stance"]]]
    effects = dict(intervention["effect"])
    if intervention["true_effect"] is not None:
        effects["true process"] = intervention["true_effect"]
    for name, effect in effects.items():
        rows.append([name, *(f"{100 * value:+.1f}" for value in effect["stance"].values())])
    return "\n".join(["", *_aligned(rows), f"percentage points, from step {intervention['from_step']} on"])


# ---- the picture of a simulation -----------------------------------------------------------------------------------


def _paths(worlds: Worlds) -> tuple[dict[str, np.ndarray], int]:
    """Label shares over time, {method or "real": [windows, dimensions, labels]}, and the number of events.

    Windows of SHARE_WINDOW rollout actions, mean over seeds and then over the longer half of the events, as far as all of
    these go: the same events at every place, so that a change of the line is one of populations.
    """
    sizes = {event: len(world.real) for (event, _, _), world in worlds.items()}
    least = sorted(sizes.values())[(len(sizes) - 1) // 2]
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    for (event, method, _), world in worlds.items():
        if sizes[event] < least:
            continue
        whole = max(least // SHARE_WINDOW, 1) * SHARE_WINDOW
        for name, codes in ((method, world.simulated[:whole]), ("real", world.real[:whole])):
            path = label_shares(codes, windows(len(codes), SHARE_WINDOW))
            found.setdefault(name, {}).setdefault(event, []).append(path)
    means = {name: [np.mean(paths, axis=0) for paths in events.values()] for name, events in found.items()}  # over seeds
    return {name: np.mean(some, axis=0) for name, some in means.items()}, len(found["real"])


def _draw_shares(axes: Sequence[Axes], paths: Mapping[str, np.ndarray], excluded: Iterable[str]) -> None:
    middle = (np.arange(len(paths["real"])) + 0.5) * SHARE_WINDOW
    marker = "o" if len(middle) == 1 else None
    for number, (axis, (dimension, labels)) in enumerate(zip(axes, LABELS.items())):
        # one label a dimension keeps a panel of 13 methods readable: the one whose real share moves most
        real = paths["real"][:, number]
        shown = int(np.lexsort((real.mean(0), real.std(0)))[-1])  # or, where none moves, has the largest share
        for method, path in paths.items():
            if method != "real":
                axis.plot(middle, path[:, number, shown], marker=marker, **_style(method))
        axis.plot(middle, paths["real"][:, number, shown], color="black", linewidth=3, marker=marker, zorder=5)
        note = " (not in mean)" if dimension in excluded else ""
        axis.set_title(f"{dimension.replace('_', ' ')}: {labels[shown]}{note}", fontsize=11, loc="left")
        low, high = axis.get_ylim()
        centre, reach = (low + high) / 2, max(high - low, 0.1) / 2  # no panel magnifies less than 10 points
        axis.set_ylim(max(-0.02, centre - reach), min(1.02, centre + reach))
        axis.margins(x=0.02)
        axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%" if 0 <= value <= 1 else "")  # 2.5% may be a tick
        axis.yaxis.set_major_locator(MaxNLocator(5))


def _draw_kl(axis: Axes, metrics: Mapping) -> None:
    methods = list(metrics["methods"])
    means = [metrics["methods"][method]["kl"]["mean"] for method in methods]
    for row, (method, mean) in enumerate(zip(methods, means)):
        if mean is None:
            continue
        style, interval = _style(method), metrics["methods"][method]["kl_ci95"]
        if interval is not None:
            axis.plot(interval, [row, row], color=style["color"], linewidth=5, alpha=0.35, solid_capstyle="butt")
        axis.plot([mean], [row], "o", color=style["color"], markersize=7)
        right = mean if interval is None else max(mean, interval[1])
        axis.annotate(f"{mean:.3f}", (right, row), (6, 0), textcoords="offset points", va="center", fontsize=10)
    bottom = metrics["floor"]["mean"]
    if bottom is not None:
        axis.axvline(bottom, color="black", linewidth=1, linestyle=(0, (4, 3)))
        axis.annotate(f"floor {bottom:.3f}", (bottom, -0.8), (4, 0), textcoords="offset points", va="center")
    for row, name in enumerate([*methods, "real"]):  # the legend: each name beside the line it has in the panels above
        style = _style(name) if name != "real" else {"color": "black", "linewidth": 3}
        at = axis.get_yaxis_transform()
        axis.plot([-0.235, -0.195], [row, row], transform=at, clip_on=False, **style)
        weight = "bold" if name == OURS else "normal"
        axis.text(-0.185, row, name, transform=at, va="center", fontsize=11, weight=weight)
    axis.set_ylim(len(methods) + 0.6, -1.3)
    axis.set_yticks([])
    axis.set_xlim(0, max(1.1 * axis.get_xlim()[1], 0.01))
    axis.set_xlabel("KL(real || simulated) in nats: mean, and 95% interval over events")


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#E5E5E5", linewidth=0.7)
    axis.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> None:
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content, metadata={"Software": None})
    write_bytes(path, content.getvalue())


def figure(worlds: Worlds, metrics: Mapping, path: Path) -> None:
    """Write the picture of a simulation as PNG: label shares over time, real and simulated, and KL by method.

    metrics: what `metrics.evaluate` made of the same worlds.
    """
    paths, events = _paths(worlds)
    methods = len(metrics["methods"])
    with matplotlib.style.context("default"):
        page = Figure(figsize=(15, 8.2 + 0.3 * methods), dpi=100)
        grid = page.add_gridspec(3, 4, height_ratios=(1, 1, 0.25 + 0.12 * methods), hspace=0.34, wspace=0.2)
        page.subplots_adjust(left=0.05, right=0.98, top=0.92, bottom=0.07)
        panels = [page.add_subplot(grid[k // 4, k % 4]) for k in range(len(LABELS))]
        _draw_shares(panels, paths, metrics["excluded_dimensions"])
        for panel in panels[4:]:
            panel.set_xlabel("simulated actions")
        below = page.add_subplot(grid[2, 1:])
        _draw_kl(below, metrics)
        for axis in (*panels, below):
            _plain(axis)
        every = len({event for event, _, _ in worlds})
        count = f"{events} event" + ("s" if events != 1 else "") + (f" of {every}, the longer ones" if events < every else "")
        page.suptitle(f"Label shares over time, real (black) and simulated: mean of {count}", fontsize=14, y=0.975)
        _save(page, path)


# ---- training ------------------------------------------------------------------------------------------------------


def loss_curve(rows: Iterable[Mapping], path: Path) -> None:
    """Write the losses of a training log as PNG: one panel a `stage`, "loss" and "dev_loss" against `step`, each on its own scale.

    rows: of log.jsonl, each with "step", optionally "stage", and those of the losses it has; others, nulls and rows without a
    step are passed over. A key with many points is drawn faintly, with its running median on top. An empty log is an empty picture.
    """
    stages: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in (row for row in rows if "step" in row):
        curves = stages.setdefault(str(row.get("stage", "training")), {})
        for key in LOSSES:
            if row.get(key) is not None:
                curves.setdefault(key, []).append((row["step"], row[key]))
    with matplotlib.style.context("default"):
        count = max(len(stages), 1)
        down, across = -(-count // 4), min(count, 4)
        page = Figure(figsize=(5.2 * across, 3.8 * down), dpi=100, layout="constrained")
        panels = np.atleast_1d(page.subplots(down, across)).ravel()
        for panel, (stage, curves) in zip(panels, stages.items()):
            lines = []
            for number, (key, points) in enumerate(curves.items()):
                # each key has a scale of its own: other data, which may be harder, and much less noise
                axis = panel.twinx() if number else panel
                colour = LOSSES[key]
                steps, values = np.array(points, dtype=float).T
                span = len(values) // 20
                middle = [np.median(values[max(0, k - span) : k + span + 1]) for k in range(len(values))]
                axis.plot(steps, values, color=colour, alpha=0.3)
                lines += axis.plot(steps, middle, color=colour, linewidth=2, marker="" if span else ".", label=key)
                axis.tick_params(axis="y", labelcolor=colour)
                axis.ticklabel_format(useOffset=False)  # "+3.8e3" would stand where the legend does
                _plain(axis)
                axis.spines["right"].set_visible(number > 0)
                axis.grid(visible=not number)
            panel.set_title(stage, loc="left")
            panel.set_xlabel("step")
            panel.locator_params(axis="x", integer=True)
            if lines:
                panel.legend(handles=lines, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0)
        for panel in panels[len(stages) :]:
            panel.set_axis_off()
        _save(page, path)


def slope_table(slopes: Mapping[str, Mapping[str, float]]) -> str:
    """Slopes of response curves, {"before", "after", "truth": {dimension: slope}}, as plain text."""
    rows = [["share acted per share said", *(name.replace("_", " ") for name in LABELS)]]
    rows += [[key, *(f"{some[name]:.2f}" for name in LABELS)] for key, some in slopes.items()]
    return "\n".join(["", *_aligned(rows), ""])


def response(
    curves: Mapping[str, Mapping[str, Sequence[float]]], levels: Sequence[float], names: Mapping[str, str], path: Path
) -> None:  # fmt: skip
    """Write the response curves as PNG: share said by the mean field (`levels`) against share acted, one panel a dimension.

    curves: {"before", "after", "truth": {dimension: shares}}; names: the label that a dimension is watched by.
    """
    styles: dict[str, dict] = {"before": {"color": "#0072B2"}, "after": {"color": "#D55E00", "linewidth": 2.4}, "truth": {"color": "black", "linestyle": "--"}}
    with matplotlib.style.context("default"):
        page = Figure(figsize=(15, 7.4), dpi=100, layout="constrained")
        for axis, (dimension, label) in zip(page.subplots(2, 4).flat, names.items()):
            axis.plot([0, 1], [0, 1], color="#BBBBBB", linewidth=1)
            for key, some in curves.items():
                axis.plot(levels, some[dimension], marker="o", markersize=4, label=key, **styles[key])
            axis.set_title(f"{dimension.replace('_', ' ')}: {label}", fontsize=11, loc="left")
            axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="share said", ylabel="share acted")
            _plain(axis)
        axis.legend(frameon=False)
        page.suptitle("What agents do when told what the population does (grey: they follow it exactly)", fontsize=14)
        _save(page, path)


def information_plane(points: Sequence[Mapping[str, float]], untuned: Mapping[str, float], path: Path) -> None:
    """Write the information plane as PNG: one point a beta, {"beta", "kl", "gain"} in nats a step, beside the untuned mean
    field's. It begins at 0, where a summary holds nothing and tells nothing, so that noise does not look like a trade."""
    with matplotlib.style.context("default"):
        page = Figure(figsize=(7, 5), dpi=100, layout="constrained")
        axis = page.subplots()
        ordered = sorted(points, key=lambda point: point["beta"])
        axis.plot([p["kl"] for p in ordered], [p["gain"] for p in ordered], "o-", color=_FAMILIES["mf-llm"])
        axis.plot(untuned["kl"], untuned["gain"], "o", color=_FAMILIES["persistence"])
        right = 1.15 * max(point["kl"] for point in (untuned, *points))
        # Tuning lowers the KL as a rule, so there is room to the left of its points, but at the edge, and to the right of the other.
        axis.annotate("untuned", (untuned["kl"], untuned["gain"]), (8, -4), textcoords="offset points")
        for k, point in enumerate(ordered):  # below and above in turns, as neighbours may lie close together
            place, label, side = (point["kl"], point["gain"]), f"beta {point['beta']:g}", 1 if point["kl"] < right / 4 else -1
            align = "left" if side > 0 else "right"
            axis.annotate(label, place, (8 * side, 2 if k % 2 else -10), textcoords="offset points", ha=align)
        axis.set_xlabel("KL(mu || r), the bound on I(m; X, c), nats a step")
        axis.set_ylabel("gain in action log-likelihood over the sft policy,\nan estimate of I(m; Y), nats a step")
        axis.set_title("The information plane", loc="left")
        axis.margins(0.15)
        axis.set_xlim(0, right)
        low, high = min(0, axis.get_ylim()[0]), max(0, axis.get_ylim()[1])
        room = 0.05 * (high - low)  # so that no point is cut at the edge
        axis.set_ylim(low - room * (low < 0), high + room * (high > 0))
        _plain(axis)
        _save(page, path)


def scaling(
    agents: Sequence[Mapping[str, float]], worlds: Sequence[Mapping[str, float]], exponents: Mapping[str, float], path: Path
) -> None:
    """Write how rollouts scale as PNG: seconds against agents and against worlds, and memory against agents.

    agents, worlds: rows of `scale.rollout`, one per size. Beside the first stands what telling every agent all previous
    actions would take by arithmetic, at the FLOPs a second that the largest run reached.
    """
    with matplotlib.style.context("default"):
        page = Figure(figsize=(15, 4.6), dpi=100, layout="constrained")
        time, memory, many = page.subplots(1, 3)
        for axis, rows, key, unit in ((time, agents, "agents", "agents"), (many, worlds, "worlds", "worlds")):
            name = f"measured: {key}^{exponents[key]:.2f}" if key in exponents else "measured"
            axis.loglog([r[key] for r in rows], [r["seconds"] for r in rows], "o-", color=_FAMILIES["mf-llm"], label=name)
            axis.set(xlabel=unit, ylabel="seconds")
        largest = max(agents, key=lambda row: row["agents"])
        sizes, pace = [r["agents"] for r in agents], largest["seconds"] / largest["flops"]
        told = [r["told_flops"] * pace for r in agents]
        time.loglog(sizes, told, "--", color=_FAMILIES["persistence"], label="told all previous actions: arithmetic")
        for key, name in (("peak", "with the metrics"), ("rolled", "rollout"), ("loaded", "before it: backbone and event")):
            memory.semilogx(sizes, [r[key] / 1e6 for r in agents], "o-", label=name)
        memory.set(xlabel="agents", ylabel="peak memory, MB")
        memory.set_ylim(0, None)
        many.set_title(f"{worlds[0]['agents']} agents in each world" if worlds else "", loc="left", fontsize=11)
        for axis in (time, memory, many):
            axis.legend(frameon=False)
            _plain(axis)
        _save(page, path)
