"""The benchmark's cost model by hand, its rivals' results against the kernels', and its command line end to end."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import bench, bench_shapes

SMALL = {"agent_attention": bench_shapes.Attention(2, 3, 5, 4, 2, 4, 2, 8), "ib_loss": bench_shapes.Loss(7, 4, 11)}


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
    monkeypatch.setattr(bench_shapes, "compiles", lambda device: False)
    first, *others = (call() for call in shape.calls("cpu", torch.float32).values())
    assert others
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-5)


class Products(TorchDispatchMode):
    """Notes the dtypes of all matrix products."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if "mm" in str(function):
            self.dtypes.add(arguments[0].dtype)
        return function(*arguments, **named or {})


def test_ib_losses_rivals_multiply_in_the_tensors_own_dtype_and_one_in_little_memory(monkeypatch):
    """Invariant: no rival is slowed by products in float32, and one of them needs under 1 GB at the GPU's shape of 151,936
    words: here a hundredth of them, 1,519, and of the memory."""
    monkeypatch.setattr(bench_shapes, "compiles", lambda device: False)
    calls = bench_shapes.Loss(1024, 16, 1519).calls("cpu", torch.bfloat16)
    for name in ("materialised", "chunked eager"):
        with Products() as products:
            calls[name]()
        assert products.dtypes == {torch.bfloat16}, name
    assert bench.peak_bytes(calls["chunked eager"], "cpu") < 1e9 / 100


def test_a_rival_that_fails_is_left_out_with_its_reason_and_the_kernel_is_not(capsys):
    def fail():
        raise RuntimeError("no compiler\nsecond line")

    able = bench_shapes.runnable({"kernel": lambda: 1, "rival": fail, "other": lambda: 2})
    assert list(able) == ["kernel", "other"]
    assert capsys.readouterr().out == "rival: left out, RuntimeError: no compiler\n"
    with pytest.raises(RuntimeError):
        bench_shapes.runnable({"kernel": fail})


def test_a_failure_of_flex_attention_leaves_it_out(monkeypatch, capsys):
    def fail(*arguments, **named):
        raise NotImplementedError("not here")

    monkeypatch.setattr(bench_shapes, "compiles", lambda device: True)
    monkeypatch.setattr(bench_shapes, "create_block_mask", fail)
    calls = SMALL["agent_attention"].calls("cpu", torch.float32)
    assert list(calls) == ["agent_attention", "SDPA, prefix repeated"]
    assert "NotImplementedError: not here" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["--json", "."], ["--json", "no/such/folder/run.json"], ["--json"], ["other"], ["--rounds", "3"]]
)
def test_bad_arguments_are_one_line_before_anything_is_measured(arguments, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "ceilings", None)  # measuring would fail
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments)
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == "" and len(said.err.splitlines()) == 1, said.err


def test_an_interrupted_run_keeps_what_it_measured(small_runs, monkeypatch, capsys):
    measure = bench.measure

    def once(shape, *rest):
        if isinstance(shape, bench_shapes.Loss):
            raise KeyboardInterrupt
        return measure(shape, *rest)

    monkeypatch.setattr(bench, "measure", once)
    assert bench.main(["--json", str(small_runs)]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert [row["name"] for row in json.loads(small_runs.read_text())["rows"]] == ["agent_attention", "SDPA, prefix repeated"]


def test_a_disk_that_fills_up_is_one_line(small_runs, capsys):
    """And a call that is refused leaves no file."""
    assert bench.main(["--json", "/dev/full"]) == 2
    assert capsys.readouterr().err.splitlines() == ["python -m kernels.bench: /dev/full: No space left on device"]
    with pytest.raises(SystemExit):
        bench.main(["--json", str(small_runs), "nonsense"])
    assert not small_runs.exists()


def test_the_cost_model_is_printed_and_written_for_gpu_shapes_too(monkeypatch, capsys):
    """Those of the issue: 32 worlds of 256 agents, decode."""
    first = bench.models(("agent_attention", "ib_loss"), ("cuda",))[0]
    agents = 32 * 256
    assert first["flops"] == 4 * 12 * 128 * (2048 + 64) * agents
    assert first["bytes"] == 2 * (2 * 2 * 128 * (32 * 2048 + 64 * agents) + 2 * 12 * 128 * agents)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == sum(len(shapes) for (_, device), shapes in bench.SHAPES.items() if device == "cuda")
    assert "106.3 GFLOP, 654.3 MB" in said[0]


def test_the_command_prints_and_writes_every_call(kernel_runs):
    output, run = kernel_runs
    names = [row["name"] for row in run["rows"]]
    assert names == ["agent_attention", "SDPA, prefix repeated", "ib_loss", "materialised", "chunked eager"]
    assert "Profiler" not in output, "nothing but the tables"
    assert all(name in output for name in names) and run["copy_bytes_per_second"] > 0
    for row in run["rows"]:
        assert row["milliseconds"] > 0 and row["peak_bytes"] > 0
        assert row["flops"] > 0 and row["bytes"] > 0
        assert math.isclose(row["of_bound"] * row["milliseconds"], row["bound_milliseconds"])
    assert [model["kernel"] for model in run["models"]] == ["agent_attention", "ib_loss"]
    assert run["rows"][0]["ratio"] == run["rows"][2]["ratio"] == 1


@pytest.fixture
def small_runs(tmp_path, monkeypatch):
    """The benchmark made small; a file for it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench_shapes, "compiles", lambda device: False)
    monkeypatch.setattr(bench, "ceilings", lambda device, dtype: (1e10, 1e11))
    monkeypatch.setattr(bench, "SHAPES", {(kernel, "cpu"): [shape] for kernel, shape in SMALL.items()})
    return tmp_path / "run.json"


@pytest.fixture
def kernel_runs(small_runs, capfd):
    assert bench.main(["--json", str(small_runs)]) == 0
    said = capfd.readouterr()
    return said.out + said.err, json.loads(small_runs.read_text())
