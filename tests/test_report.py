"""The table is aligned and says what metrics.json says; pictures are drawn from the rows, always the same bytes."""

import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from mfllm_ref import metrics, report
from mfllm_ref.society.events import DIMENSIONS

ALL = (
    "state recent popular persistence empirical mf-llm-no-ib sft recent-sft popular-sft empirical-sft "
    "mf-llm-no-ib-policy mf-llm-no-ib-mf mf-llm"
).split()


def make_rows(methods, lengths):
    """Random real labels; a method copies one with a chance that grows along `methods`. `rumor` never varies."""
    rng = np.random.default_rng(0)
    rows = []
    for event, length in enumerate(lengths):
        real = [{name: labels[rng.integers(len(labels))] for name, labels in DIMENSIONS.items()} for _ in range(length)]
        for number, method in enumerate(methods):
            for index, truth in enumerate(real):
                truth["rumor"] = "spread"
                copied = rng.random() < number / len(methods)
                labels = truth if copied else {name: labels[-1] for name, labels in DIMENSIONS.items()}
                rows.append({
                    "event": f"e{event}", "method": method, "seed": 0, "step": index // 10, "index": index,
                    "phase": "rollout", "labels": labels, "real_labels": truth,
                })  # fmt: skip
    return rows


def measured(methods, lengths):
    rows = make_rows(methods, lengths)
    nll = {method: 2.5 for method in methods if method != "persistence"}
    domains = {f"e{k}": "news" for k in range(len(lengths))}
    return rows, metrics.evaluate(metrics.collect(rows), domains, nll=nll)


def test_the_table_has_every_method_aligned_within_100_columns():
    _, result = measured(ALL, [60, 80])
    lines = report.table(result).splitlines()
    assert max(map(len, lines)) <= 100
    head, body = lines[0].split(), {line.split()[0]: line.split() for line in lines[2 : 2 + len(ALL)]}
    assert list(body) == ALL and head[:3] == ["method", "KL", "95%"]
    for method, cells in body.items():
        entry = result["methods"][method]
        assert cells[1] == f"{entry['kl']['mean']:.3f}" and cells[5] == f"{entry['macro_f1']['mean']:.3f}"
        assert cells[7] == ("-" if method == "persistence" else "2.500")
    assert body["state"][8] == f"{100 * result['reduction']['state']:.0f}%" and body["mf-llm"][8] == "-"
    ends = {line.index(line.split()[1]) + len(line.split()[1]) for line in lines[2 : 2 + len(ALL)]}
    assert ends == {lines[0].index("KL") + 2}
    floor = next(line for line in lines if line.startswith("floor"))
    assert floor.split()[1] == f"{result['floor']['mean']:.3f}"
    assert "rumor" in lines[-1]


def test_the_table_shows_what_is_null_as_a_dash():
    """One event has no interval; without mf-llm there is nothing to compare, and no column for it."""
    _, result = measured(["state", "persistence"], [40])
    lines = report.table(result).splitlines()
    assert "reduction" not in lines[0]
    assert lines[2].split()[2] == "-" and lines[3].split()[-1] == "-"


@pytest.mark.parametrize("methods, lengths", [(ALL, [60, 80, 45]), (["state"], [7]), (["mf-llm", "mine"], [230])])
def test_the_picture_is_drawn_and_always_the_same(tmp_path, methods, lengths):
    rows, result = measured(methods, lengths)
    report.figure(metrics.collect(rows), result, tmp_path / "a.png")
    report.figure(metrics.collect(rows), result, tmp_path / "b.png")
    first = (tmp_path / "a.png").read_bytes()
    assert first == (tmp_path / "b.png").read_bytes()
    pixels = image.imread(tmp_path / "a.png")
    assert pixels.shape[1] == 1500 and pixels.shape[0] > 800 and pixels[..., :3].std() > 0.05
    assert b"matplotlib" not in first.lower()  # neither version nor date in the file


def test_each_panel_has_every_method_and_the_truth(tmp_path, monkeypatch):
    """The lines are the shares themselves: recomputed from rows for the label that the panel's title names."""
    pages = []
    monkeypatch.setattr(report, "_save", lambda page, path: pages.append(page))
    rows, result = measured(["state", "mf-llm"], [60, 60])
    report.figure(metrics.collect(rows), result, tmp_path / "a.png")
    page: Figure = pages[0]
    assert len(page.axes) == len(DIMENSIONS) + 1
    stance = page.axes[list(metrics.LABELS).index("stance")]
    label = stance.get_title(loc="left").split(": ")[1]
    assert [len(axis.get_lines()) for axis in page.axes[:-1]] == [3] * len(DIMENSIONS)
    drawn = (("state", "labels"), ("mf-llm", "labels"), ("state", "real_labels"))
    for line, (method, side) in zip(stance.get_lines(), drawn, strict=True):
        for window, share in enumerate(line.get_ydata()):
            held = [r[side]["stance"] == label for r in rows if r["method"] == method and r["index"] // 20 == window]
            assert share == pytest.approx(np.mean(held))
    legend = [text.get_text() for text in page.axes[-1].texts if text.get_text() in (*ALL, "real")]
    assert legend == ["state", "mf-llm", "real"]
    assert "not in mean" in page.axes[0].get_title(loc="left")


def test_the_same_events_are_drawn_at_every_place():
    """Populations of which each never changes give level lines, however their lengths differ; a line ends where the shortest event
    of the longer half does."""
    rows = make_rows(["state"], [200, 60, 65])
    first = {row["event"]: row["real_labels"] for row in reversed(rows)}
    worlds = metrics.collect([row | {"real_labels": first[row["event"]]} for row in rows])
    paths, events = report._paths(worlds)
    assert events == 2 and len(paths["real"]) == 3
    assert (paths["real"] == paths["real"][0]).all()


def test_losses_far_from_zero_have_whole_numbers_on_their_axes(tmp_path, monkeypatch):
    """Not what is left behind an offset, which would be written where the legend stands."""
    pages, save = [], report._save
    monkeypatch.setattr(report, "_save", lambda page, path: pages.append(page) or save(page, path))
    report.loss_curve([{"step": k, "loss": 20.0, "dev_loss": 3826 + k / 100} for k in range(5)], tmp_path / "loss.png")
    axis = pages[0].axes[1].yaxis
    assert axis.get_major_formatter().get_offset() == "" and axis.get_ticklabels()[-1].get_text().startswith("3826")


def test_loss_curves_of_stages(tmp_path):
    """One panel a stage; nulls and rows without the key are passed over; an empty log is no error."""
    rng = np.random.default_rng(0)
    rows = [{"stage": "policy", "step": k, "loss": 3 + rng.random() - k / 200, "seconds": 1.0} for k in range(200)]
    rows += [{"stage": "policy", "step": k, "loss": None, "dev_loss": 3.2 - k / 200} for k in range(0, 200, 50)]
    rows += [{"stage": "mean-field", "step": k, "loss": 1.0 / (k + 1)} for k in range(10)]
    for name, log in (("a", rows), ("b", iter(rows)), ("empty", [])):
        report.loss_curve(log, tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert image.imread(tmp_path / "a.png").shape[1] == 1040
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "empty.png").read_bytes()


@pytest.mark.parametrize("points", [
    [(100, 28.2, 4.26), (10, 28.2, 4.26), (1, 3.2, 0.53), (0.1, 2.4, -0.9)], [(30, 0.0, 0.0)], [(10, 24.0, 4.2), (1, 12.4, -1.0)],
])  # fmt: skip
def test_the_information_planes_labels_stand_inside_it(tmp_path, monkeypatch, points):
    """None is written over an axis, however near it its point lies."""
    pages, save = [], report._save
    monkeypatch.setattr(report, "_save", lambda page, path: pages.append(page) or save(page, path))
    named = [dict(zip(("beta", "kl", "gain"), point, strict=True)) for point in points]
    report.information_plane(named, {"kl": 20.5, "gain": 3.3}, tmp_path / "plane.png")
    axis = pages[0].axes[0]
    texts = {text.get_text(): text.get_window_extent() for text in axis.texts}
    assert {*texts} == {"untuned", *(f"beta {beta:g}" for beta, _, _ in points)}
    for name, box in texts.items():
        assert axis.bbox.x0 < box.x0 and box.x1 < axis.bbox.x1 and axis.bbox.y0 < box.y0 and box.y1 < axis.bbox.y1, name
