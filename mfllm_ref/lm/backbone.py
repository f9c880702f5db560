"""The transformer: qwen2, qwen3, llama and mistral are one decoder with a few switches.

Notable:
- Parameters carry Hugging Face's names, so a checkpoint loads with no translation.
- `attend` is the one opening: whoever calls `forward` may take over attention (the engine its shared-prefix cache,
  pretraining its block mask). The backbone itself keeps no cache and no mask.
- Precision: norms are computed in at least float32 and cast back, and RoPE angles, cosines and sines in float32, both as
  transformers does. In a float64 model the norms stay in float64, where transformers drops to float32: a float32 sum
  would make a row's result depend on the batch it is in, and float64 is here so that it does not.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfllm_ref.errors import InputError

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q, k, v) -> out, the shape of q

# What each family assumes for a key its config.json leaves out.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
    "llama": {"num_key_value_heads": None, "max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
}
ARCHITECTURES = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama", "mistral": "Mistral"}
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# Sizes are bounded, so that a damaged file is refused before anything is built; other sizes: 2**20.
LARGEST = {
    "num_hidden_layers": 1000, "vocab_size": 2**24, "num_attention_heads": 2**14, "num_key_value_heads": 2**14,
    "head_dim": 2**14, "max_position_embeddings": 2**40, "sliding_window": 2**40,
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """The shape of a backbone. Sizes are counts; `windows` holds one sliding window (or None) per layer."""

    model_type: str
    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, float] | None  # llama3's four parameters
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    windows: tuple[int | None, ...]
    max_positions: int

    @classmethod
    def from_json(cls, config: dict[str, Any], where: str) -> "Config":
        """A parsed config.json, as published (rope_theta, rope_scaling) or as transformers 5 writes it (rope_parameters,
        layer_types). `where` names the file in errors. Raises InputError on whatever this backbone does not compute."""
        read = _Reader(config, where)
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise InputError(f"{where}: model_type {model_type!r} is not one of {', '.join(FAMILIES)}")
        default = FAMILIES[model_type]
        if config.get("hidden_act", "silu") != "silu":
            raise InputError(f"{where}: hidden_act {config['hidden_act']!r} is not supported, only 'silu'")
        if config.get("quantization_config") is not None:
            raise InputError(f"{where}: quantization_config is not supported, weights must be plain floats")
        dim, heads, layers = (read.size(key) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
        kv_heads = read.size("num_key_value_heads", default["num_key_value_heads"] or heads, null=heads)
        head_dim = read.size("head_dim", default.get("head_dim", dim // heads), null=default.get("head_dim", dim // heads))
        if heads % kv_heads:
            raise InputError(f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        if config.get("head_dim") is None and "head_dim" not in default and dim % heads:
            raise InputError(f"{where}: hidden_size {dim} is not a multiple of num_attention_heads {heads}")
        if head_dim % 2:
            raise InputError(f"{where}: head_dim {head_dim} is odd, rotary embedding needs an even one")
        max_positions = read.size("max_position_embeddings", default["max_position_embeddings"])
        rope_theta, rope_scaling = read.rope(max_positions)
        attention_bias = model_type in ("llama", "qwen3") and read.flag("attention_bias")
        return cls(
            model_type=model_type, vocab_size=read.size("vocab_size"), dim=dim, layers=layers, heads=heads,
            kv_heads=kv_heads, head_dim=head_dim, intermediate=read.size("intermediate_size"),
            norm_eps=read.number("rms_norm_eps", 1e-6), rope_theta=rope_theta, rope_scaling=rope_scaling,
            qkv_bias=attention_bias or model_type == "qwen2", o_bias=attention_bias,
            mlp_bias=model_type == "llama" and read.flag("mlp_bias"), qk_norm=model_type == "qwen3",
            tied=read.flag("tie_word_embeddings"), windows=read.windows(model_type, layers), max_positions=max_positions,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """The config.json of this backbone in the published layout, which transformers 4 and 5 both read."""
        widths = {window for window in self.windows if window is not None}
        if len(widths) > 1 or (self.model_type == "mistral" and len(set(self.windows)) > 1):
            raise ValueError(f"config.json cannot express these sliding windows: {self.windows}")
        config = {
            "architectures": [f"{ARCHITECTURES[self.model_type]}ForCausalLM"], "model_type": self.model_type,
            "vocab_size": self.vocab_size, "hidden_size": self.dim, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "intermediate_size": self.intermediate, "hidden_act": "silu", "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta, "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": self.tied,
        }  # fmt: skip
        config["rope_scaling"] = None if self.rope_scaling is None else {"rope_type": "llama3", **self.rope_scaling}
        if self.model_type in ("llama", "qwen3"):
            config["attention_bias"] = self.o_bias
        if self.model_type == "llama":
            config["mlp_bias"] = self.mlp_bias
        else:
            config["sliding_window"] = min(widths, default=None)
        if self.model_type in ("qwen2", "qwen3"):
            config["use_sliding_window"] = bool(widths)
            config["layer_types"] = ["full_attention" if w is None else "sliding_attention" for w in self.windows]
            full = [i for i, w in enumerate(self.windows) if w is None]
            config["max_window_layers"] = max(full, default=-1) + 1  # for readers that know no layer_types
        return config


class _Reader:
    """Typed access to a parsed config.json: every complaint names the file and the key."""

    def __init__(self, config: dict[str, Any], where: str) -> None:
        if not isinstance(config, dict):
            raise InputError(f"{where}: a JSON object was expected, not {type(config).__name__}")
        self.config, self.where = config, where

    def size(self, key: str, default: int | None = None, null: int | None = None) -> int:
        value = self.config.get(key, default)
        value = null if value is None else value
        largest = LARGEST.get(key, 2**20)
        if type(value) is not int or not 1 <= value <= largest:
            raise InputError(f"{self.where}: {key} must be an integer from 1 to {largest}, not {value!r:.60}")
        return value

    def number(self, key: str, default: float | None = None, table: dict[str, Any] | None = None) -> float:
        value = (self.config if table is None else table).get(key, default)
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise InputError(f"{self.where}: {key} must be a positive number, not {value!r:.60}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.config.get(key, False)
        if type(value) is not bool:
            raise InputError(f"{self.where}: {key} must be true or false, not {value!r:.60}")
        return value

    def rope(self, max_positions: int) -> tuple[float, dict[str, float] | None]:
        """(theta, llama3 parameters or None); a non-empty rope_scaling wins over rope_parameters."""
        key = "rope_scaling" if self.config.get("rope_scaling") else "rope_parameters"
        rope = self.config.get(key) or {}
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise InputError(f"{self.where}: {key} must be one flat JSON object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3"):
            raise InputError(f"{self.where}: {key} of type {kind!r:.60} is not supported, only 'default' and 'llama3'")
        for table in (rope, self.config):
            if table.get("partial_rotary_factor", 1.0) not in (None, 1.0):
                raise InputError(f"{self.where}: partial_rotary_factor {table['partial_rotary_factor']!r} is not supported")
        theta = self.number("rope_theta", self.config.get("rope_theta", 10_000.0), table=rope)
        if kind == "default":
            return theta, None
        original = "original_max_position_embeddings"
        rope = {original: max_positions, **rope, **({original: self.config[original]} if original in self.config else {})}
        scaling = {name: self.number(name, table=rope) for name in LLAMA3_KEYS}
        if scaling["low_freq_factor"] == scaling["high_freq_factor"]:
            raise InputError(f"{self.where}: {key}: low_freq_factor and high_freq_factor must differ")
        return theta, scaling

    def windows(self, model_type: str, layers: int) -> tuple[int | None, ...]:
        config, default = self.config, FAMILIES[model_type].get("sliding_window")
        if model_type == "llama":
            return (None,) * layers
        if model_type == "mistral":
            return (None if config.get("sliding_window", default) is None else self.size("sliding_window", default),) * layers
        types = config.get("layer_types")
        if types is None:
            first = config.get("max_window_layers", 28)
            if type(first) is not int:
                raise InputError(f"{self.where}: max_window_layers must be an integer, not {first!r:.60}")
            sliding = self.flag("use_sliding_window") and config.get("sliding_window", 4096) is not None
            types = ["sliding_attention" if sliding and i >= first else "full_attention" for i in range(layers)]
        kinds = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != layers or any(kind not in kinds for kind in types):
            raise InputError(f"{self.where}: layer_types must hold {layers} entries, each one of {', '.join(kinds)}")
        if "sliding_attention" not in types:
            return (None,) * layers
        if not self.flag("use_sliding_window"):
            raise InputError(f"{self.where}: layer_types asks for sliding_attention but use_sliding_window is false")
        window = self.size("sliding_window", 4096)
        return tuple(window if kind == "sliding_attention" else None for kind in types)


class Linear(nn.Linear):
    """nn.Linear left uninitialised: `Backbone` fills all weights in one place, and not at all when built on the meta device,
    where PyTorch's random initialisers would first import 150 MB of compiler."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """nn.Embedding left uninitialised, for the same reason."""

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
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rope_frequencies(config: Config) -> Tensor:
    """float32 [head_dim / 2], radians per position (RoFormer), with llama3's rescaling: wavelengths that fitted the original
    context fewer than low_freq_factor times are stretched by `factor`, short ones kept, those between interpolated."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is None:
        return frequencies
    factor, low, high, context = (config.rope_scaling[key] for key in LLAMA3_KEYS)
    turns = context * frequencies / (2 * math.pi)  # how often a wavelength fits in the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequencies / factor + keep * frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x [batch, heads, time, head_dim] with cos, sin [batch or 1, 1, time, head_dim]: dimension i turns with
    dimension i + head_dim / 2."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Softmax attention over one's own and earlier rows; with a window w, row i sees rows j with i - w < j <= i.
    q [batch, heads, time, head_dim], k/v [batch, kv_heads, time, head_dim] -> the shape of q. Rows, not positions, decide."""
    time = q.shape[2]
    if window is None or window >= time:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    visible = torch.ones(time, time, dtype=torch.bool, device=q.device).tril().triu(1 - window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.window = layer, config.head_dim, config.windows[layer]
        q_dim, kv_dim = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = Linear(config.dim, q_dim, bias=config.qkv_bias)
        self.k_proj = Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.v_proj = Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.o_proj = Linear(q_dim, config.dim, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend | None) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)  # under autocast q, k and v must leave here in one dtype
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
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
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """A decoder-only language model. Built with random weights (normal, deviation 0.02; biases 0), ready for training;
    `checkpoint.load_backbone` builds one from files."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": Embedding(config.vocab_size, config.dim),
            "layers": nn.ModuleList(Layer(config, layer) for layer in range(config.layers)),
            "norm": RMSNorm(config.dim, config.norm_eps),
        })  # fmt: skip
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

    def hidden(self, ids: Tensor, positions: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        """ids int64 [batch, time] -> final hidden states [batch, time, dim], after the last norm.

        positions: int64 [batch, time] or [time], default 0, 1, ...; they only turn queries and keys (RoPE).
        attend: called once a layer as attend(layer, q, k, v) with q [batch, heads, time, head_dim] and k, v
            [batch, kv_heads, time, head_dim], all after bias, q/k norm and RoPE; returns the attention output, the shape of
            q, with scale head_dim**-0.5. The layer's sliding window (`config.windows[layer]`) is then the caller's business.
            Default: causal attention within each row, with that window.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
        if self._frequencies.device != ids.device:
            self._frequencies = self._frequencies.to(ids.device)
        angles = positions[..., None].float() * self._frequencies
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(-3)  # [batch or nothing, heads = 1, time, head_dim]
        x = self.model.embed_tokens(ids)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.model.layers:
            x = layer(x, cos, sin, attend)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head applied to hidden states [..., dim] -> [..., vocab]."""
        return self.lm_head(hidden)
