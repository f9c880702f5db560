"""Attention of many agents over what their world shares and over what is their own.

    out_i = softmax(scale * q_i [K_prefix(world(i)) ; K_suffix(i)]^T + mask) [V_prefix(world(i)) ; V_suffix(i)]

All agents of a world read the same prefix, so its keys and values are stored, and should be read, once a world.

Cost, per layer, with h query and g key heads of size d, n agents a world, t query rows an agent, P and S keys in prefix
and suffix, e bytes a number: 4 h d t (P + S) FLOPs an agent, either way. Bytes read: 2 g d e (P + S) an agent if every
agent reads its own copy of the prefix, 2 g d e (P / n + S) if the prefix is read once a world. Decoding (t = 1) is
bound by these bytes, so n agents gain up to n times.

Notable in the fast path:
- Agents are laid out as [worlds, agents a world], so the scores on all prefixes are one batched matrix product.
- In float32 on a CPU each side is one call of PyTorch's flash kernel, which keeps its scores in cache, and the two are joined by
  their log-sum-exps; the few rows of an agent in decode go on from the prefix's by batched products. Elsewhere, and where
  gradients pass, scores on prefix and suffix are laid side by side for one softmax: in bfloat16 up to 5x faster than the CPU's
  flash kernel.
- Unused slots may hold anything. Masked scores have probability exactly 0, so an unused value does harm only if it is
  not finite (0 * NaN). Without gradients the result is computed again from cleaned copies only then, with gradients they
  are always used.
- What depends on lengths alone is a `Plan` (`agent_attention_plan.py`); a model with many layers makes it once and passes it to
  each of them.
"""

import math

import torch
from torch import Tensor

from kernels.agent_attention_plan import Piece, Plan
from kernels.dispatch import runs_triton

CELLS = 2**19  # scores that `_grouped` holds at once (they should fit in cache), unless a single agent has more
WARM = 2**21  # numbers of queries that `_flash` takes at once, so that its intermediate results stay in cache
SAMPLED = 16  # keys of a prefix of which the highest score is what bfloat16's are relative to
FEW = 16  # query rows per agent and key head up to which `_onward` is faster than the flash kernel


def agent_attention_reference(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, prefix_len: Tensor,
    suffix_k: Tensor, suffix_v: Tensor, suffix_len: Tensor, world: Tensor, window: int | None = None,
) -> Tensor:  # fmt: skip
    """`agent_attention` as its definition reads: every agent gets a copy of its prefix. Differentiable, any dtype."""
    agents, heads, q_len, head_dim = q.shape
    prefix_max, suffix_max, dtype = prefix_k.shape[2], suffix_k.shape[2], q.dtype
    world, lengths, own = world.long(), prefix_len.long(), suffix_len.long()[:, None]
    row = own - q_len + torch.arange(q_len, device=q.device)  # [agents, q_len], suffix position of each query row
    padding = row < 0
    before = lengths[world][:, None] if agents else own
    # Every slot's position in prefix and suffix together, [agents, prefix_max + suffix_max]; unused slots stand
    # nowhere.
    slot = torch.arange(prefix_max + suffix_max, device=q.device).expand(agents, -1)
    in_prefix = slot < prefix_max
    used = torch.where(in_prefix, slot < before, slot - prefix_max < own)
    key = torch.where(in_prefix, slot, slot - prefix_max + before)[:, None, :]
    position = (before + row)[:, :, None]
    visible = used[:, None, :] & (key <= position) & ~padding[:, :, None]
    if window is not None:
        visible = visible & (key > position - window)
    compute = torch.promote_types(dtype, torch.float32)
    empty = ~used[:, None, :, None]
    k = torch.cat((prefix_k[world], suffix_k), dim=2).to(compute).masked_fill(empty, 0)
    v = torch.cat((prefix_v[world], suffix_v), dim=2).to(compute).masked_fill(empty, 0)
    k, v = (x.repeat_interleave(heads // prefix_k.shape[1], dim=1) for x in (k, v))
    q = q.to(compute).masked_fill(padding[:, None, :, None], 0)
    scores = (q @ k.transpose(2, 3)) * head_dim**-0.5
    nothing = ~visible.any(dim=-1)[:, None, :, None]  # a softmax over nothing is not a number: such rows are set apart
    scores = scores.masked_fill(~visible[:, None] & ~nothing, -torch.inf)
    if scores.shape[-1]:
        scores = scores.softmax(dim=-1)
    return (scores @ v).masked_fill(nothing, 0).to(dtype)


def agent_attention(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, prefix_len: Tensor,
    suffix_k: Tensor, suffix_v: Tensor, suffix_len: Tensor, world: Tensor, window: int | None = None,
    *, plan: Plan | None = None,
) -> Tensor:  # fmt: skip
    """Grouped-query attention of agents over their world's prefix and their own suffix, scale head_dim**-0.5.

    q [agents, heads, q_len, head_dim]; prefix_k/v [worlds, kv_heads, prefix_max, head_dim]; prefix_len int32 [worlds];
    suffix_k/v [agents, kv_heads, suffix_max, head_dim]; suffix_len int32 [agents]; world int32 [agents],
    non-decreasing. Returns the shape and dtype of q.

    An agent's keys are its world's first prefix_len keys, then its own first suffix_len. Query row i stands at suffix
    position suffix_len - q_len + i and sees all keys up to and including its own; rows at negative positions are
    padding and return 0. With window w, key j is visible to position i iff i - w < j <= i, over prefix and suffix
    together. Unused slots may hold NaN. Differentiable where an input requires grad. Keys and values of another dtype than q's
    are converted. Triton's products are of q's dtype, summed in float32. PyTorch computes float16 in float32. In
    bfloat16 it rounds scores (relative to the highest of a few keys that the row sees, so that a common offset costs no
    precision) before a softmax in float32: the relative error, of norms, is 0.4% where scores spread by one nat and up to 0.8%
    where they spread by 10. Under autocast it computes in autocast's dtype, but for float64.

    plan: what `Plan` makes of the same lengths and window, where many calls share them. Its lengths count then: of those given
    here only the shapes are checked. Raises ValueError for lengths, shapes and devices that do not fit together, and for a
    plan made for others.
    """
    inputs = (q, prefix_k, prefix_v, suffix_k, suffix_v)
    _check(inputs, prefix_len, suffix_len, world)
    agents, heads, q_len, _ = q.shape
    if plan is None:
        plan = Plan(heads, q_len, prefix_len, prefix_k.shape[2], suffix_len, suffix_k.shape[2], world, window, q.device)
    else:
        plan.check(q, prefix_k, suffix_k, window)
    if agents == 0 or q_len == 0 or suffix_k.shape[2] == 0:
        return torch.zeros_like(q) + _nothing(inputs)
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if runs_triton(q):
        if differentiable:
            from kernels.agent_attention_backward import Fused

            return Fused.apply(*inputs, plan)
        from kernels.agent_attention_triton import fused_attention

        return fused_attention(*inputs, plan)[0]
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        # In autocast's dtype, as PyTorch's own attention; off within, as `_grouped` chooses dtypes itself.
        with torch.autocast(q.device.type, enabled=False):
            return _pytorch(plan, inputs, _compute(torch.get_autocast_dtype(q.device.type)), differentiable)
    return _pytorch(plan, inputs, _compute(q.dtype), differentiable)


def _compute(dtype: torch.dtype) -> torch.dtype:
    """What PyTorch's path computes in: a CPU multiplies float16 no faster than float32."""
    return dtype if dtype == torch.bfloat16 else torch.promote_types(dtype, torch.float32)


def _pytorch(plan: Plan, inputs: tuple[Tensor, ...], compute: torch.dtype, differentiable: bool) -> Tensor:
    """inputs: q, prefix_k, prefix_v, suffix_k, suffix_v. The result has q's dtype."""
    q, tensors = inputs[0], [x.to(compute) for x in inputs]
    if not differentiable:
        flash = compute == torch.float32 and q.device.type == "cpu" and plan.sees_prefixes
        out = (_flash if flash else _grouped)(plan, *tensors)
        if math.isfinite(out.sum()):
            return out.to(q.dtype)
    clean = [tensors[0] if plan.padding is None else tensors[0].masked_fill(plan.padding, 0)]
    for x, length in zip(tensors[1:], [plan.lengths[0]] * 2 + [plan.lengths[1]] * 2, strict=True):
        unused = torch.arange(x.shape[2], device=x.device) >= length[:, None]
        clean.append(x.masked_fill(unused[:, None, :, None], 0))
    out = _grouped(plan, *clean).to(q.dtype)
    return out + _nothing(inputs)  # agents may read no prefix, or nobody those of some worlds


def _check(inputs: tuple[Tensor, ...], prefix_len: Tensor, suffix_len: Tensor, world: Tensor) -> None:
    """Raises ValueError where shapes, devices or dtypes are not as `agent_attention` takes them. inputs: its q, prefix_k,
    prefix_v, suffix_k, suffix_v."""
    q, prefix_k, prefix_v, suffix_k, suffix_v = inputs
    rows, shared, own = q.shape, prefix_k.shape, suffix_k.shape
    fits = len(rows) == len(shared) == len(own) == 4 and prefix_v.shape == shared and suffix_v.shape == own
    fits = fits and own[0] == rows[0] and rows[3] == shared[3] == own[3] > 0
    fits = fits and shared[1] == own[1] > 0 and rows[1] > 0 and rows[1] % own[1] == 0
    if not (fits and prefix_len.shape == shared[:1] and suffix_len.shape == world.shape == own[:1]):
        names = ("q", "prefix_k", "prefix_v", "suffix_k", "suffix_v", "prefix_len", "suffix_len", "world")
        found = ", ".join(f"{name} {tuple(x.shape)}" for name, x in zip(names, (*inputs, prefix_len, suffix_len, world), strict=True))
        raise ValueError(
            f"shapes {found} must be q [agents, heads, q_len, head_dim], prefix_k and prefix_v [worlds, kv_heads, prefix_max, "
            "head_dim], suffix_k and suffix_v [agents, kv_heads, suffix_max, head_dim], prefix_len [worlds], suffix_len and "
            "world [agents], with heads a multiple of kv_heads and none of heads, kv_heads and head_dim 0"
        )
    together = q.device == prefix_k.device == prefix_v.device == suffix_k.device == suffix_v.device
    if not together or not all(map(torch.is_floating_point, inputs)):
        found = ", ".join(f"{x.dtype} on {x.device}" for x in inputs)
        raise ValueError(f"queries, keys and values must be floating-point numbers on one device, not {found}")


def _nothing(inputs: tuple[Tensor, ...]) -> Tensor:
    """0, and the gradients to inputs that a result does not depend on are 0 where it is added."""
    return sum((x[:0].sum() for x in inputs), inputs[0].new_zeros(()))


def _grouped(plan: Plan, q: Tensor, prefix_k: Tensor, prefix_v: Tensor, suffix_k: Tensor, suffix_v: Tensor) -> Tensor:
    """One softmax over both sides, piece by piece: any dtype, differentiable."""
    agents, _, q_len, head_dim = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = q.reshape(agents, suffix_k.shape[1], -1, head_dim)  # a key head's queries: group * q_len
    done = []
    for piece in plan.pieces(CELLS):
        some, worlds, prefix = piece.agents, piece.worlds, piece.prefix
        mine, less, level = rows[some], None, None
        ours, known = _by_world(mine, piece), prefix_k[worlds, :, :prefix]
        if q.dtype == torch.bfloat16:  # relative to the highest score of some keys that the row sees
            with torch.no_grad():
                if plan.sees_prefixes:
                    shortest = int(plan.prefix[worlds].min())
                    level = (known[:, :, : shortest : -(-shortest // SAMPLED)] @ ours.mT).amax(dim=2)[..., None]
                    less = _by_agent(level, piece)
                else:  # of its own, which is slower
                    less = _masked(mine @ suffix_k[some].mT, plan, some).amax(dim=-1, keepdim=True)
                    level = _by_world(less, piece)
        own = _masked(_scores(mine, suffix_k[some], less), plan, some)
        if not prefix:
            done.append(own.softmax(dim=-1, dtype=wide).to(own.dtype) @ suffix_v[some])
            continue
        shared = _scores(ours, known, level)
        if piece.mask is not None:
            shared.view(*shared.shape[:2], piece.width, -1, q_len, prefix).add_(piece.mask)
        shares = torch.cat((shared, _by_world(own, piece)), dim=-1).softmax(dim=-1, dtype=wide).to(own.dtype)
        shared = shares[..., :prefix] @ prefix_v[worlds, :, :prefix]
        own = _by_agent(shares[..., prefix:], piece) @ suffix_v[some]
        done.append(_by_agent(shared, piece) + own)
    return _shaped(done[0] if len(done) == 1 else torch.cat(done), q, plan)


def _masked(own: Tensor, plan: Plan, some: slice) -> Tensor:
    """Scores on some agents' own keys, -inf where they are not seen."""
    if plan.suffix_mask is not None:
        own.view(*own.shape[:2], -1, plan.shape[2], own.shape[3]).add_(plan.suffix_mask[some])
    return own


def _scores(q: Tensor, k: Tensor, less: Tensor | None) -> Tensor:
    """head_dim**-0.5 (q @ k.mT - less), where less, if any, has a number for each row, which a softmax does not notice. In
    bfloat16 sums are rounded only after that: scores that are all near it lose nothing by being far from 0."""
    start, scale = q.new_zeros(()) if less is None else less.flatten(0, 1), q.shape[-1] ** -0.5
    made = torch.baddbmm(start, q.flatten(0, 1), k.flatten(0, 1).mT, beta=0 if less is None else -scale, alpha=scale)
    return made.view(*q.shape[:3], k.shape[2])


def _flash(plan: Plan, q: Tensor, prefix_k: Tensor, prefix_v: Tensor, suffix_k: Tensor, suffix_v: Tensor) -> Tensor:
    """Prefixes, and the agents' own keys but for few rows (`_onward`), by PyTorch's flash kernel for CPUs; no windows, no empty
    prefixes (a row that sees nothing has no softmax)."""
    agents, heads, q_len, head_dim = q.shape
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the one that also returns log-sum-exps
    # It reads a head's numbers as neighbours, wherever they are.
    inputs = (q, prefix_k, prefix_v, suffix_k, suffix_v)
    q, prefix_k, prefix_v, suffix_k, suffix_v = (x if x.stride(-1) == 1 else x.contiguous() for x in inputs)
    rows = q.reshape(agents, suffix_k.shape[1], -1, head_dim)  # a key head's queries: group * q_len
    out = rows.new_empty(rows.shape)
    for piece in plan.pieces(WARM // head_dim * (int(plan.prefix.max()) + plan.suffix_max)):
        some, worlds, prefix = piece.agents, piece.worlds, piece.prefix
        mask = None if piece.mask is None else piece.mask[:, :, 0, 0]  # [worlds, 1, 1, prefix]
        known = prefix_k[worlds, :, :prefix], prefix_v[worlds, :, :prefix]
        shared, shared_sum = attend(_by_world(rows[some], piece), *known, attn_mask=mask)
        shared, shared_sum = _by_agent(shared, piece), _by_agent(shared_sum[..., None], piece)
        mask = None
        if plan.suffix_mask is not None:  # [agents, 1, 1, q_len, suffix], for the group's heads one below the other
            mask = plan.suffix_mask[some].expand(-1, -1, rows.shape[2] // q_len, -1, -1).flatten(2, 3)
        if rows.shape[2] <= FEW or plan.suffix_max == 1:  # of a single key the flash kernel makes 0 even of NaN
            _onward(shared, shared_sum, rows[some], suffix_k[some], suffix_v[some], mask, out[some])
        else:
            own, own_sum = attend(rows[some], suffix_k[some], suffix_v[some], attn_mask=mask)
            torch.lerp(own, shared, torch.sigmoid(shared_sum - own_sum[..., None]), out=out[some])
    return _shaped(out, q, plan)


def _onward(shared: Tensor, shared_sum: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor) -> None:
    """Continue softmaxes over prefixes, given by their averages and log-sum-exps, over the agents' own keys by batched products,
    into `out`. Several times as fast as the flash kernel for the few rows that an agent has in decode.

    Weights are relative to the prefix's, whose sum is 1 then. Where theirs overflows (a score 88 nats above all of the prefix), the
    result is NaN, and `agent_attention` computes it again in another way."""
    start = -shared_sum if mask is None else mask - shared_sum
    start = start.expand(*q.shape[:3], k.shape[2]).flatten(0, 1)
    weights = torch.baddbmm(start, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=q.shape[-1] ** -0.5).exp_()
    total = torch.baddbmm(shared.flatten(0, 1), weights, v.flatten(0, 1))
    whole = weights.sum(dim=-1, keepdim=True).add_(1)
    whole.masked_fill_(whole == torch.inf, torch.nan)  # what is divided by inf may be finite
    torch.div(total, whole, out=out.view_as(total))


def _shaped(out: Tensor, q: Tensor, plan: Plan) -> Tensor:
    out = out.reshape(q.shape)
    return out if plan.padding is None else out.masked_fill(plan.padding, 0)


def _by_world(x: Tensor, piece: Piece) -> Tensor:
    """[agents, kv_heads, rows, n] -> [worlds, kv_heads, width * rows, n]"""
    x = x if piece.slots is None else x[piece.slots]
    return x.reshape(-1, piece.width, *x.shape[1:]).transpose(1, 2).flatten(2, 3)


def _by_agent(x: Tensor, piece: Piece) -> Tensor:
    """[worlds, kv_heads, width * rows, n] -> [agents, kv_heads, rows, n]"""
    worlds, kv_heads, rows, n = x.shape
    x = x.view(worlds, kv_heads, piece.width, rows // piece.width, n).transpose(1, 2).flatten(0, 1)
    return x if piece.back is None else x[piece.back]
