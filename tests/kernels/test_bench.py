"""The benchmark's cost model by hand, its rivals' results against the kernels', and its command line end to end."""

import json
import math
from dataclasses import replace

import pytest
import torch

from kernels import bench

SMALL = {"agent_attention": bench.Attention(2, 3, 5, 4, 2, 4, 2, 8), "ib_loss": bench.Loss(7, 4, 11)}


def test_work_is_counted_as_by_hand():
    flops, size = SMALL["agent_attention"].work(2)
    keys = (5 + 3) + (5 + 4)  # what the two query rows of an agent see
    assert flops == 6 * 4 * keys * 8 * 4  # agents, heads, keys, head_dim; a score and an average, multiply and add
    assert size == 2 * (2 * 2 * 8 * (2 * 5 + 6 * 4) + 2 * 6 * 4 * 2 * 8)
    backward = replace(SMALL["agent_attention"], backward=True).work(2)
    assert backward == (flops / 2 * 7, size * 3)  # seven products for two
    assert SMALL["ib_loss"].work(4) == (3 * 2 * 7 * 4 * 11, 4 * (11 * 4 + 3 * 7 * 4))


@pytest.mark.parametrize("shape", [*SMALL.values(), replace(SMALL["agent_attention"], backward=True)])
def test_rivals_compute_the_same(shape, monkeypatch):
    monkeypatch.setattr(bench, "compiles", lambda device: False)
    first, *others = (call() for call in shape.calls("cpu", torch.float32).values())
    assert others
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-5)


def test_the_command_prints_and_writes_every_call(kernel_runs):
    output, run = kernel_runs
    names = [row["name"] for row in run["rows"]]
    assert names == ["agent_attention", "SDPA, prefix repeated", "ib_loss", "materialised", "chunked eager"]
    assert "Profiler" not in output, "nothing but the tables"
    assert all(name in output for name in names) and run["copy_bytes_per_second"] > 0
    for row in run["rows"]:
        assert row["milliseconds"] > 0 and row["peak_bytes"] > 0
        assert math.isclose(row["of_bound"] * row["milliseconds"], row["bound_milliseconds"])
    assert run["rows"][0]["ratio"] == run["rows"][2]["ratio"] == 1


@pytest.fixture
def kernel_runs(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "compiles", lambda device: False)
    monkeypatch.setattr(bench, "ceilings", lambda device, dtype: (1e10, 1e11))
    monkeypatch.setattr(bench, "SHAPES", {(kernel, "cpu"): [shape] for kernel, shape in SMALL.items()})
    bench.main(["--json", str(tmp_path / "run.json")])
    said = capfd.readouterr()
    return said.out + said.err, json.loads((tmp_path / "run.json").read_text())
