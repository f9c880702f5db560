"""The transformer: qwen2, qwen3, llama and mistral are one decoder with a few switches.

Notable:
- Parameters carry Hugging Face's names, so a checkpoint loads with no translation.
- `attend` is the one extension point: whoever calls `forward` may take over attention (the engine its shared-prefix cache,
  pretraining its block mask). The backbone itself keeps no cache and no mask.
- Precision: norms are computed in at least float32 and cast back, and RoPE angles, cosines and sines in float32, both
  as transformers does. In a float64 model the norms stay in float64, where transformers drops to float32: a float32
  sum would make a row's result depend on the batch it is in, and float64 is here so that it does not.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfllm_ref.lm.config import LLAMA3_KEYS, Config

PLAIN = 1024  # rows up to which attention is computed with all its scores at once, where that is faster
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q, k, v) -> out, the shape of q


# `Backbone` fills all weights in one place, and none when built on the meta device, where PyTorch's random initialisers
# would first import 150 MB of compiler. So these two leave theirs alone.
class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, in at least float32, cast back before the weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if wide.dtype == x.dtype == self.weight.dtype:  # one pass over memory less
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return self.weight * F.rms_norm(wide, wide.shape[-1:], eps=self.eps).to(x.dtype)


def rope_frequencies(config: Config) -> Tensor:
    """float32 [head_dim / 2], radians per position (RoFormer), with llama3's rescaling: wavelengths that fit the
    original context fewer than low_freq_factor times are stretched by `factor`, those that fit more than
    high_freq_factor times kept, the rest interpolated."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is None:
        return frequencies
    factor, low, high, context = (config.rope_scaling[key] for key in LLAMA3_KEYS)
    turns = context * frequencies / (2 * math.pi)  # how often a wavelength fits in the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequencies / factor + keep * frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x [batch, heads, time, head_dim]: dimension i turns with dimension i + head_dim / 2. cos and sin
    [batch or 1, 1, time, head_dim]; the first half of sin is negated."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Softmax attention over one's own and earlier rows; with a window w, row i sees rows j with i - w < j <= i.
    q [batch, heads, time, head_dim], k/v [batch, kv_heads, time, head_dim] -> the shape of q. Rows decide, not
    positions."""
    time = q.shape[2]
    window = window if window is not None and window < time else None  # a wider one hides nothing
    plain = q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu" and time <= PLAIN
    if window is None and not plain:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    visible = torch.ones(time, time, dtype=torch.bool, device=q.device).tril()
    if window is not None:
        visible = visible.triu(1 - window)
    if plain:
        return plain_attention(q, k, v, torch.zeros_like(visible, dtype=q.dtype).masked_fill_(~visible, -torch.inf))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The same by products of whole matrices, `mask` [time, time] or [batch, 1, time, time] being added to the scores. In
    bfloat16 on a CPU, forward and backward of a training step take 0.7 of the time that PyTorch's flash kernel needs."""
    batch, heads, time, dim = q.shape
    with torch.autocast(q.device.type, enabled=False):
        scores = (q * dim**-0.5).reshape(batch, k.shape[1], -1, dim) @ k.mT
        shares = scores.view(batch, k.shape[1], -1, time, time) + (mask if mask.dim() == 2 else mask[:, :, None])
        return (shares.softmax(dim=-1).view_as(scores) @ v).view_as(q)


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.layer, self.window = layer, config.windows[layer]
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        q_dim, kv_dim = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = Linear(config.dim, q_dim, bias=config.qkv_bias)
        self.k_proj = Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.v_proj = Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.o_proj = Linear(q_dim, config.dim, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend | None, wanted: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        k, v = (proj(x).view(*x.shape[:2], self.kv_heads, self.head_dim) for proj in (self.k_proj, self.v_proj))
        x = x if wanted is None else x[:, wanted]
        q = self.q_proj(x).view(*x.shape[:2], self.heads, self.head_dim)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        k = rotate(k, cos, sin).to(v.dtype)  # under autocast norms and angles are wider than v
        cos, sin = (cos, sin) if wanted is None else (cos[..., wanted, :], sin[..., wanted, :])
        q = rotate(q, cos, sin).to(v.dtype)
        out = causal_attention(q, k, v, self.window) if attend is None else attend(self.layer, q, k, v)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = Linear(config.dim, config.intermediate, bias=config.mlp_bias)
        self.up_proj = Linear(config.dim, config.intermediate, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate, config.dim, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if torch.is_grad_enabled():
            return self.down_proj(F.silu(gate) * up)
        return self.down_proj(F.silu(gate, inplace=True).mul_(up))  # the same numbers, without fresh memory


class Layer(nn.Module):
    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(0.0)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend | None, wanted: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        mixed = self.self_attn(self.input_layernorm(x), cos, sin, attend, wanted)
        x = (x if wanted is None else x[:, wanted]) + self.dropout(mixed)
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Trunk(nn.Module):
    """All but the head, under the names that checkpoints have for it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)


class Backbone(nn.Module):
    """A decoder-only language model. Built with random weights (normal, deviation 0.02; biases 0), ready for training;
    `checkpoint.load_backbone` builds one from files."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = Linear(config.dim, config.vocab_size, bias=False)
        self.tie()
        # A plain attribute, neither parameter nor buffer: `.to(bfloat16)` must not round the angles.
        self._frequencies = rope_frequencies(config)
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                continue
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def tie(self) -> None:
        """Make the head share the embedding's weight, if the configuration says so."""
        if self.config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: Tensor, positions: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        """Next-token logits [batch, time, vocab] in the model's dtype; arguments as in `hidden`."""
        return self.logits(self.hidden(ids, positions, attend))

    def hidden(
        self, ids: Tensor, positions: Tensor | None = None, attend: Attend | None = None, wanted: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """ids int64 [batch, time] -> final hidden states [batch, time, dim], after the last norm.

        positions: int64 [batch, time] or [time], default 0, 1, ...; they only turn queries and keys (RoPE).
        attend: called once a layer as attend(layer, q, k, v) with q [batch, heads, time, head_dim] and k, v
            [batch, kv_heads, time, head_dim], all after bias, q/k norm and RoPE; returns the attention output, in the
            shape of q, with scale head_dim**-0.5. The layer's window (`config.windows[layer]`) is then the caller's
            business. Default: causal attention within each sequence, with that window.
        wanted: int64 [n], the places in `time` whose hidden states are asked for, all by default. Only with `attend`:
            the last layer computes nothing but keys and values elsewhere, and its q is [batch, heads, n, head_dim].
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
        if self._frequencies.device != ids.device:
            self._frequencies = self._frequencies.to(ids.device)
        angles = (positions[..., None].float() * self._frequencies).unsqueeze(-3)  # [batch or nothing, 1, time, half]
        x = self.model.embed_tokens(ids)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        *layers, last = self.model.layers
        for layer in layers:
            x = layer(x, cos, sin, attend)
        return self.model.norm(last(x, cos, sin, attend, wanted))

    def logits(self, hidden: Tensor) -> Tensor:
        """The head applied to hidden states [..., dim] -> [..., vocab]."""
        return self.lm_head(hidden)
