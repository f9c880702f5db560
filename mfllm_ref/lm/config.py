"""The shape of a backbone, read from and written to config.json.

Notable: both layouts in the wild are read, the one published checkpoints carry (rope_theta, rope_scaling) and the one
transformers 5 writes (rope_parameters, layer_types). Whatever the backbone does not compute is refused, never ignored.
"""

from dataclasses import dataclass
from typing import Any

from mfllm_ref.errors import InputError

# What each family assumes for a key that its config.json leaves out.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"class": "Qwen2", "num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"class": "Qwen3", "num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
    "llama": {"class": "Llama", "max_position_embeddings": 2048},
    "mistral": {"class": "Mistral", "num_key_value_heads": 8, "max_position_embeddings": 131072},
}
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
LAYER_TYPES = ("full_attention", "sliding_attention")
# Sizes are bounded, so that a damaged file is refused before anything is built; all others: 2**20.
LARGEST = {
    "num_hidden_layers": 1000, "vocab_size": 2**24, "num_attention_heads": 2**14, "num_key_value_heads": 2**14,
    "head_dim": 2**14, "max_position_embeddings": 2**40, "sliding_window": 2**40,
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Sizes are counts; `windows` holds each layer's sliding window in tokens, None where attention is full."""

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
        """From a parsed config.json. Raises InputError, beginning with `where`, on what we do not compute."""
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise InputError(f"{where}: model_type {model_type!r:.60} is not one of {', '.join(FAMILIES)}")
        if config.get("hidden_act", "silu") != "silu":
            raise InputError(f"{where}: hidden_act {config['hidden_act']!r:.60} is not supported, only 'silu'")
        if config.get("quantization_config") is not None:
            raise InputError(f"{where}: quantization_config is not supported, weights must be plain floats")
        family, read = FAMILIES[model_type], _Reader(config, where)
        dim, heads, layers = (read.size(key) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
        kv_heads = read.size("num_key_value_heads", family.get("num_key_value_heads", heads), null=heads)
        if heads % kv_heads:
            raise InputError(f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
        if config.get("head_dim") is None and "head_dim" not in family and dim % heads:
            raise InputError(f"{where}: hidden_size {dim} is not a multiple of num_attention_heads {heads}")
        usual = family.get("head_dim", dim // heads)
        head_dim = read.size("head_dim", usual, null=usual)
        if head_dim % 2:
            raise InputError(f"{where}: head_dim {head_dim} is odd, rotary embedding needs an even one")
        max_positions = read.size("max_position_embeddings", family["max_position_embeddings"])
        rope_theta, rope_scaling = read.rope(max_positions)
        attention_bias = model_type in ("llama", "qwen3") and read.flag("attention_bias")
        return cls(
            model_type=model_type, vocab_size=read.size("vocab_size"), dim=dim, layers=layers, heads=heads,
            kv_heads=kv_heads, head_dim=head_dim, intermediate=read.size("intermediate_size"),
            norm_eps=read.number("rms_norm_eps", 1e-6), rope_theta=rope_theta, rope_scaling=rope_scaling,
            qkv_bias=attention_bias or model_type == "qwen2", o_bias=attention_bias,
            mlp_bias=model_type == "llama" and read.flag("mlp_bias"), qk_norm=model_type == "qwen3",
            tied=read.flag("tie_word_embeddings"), windows=read.windows(model_type, layers),
            max_positions=max_positions,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """The config.json of this backbone, in the published layout, which transformers 4 and 5 both read."""
        widths = {window for window in self.windows if window is not None}
        if len(widths) > 1 or (self.model_type == "mistral" and len(set(self.windows)) > 1):
            raise ValueError(f"config.json cannot express these sliding windows: {self.windows}")
        config = {
            "architectures": [FAMILIES[self.model_type]["class"] + "ForCausalLM"], "model_type": self.model_type,
            "vocab_size": self.vocab_size, "hidden_size": self.dim, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "intermediate_size": self.intermediate, "hidden_act": "silu", "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta, "max_position_embeddings": self.max_positions,
            "rope_scaling": None if self.rope_scaling is None else {"rope_type": "llama3", **self.rope_scaling},
            "tie_word_embeddings": self.tied,
        }  # fmt: skip
        if self.model_type in ("llama", "qwen3"):
            config["attention_bias"] = self.o_bias
        if self.model_type == "llama":
            config["mlp_bias"] = self.mlp_bias
        else:
            config["sliding_window"] = min(widths) if widths else None
        if self.model_type in ("qwen2", "qwen3"):
            config["use_sliding_window"] = bool(widths)
            config["layer_types"] = [LAYER_TYPES[window is not None] for window in self.windows]
            # For readers that know no layer_types; where full and sliding layers alternate, it cannot be expressed.
            full = [layer for layer, window in enumerate(self.windows) if window is None]
            config["max_window_layers"] = max(full, default=-1) + 1
        return config


class _Reader:
    """Typed access to a parsed config.json: every complaint names the file and the key."""

    def __init__(self, config: dict[str, Any], where: str) -> None:
        self.config, self.where = config, where

    def size(self, key: str, default: int | None = None, null: int | None = None) -> int:
        value = self.config.get(key, default)
        value = null if value is None else value
        largest = LARGEST.get(key, 2**20)
        if type(value) is not int or not 1 <= value <= largest:
            raise InputError(f"{self.where}: {key} must be an integer from 1 to {largest}, not {value!r:.60}")
        return value

    def number(self, key: str, default: float | None = None, table: dict[str, Any] | None = None) -> float:
        value: Any = (self.config if table is None else table).get(key, default)
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise InputError(f"{self.where}: {key} must be a positive number, not {value!r:.60}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.config.get(key, False)
        if type(value) is not bool:
            raise InputError(f"{self.where}: {key} must be true or false, not {value!r:.60}")
        return value

    def rope(self, max_positions: int) -> tuple[float, dict[str, float] | None]:
        """(theta, llama3 parameters or None). As in transformers, a non-empty rope_scaling wins over rope_parameters,
        and a context length beside the table wins over the one in it."""
        config, where = self.config, self.where
        key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
        rope = config.get(key) or {}
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise InputError(f"{where}: {key} must be one flat JSON object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3"):
            raise InputError(f"{where}: {key} of type {kind!r:.60} is not supported, only 'default' and 'llama3'")
        if any(table.get("partial_rotary_factor") not in (None, 1.0) for table in (rope, config)):
            raise InputError(f"{where}: partial_rotary_factor other than 1 is not supported")
        theta = self.number("rope_theta", config.get("rope_theta", 10_000.0), table=rope)
        if kind == "default":
            return theta, None
        context = {LLAMA3_KEYS[3]: max_positions} | rope | {k: config[k] for k in LLAMA3_KEYS[3:] if k in config}
        scaling = {name: self.number(name, table=context) for name in LLAMA3_KEYS}
        if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            raise InputError(f"{where}: {key}: low_freq_factor must be below high_freq_factor")
        return theta, scaling

    def windows(self, model_type: str, layers: int) -> tuple[int | None, ...]:
        config = self.config
        if model_type == "llama":
            return (None,) * layers
        if model_type == "mistral":
            window = None if config.get("sliding_window", 4096) is None else self.size("sliding_window", 4096)
            if config.get("layer_types") not in (None, [LAYER_TYPES[window is not None]] * layers):
                raise InputError(f"{self.where}: layer_types of a mistral that are not all alike are not supported")
            return (window,) * layers
        sliding = self.flag("use_sliding_window") and config.get("sliding_window", 4096) is not None
        types, first = config.get("layer_types"), config.get("max_window_layers", 28)
        if types is None:
            if type(first) is not int:
                raise InputError(f"{self.where}: max_window_layers must be an integer, not {first!r:.60}")
            types = [LAYER_TYPES[sliding and i >= first] for i in range(layers)]
        if not isinstance(types, list) or len(types) != layers or any(kind not in LAYER_TYPES for kind in types):
            raise InputError(f"{self.where}: layer_types must hold {layers} entries of {' or '.join(LAYER_TYPES)}")
        if "sliding_attention" in types and not sliding:
            raise InputError(f"{self.where}: layer_types asks for sliding_attention, but no sliding window is in use")
        return tuple(self.size("sliding_window", 4096) if kind == "sliding_attention" else None for kind in types)
