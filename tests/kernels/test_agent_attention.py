"""agent_attention against an independent oracle (PyTorch's attention, one agent at a time) and its own properties.

Tests that take `path` run in PyTorch and in Triton: on CUDA if there is one, else in Triton's interpreter.
"""

import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import agent_attention
from kernels.agent_attention import Plan, agent_attention_reference

MODULE = sys.modules["kernels.agent_attention"]
ARGUMENTS = ("q", "prefix_k", "prefix_v", "suffix_k", "suffix_v")
# What hypothesis draws for Triton: bfloat16 where it is multiplied, not in the interpreter.
FLOATS = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
NEAR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 3e-2}  # of PyTorch's path
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def make(counts, q_len, prefix, suffix, heads=4, kv_heads=2, head_dim=8, dtype=torch.float64, seed=0, dirty=False):
    """Random inputs: counts[w] agents in world w, lengths drawn up to `prefix` and `suffix`."""
    g = torch.Generator().manual_seed(seed)
    worlds, agents = len(counts), sum(counts)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    case = {
        "q": normal(agents, heads, q_len, head_dim),
        "prefix_k": normal(worlds, kv_heads, prefix, head_dim),
        "prefix_v": normal(worlds, kv_heads, prefix, head_dim),
        "prefix_len": torch.randint(0, prefix + 1, (worlds,), generator=g, dtype=torch.int32),
        "suffix_k": normal(agents, kv_heads, suffix, head_dim),
        "suffix_v": normal(agents, kv_heads, suffix, head_dim),
        "suffix_len": torch.randint(0, suffix + 1, (agents,), generator=g, dtype=torch.int32),
        "world": torch.repeat_interleave(torch.arange(worlds), torch.tensor(counts, dtype=torch.int64)).int(),
    }
    return spoil(case) if dirty else case


def on(device, case):
    return {name: x.to(device) for name, x in case.items()}


def spoil(case):
    """The same case with NaN in every slot and row that does not count."""
    case = dict(case)
    for name in ("prefix", "suffix"):
        size = case[f"{name}_k"].shape[2]
        unused = (torch.arange(size) >= case[f"{name}_len"][:, None])[:, None, :, None]
        for half in "kv":
            case[f"{name}_{half}"] = case[f"{name}_{half}"].masked_fill(unused, torch.nan)
    q_len = case["q"].shape[2]
    padding = case["suffix_len"][:, None] - q_len + torch.arange(q_len) < 0
    case["q"] = case["q"].masked_fill(padding[:, None, :, None], torch.nan)
    return case


def oracle(case, window=None):
    """Agent by agent, row by row: PyTorch's attention over exactly the keys that the contract lets the row see."""
    q = case["q"]
    out = torch.zeros_like(q)
    for agent in range(q.shape[0]):
        w, own = int(case["world"][agent]), int(case["suffix_len"][agent])
        shared = int(case["prefix_len"][w])
        k, v = (
            torch.cat((case[f"prefix_{x}"][w, :, :shared], case[f"suffix_{x}"][agent, :, :own]), dim=1) for x in "kv"
        )
        for i in range(q.shape[2]):
            at = own - q.shape[2] + i
            if at < 0:
                continue
            last = shared + at
            first = 0 if window is None else max(0, last - window + 1)
            row, keys, values = (
                x[None].double() for x in (q[agent, :, i : i + 1], k[:, first : last + 1], v[:, first : last + 1])
            )
            out[agent, :, i] = F.scaled_dot_product_attention(row, keys, values, enable_gqa=True)[0, :, 0].to(q.dtype)
    return out


@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    q_len=st.integers(1, 6),
    prefix=st.integers(0, 9),
    suffix=st.integers(1, 7),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3), (4, 1)]),
    window=st.none() | st.integers(1, 18),
    dirty=st.booleans(),
    cells=st.sampled_from([1, 60, 2**19]),
    head_dim=st.sampled_from([1, 8, 20, 32, 80, 128]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    transposed=st.booleans(),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=200, derandomize=True, deadline=None)
def test_any_shape_equals_the_oracle(
    counts, q_len, prefix, suffix, heads, head_dim, window, dirty, cells, dtype, transposed, seed
):
    """Invariant: whatever the lengths, worlds, heads and window, however the work is cut into pieces, and whatever unused
    slots hold and however keys lie in memory, fast path and reference both give what plain attention over the visible keys
    gives."""
    case = make(counts, q_len, prefix, suffix, *heads, head_dim, dtype, seed)
    expected = oracle({name: x.double() for name, x in case.items()}, window).to(dtype)
    case = spoil(case) if dirty else case
    if transposed:
        case |= {name: x.mT.contiguous().mT for name, x in case.items() if x.dim() == 4}
    before, MODULE.CELLS = MODULE.CELLS, cells
    try:
        fast = agent_attention(**case, window=window)
    finally:
        MODULE.CELLS = before
    near, exact = NEAR[dtype], 8e-3 if dtype == torch.bfloat16 else NEAR[dtype]  # the reference rounds its result alone
    torch.testing.assert_close(fast, expected, rtol=near, atol=near)
    torch.testing.assert_close(agent_attention_reference(**case, window=window), expected, rtol=exact, atol=exact)


@pytest.mark.parametrize("numbers", [1, 1500, 2**21])
@pytest.mark.parametrize("q_len", [1, 20])
def test_a_prefill_and_a_step_in_pieces_equal_the_oracle(monkeypatch, numbers, q_len):
    """float32 with no empty prefix: the flash kernel's path, an agent at a time, a few at a time, all at once."""
    case = make([3, 1, 4], q_len, 9, 20, seed=2) | {"prefix_len": torch.tensor([9, 4, 7], dtype=torch.int32)}
    expected = oracle(case).float()
    monkeypatch.setattr(MODULE, "WARM", numbers)
    out = agent_attention(**{name: x.float() if x.is_floating_point() else x for name, x in case.items()})
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


TRITON = {
    "counts": st.lists(st.integers(0, 3), min_size=1, max_size=3),
    "q_len": st.sampled_from([1, 1, 3, 17]),
    "prefix": st.sampled_from([0, 1, 40, 150]),
    "suffix": st.sampled_from([1, 8, 70]),
    "heads": st.sampled_from([(1, 1), (6, 1), (4, 2)]),
    "head_dim": st.sampled_from([8, 32, 80, 100, 128]),
    "window": st.sampled_from([None, None, 1, 12, 100]),
    "dirty": st.booleans(),
    "dtype": st.sampled_from(FLOATS),
    "seed": st.integers(0, 10_000),
}


@given(**TRITON)
@settings(
    max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_shape_equals_the_oracle_in_triton(
    triton_device, counts, q_len, prefix, suffix, heads, head_dim, window, dirty, dtype, seed
):
    """Invariant: the same of the Triton kernels, whatever tiles are left ragged."""
    case = make(counts, q_len, prefix, suffix, *heads, head_dim, dtype, seed)
    expected = oracle(case, window)
    out = agent_attention(**on(triton_device, spoil(case) if dirty else case), window=window).cpu()
    assert out.dtype == dtype and out.shape == expected.shape
    torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCE[dtype])


@given(**TRITON)
@settings(
    max_examples=20, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_gradients_of_any_shape_equal_the_references_in_triton(
    triton_device, counts, q_len, prefix, suffix, heads, head_dim, window, dirty, dtype, seed
):
    """Invariant: whatever the shapes, window and what unused slots hold, gradients to queries, keys and values are the
    reference's in float64, and 0 where a slot is unused."""
    case = make(counts, q_len, prefix, suffix, *heads, head_dim, dtype, seed)
    up = make(counts, q_len, prefix, suffix, *heads, head_dim, dtype, seed + 1)["q"]
    exact = {name: x.double() if x.is_floating_point() else x for name, x in case.items()}
    expected = gradients(agent_attention_reference, exact, up.double(), window)
    found = gradients(agent_attention, on(triton_device, spoil(case) if dirty else case), up.to(triton_device), window)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        size = max(1.0, float(other.abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(one.cpu().double(), other, rtol=0, atol=TOLERANCE[dtype] * size)
    for side in ("prefix", "suffix"):
        unused = torch.arange(case[f"{side}_k"].shape[2]) >= case[f"{side}_len"][:, None]
        for gradient in (found[ARGUMENTS.index(f"{side}_{x}")].cpu() for x in "kv"):
            assert (gradient.transpose(1, 2)[unused] == 0).all()


def gradients(function, case, up, window=None):
    inputs = [case[name].detach().requires_grad_() for name in ARGUMENTS]
    out = function(**case | dict(zip(ARGUMENTS, inputs, strict=True)), window=window)
    return torch.autograd.grad(out, inputs, up, materialize_grads=True)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_dtype_keeps_its_own_precision(path, dtype):
    case = make([3, 0, 2], 4, 12, 6, head_dim=16, dtype=dtype, dirty=True)
    for function in (agent_attention, agent_attention_reference):
        out = function(**on(path, case), window=9).cpu()
        assert out.dtype == dtype
        assert (out.double() - oracle(case, 9).double()).abs().max() < TOLERANCE[dtype]
    up = make([3, 0, 2], 4, 12, 6, head_dim=16, dtype=dtype, seed=1)["q"]
    exact = gradients(agent_attention_reference, {k: x.double() if x.is_floating_point() else x for k, x in case.items()}, up.double())
    for one, other in zip(gradients(agent_attention, on(path, case), up.to(path)), exact, strict=True):
        assert one.dtype == dtype and (one.cpu().double() - other).abs().max() < 4 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("offset", [-100, -15, 100])
def test_gradients_do_not_depend_on_how_far_scores_are_from_zero(path, offset, dtype):
    """Invariant: scores that all lie far above or below 0, where an unused slot's would be, give the gradients that float64 does;
    prefixes end within a tile."""
    case = make([2, 1], 2, 20, 6, head_dim=16, dtype=dtype, seed=6)
    for name in ("q", "prefix_k", "suffix_k"):
        case[name][..., 0] = 4.0 if name == "q" else offset  # times 16**-0.5
    case |= {"prefix_len": torch.tensor([17, 5], dtype=torch.int32), "suffix_len": torch.tensor([6, 2, 3], dtype=torch.int32)}
    up = make([2, 1], 2, 20, 6, head_dim=16, dtype=dtype, seed=7)["q"]
    exact = {name: x.double() if x.is_floating_point() else x for name, x in case.items()}
    expected = gradients(agent_attention_reference, exact, up.double())
    for i, (one, other) in enumerate(zip(gradients(agent_attention, on(path, case), up.to(path)), expected, strict=True)):
        size = abs(offset) if i == 0 else max(1.0, float(other.abs().max()))  # queries': of terms times keys as large as that
        torch.testing.assert_close(one.cpu().double(), other, rtol=0, atol=4 * TOLERANCE[dtype] * size)


@pytest.mark.parametrize("q_len", [1, 6])
@pytest.mark.parametrize("offset", [-100, 60])
def test_bfloat16_is_as_exact_where_scores_are_far_from_zero(path, offset, q_len):
    """Invariant: what is added to all of a row's scores costs no precision, though bfloat16 keeps but three digits of them."""
    case = make([5, 3], q_len, 40, 6, head_dim=32, dtype=torch.bfloat16, seed=8)
    case["prefix_len"] = torch.tensor([37, 12], dtype=torch.int32)
    case["suffix_len"].fill_(6)
    for name in ("q", "prefix_k", "suffix_k"):
        case[name][..., 0] = 4.0 if name == "q" else offset * 32**0.5 / 4
    found, exact = agent_attention(**on(path, case)).cpu().double(), oracle({k: x.double() for k, x in case.items()})
    assert (found - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("function", [agent_attention, agent_attention_reference])
def test_gradients_equal_finite_differences(function, window):
    case = make([2, 1], 3, 4, 3, heads=2, kv_heads=1, head_dim=2, seed=3)
    inputs = [case[name].requires_grad_() for name in ARGUMENTS]
    rest = {name: case[name] for name in case if name not in ARGUMENTS}
    assert torch.autograd.gradcheck(lambda *x: function(**dict(zip(ARGUMENTS, x)), **rest, window=window), inputs)


def test_one_input_alone_can_require_a_gradient(triton_device):
    case = on(triton_device, make([2, 1], 3, 4, 5, dtype=torch.float32, seed=4))
    case["suffix_v"].requires_grad_()
    out = agent_attention(**case)
    (gradient,) = torch.autograd.grad(out.sum(), case["suffix_v"])
    (expected,) = torch.autograd.grad(agent_attention_reference(**case).sum(), case["suffix_v"])
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(agent_attention(**case), out.detach(), rtol=0, atol=TOLERANCE[torch.float32])


def test_gradients_of_the_fast_path_equal_the_references_and_ignore_nan_in_unused_slots():
    weight = make([3, 1, 0, 2], 4, 6, 5, seed=9)["q"]
    gradients = []
    for function in (agent_attention, agent_attention_reference):
        case = make([3, 1, 0, 2], 4, 6, 5, seed=1, dirty=True)
        inputs = [case[name].requires_grad_() for name in ARGUMENTS]
        gradients.append(torch.autograd.grad((function(**case, window=4) * weight).sum(), inputs))
    for fast, reference in zip(*gradients, strict=True):
        assert fast.isfinite().all()
        torch.testing.assert_close(fast, reference, rtol=0, atol=1e-12)


def test_padding_rows_return_zero(path):
    case = on(path, make([2], 4, 3, 5, dtype=torch.float32))
    case["suffix_len"] = torch.tensor([1, 0], dtype=torch.int32, device=path)
    for function in (agent_attention, agent_attention_reference):
        out = function(**case)
        assert (out[0, :, :3] == 0).all() and (out[1] == 0).all() and (out[0, :, 3] != 0).all()


@pytest.mark.parametrize("function", [agent_attention, agent_attention_reference])
@pytest.mark.parametrize(
    "sizes", [([], 1, 4, 3), ([0, 0], 2, 4, 3), ([0, 2, 0], 2, 0, 3), ([1, 2], 2, 4, 0), ([0], 1, 0, 0)]
)
def test_nothing_to_see_is_legal(function, sizes):
    """No worlds, no agents, empty worlds, no prefix slots, no suffix slots: q's shape, whichever input requires a gradient can
    have one, and it is finite."""
    for name in ARGUMENTS:
        case = make(*sizes)
        case[name].requires_grad_()
        out = function(**case)
        assert out.shape == case["q"].shape
        torch.testing.assert_close(out, oracle(case))
        (gradient,) = torch.autograd.grad(out.sum(), case[name])
        assert gradient.shape == case[name].shape and gradient.isfinite().all()


def test_a_prefix_that_nobody_reads_has_a_gradient_of_zero():
    case = make([1, 0, 0], 2, 4, 3)
    case["prefix_len"] = torch.tensor([0, 0, 3], dtype=torch.int32)
    inputs = [case[name].requires_grad_() for name in ARGUMENTS]
    assert not any(torch.autograd.grad(agent_attention(**case).sum(), inputs)[i].any() for i in (1, 2))


def test_a_plan_made_once_serves_many_layers(path):
    case = make([3, 2], 2, 5, 4, dtype=torch.float32, seed=5)
    plan = Plan(4, 2, case["prefix_len"], 5, case["suffix_len"], 4, case["world"], window=3, device=path)
    for scale in (1.0, -2.0):
        layer = {name: x * scale if name in ARGUMENTS else x for name, x in case.items()}
        torch.testing.assert_close(agent_attention(**on(path, layer), window=3, plan=plan).cpu(), oracle(layer, 3))
    with pytest.raises(ValueError, match="plan"):
        agent_attention(**make([3, 3], 2, 5, 4), plan=plan)


@pytest.mark.parametrize(
    "change",
    [
        {"world": torch.tensor([1, 0, 0], dtype=torch.int32)}, {"world": torch.tensor([0, 1, 2], dtype=torch.int32)},
        {"prefix_len": torch.tensor([4, 6], dtype=torch.int32)},
        {"suffix_len": torch.tensor([4, 1, -1], dtype=torch.int32)},
        {"window": 0}, {"window": 2.5},
    ],
)  # fmt: skip
def test_impossible_lengths_are_refused(change):
    with pytest.raises(ValueError):
        agent_attention(**{**make([2, 1], 2, 5, 4), **change})


def shrunk(name, axis):
    """Of the argument `name`, one less along an axis."""
    x = make([2, 1], 2, 5, 4)[name]
    return {name: x.narrow(axis, 0, x.shape[axis] - 1)}


SHAPES = [shrunk(name, axis) for name in ARGUMENTS for axis in ((0, 1, 3) if name == "q" else range(4))]
SHAPES += [shrunk(name, 0) for name in ("prefix_len", "suffix_len", "world")]
SHAPES += [shrunk("prefix_k", i) | shrunk("prefix_v", i) for i in (0, 1, 3)]
SHAPES += [shrunk("suffix_k", i) | shrunk("suffix_v", i) for i in (0, 1, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("change", SHAPES, ids=lambda change: " ".join(f"{name}{list(x.shape)}" for name, x in change.items()))
def test_shapes_that_do_not_fit_together_are_refused(change, dtype):
    """Invariant: not one argument can be of a wrong size along any axis (two prefixes, agents and heads that also divide)
    and be computed with, out of bounds or broadcast; with a plan as without."""
    case = make([2, 1], 2, 5, 4, dtype=dtype)
    plan = Plan(4, 2, case["prefix_len"], 5, case["suffix_len"], 4, case["world"])
    case |= {name: x.to(dtype) if x.is_floating_point() else x for name, x in change.items()}
    for given in (None, plan):
        with pytest.raises(ValueError, match="shapes .* must be"):
            agent_attention(**case, plan=given)


def test_integers_and_other_devices_are_refused():
    case = make([2, 1], 2, 5, 4)
    with pytest.raises(ValueError, match="one device"):
        agent_attention(**case | {"suffix_v": case["suffix_v"].to("meta")})
    with pytest.raises(ValueError, match="floating-point"):
        agent_attention(**case | {"prefix_k": case["prefix_k"].int()})
    for name in ("prefix_len", "suffix_len", "world"):
        with pytest.raises(ValueError, match=f"{name} must hold int32 or int64"):
            agent_attention(**case | {name: case[name].float()})


@pytest.mark.parametrize(
    "other", [{"prefix": 6}, {"suffix": 6}, {"window": 2}, {"window": None}, {"device": "meta"}, {"counts": [2, 1, 0]}]
)
def test_a_plan_for_other_slots_worlds_windows_or_devices_is_refused(other):
    made = {"counts": [2, 1], "prefix": 5, "suffix": 4, "window": 3, "device": "cpu"} | other
    case, lengths = make([2, 1], 2, 5, 4), torch.tensor([4, 1, 3], dtype=torch.int32)
    prefix_len = torch.full((len(made["counts"]),), 5, dtype=torch.int32)
    plan = Plan(4, 2, prefix_len, made["prefix"], lengths, made["suffix"], case["world"], made["window"], made["device"])
    with pytest.raises(ValueError, match="the plan is for"):
        agent_attention(**case, window=3, plan=plan)


def test_windows_that_hide_nothing_are_one_to_a_plan():
    """Invariant: none, and any as wide as the longest prefix and suffix together."""
    case = make([2, 1], 2, 5, 4) | {"prefix_len": torch.tensor([5, 2]).int(), "suffix_len": torch.tensor([4, 1, 3]).int()}
    for planned in (None, 9, 20):
        plan = Plan(4, 2, case["prefix_len"], 5, case["suffix_len"], 4, case["world"], planned)
        for window in (None, 9, 30):
            torch.testing.assert_close(agent_attention(**case, window=window, plan=plan), oracle(case))
        with pytest.raises(ValueError, match="the plan is for"):
            agent_attention(**case, window=8, plan=plan)


@pytest.mark.parametrize("empty", [True, False])
def test_large_scores_do_not_overflow(path, empty):
    case = make([2, 2], 2, 6, 4, dtype=torch.float32, seed=2)
    case = {name: x * 1e3 if name in ("q", "prefix_k", "suffix_k") else x for name, x in case.items()}
    case["prefix_len"] = torch.tensor([0 if empty else 4, 6], dtype=torch.int32)
    out = agent_attention(**on(path, case)).cpu()
    assert out.isfinite().all()
    torch.testing.assert_close(out, oracle(case), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("above", [85.0, 88.5, 90.0])
def test_own_keys_far_above_the_prefix_have_all_the_weight(path, above):
    """Relative to the prefix's, e^88.5 is a float32, twice that is none, and a tenth of it is one again."""
    case = make([1], 1, 1, 2, heads=1, kv_heads=1, head_dim=4, dtype=torch.float32)
    case |= {"prefix_len": torch.ones(1).int(), "suffix_len": torch.full((1,), 2).int(), "q": torch.ones(1, 1, 1, 4)}
    case |= {"prefix_k": torch.zeros(1, 1, 1, 4), "suffix_k": torch.full((1, 1, 2, 4), above / 2), "suffix_v": torch.full((1, 1, 2, 4), 0.1)}
    torch.testing.assert_close(agent_attention(**on(path, case)).cpu(), torch.full((1, 1, 1, 4), 0.1))
