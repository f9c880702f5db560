"""Low-rank adapters (LoRA, arXiv 2106.09685) in PEFT's file format: y = W x + scale * B A x, with W frozen.

Notable:
- The backbone knows nothing of adapters. An active adapter is a set of forward hooks on the linear layers it adapts;
  the bare backbone has none and runs at full speed. So one backbone in memory serves several distributions.
- Adapter weights are float32 even over a bfloat16 backbone (float64 over a float64 one): training needs the digits. The
  sum is taken in that precision and rounded once.
- Which layers an adapter_config.json means follows PEFT's rules. An option that would change the result and is not
  implemented is refused by name, known to this file or not: whatever is not listed as harmless must be off.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfllm_ref import ranks
from mfllm_ref.errors import InputError
from mfllm_ref.lm.backbone import Backbone
from mfllm_ref.lm.checkpoint import locate_tensors, read_object, read_tensor, save_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ALL_LINEAR = "all-linear"  # PEFT's name for every linear layer but the head
HEAD = "base_model.model.lm_head.base_layer.weight"  # PEFT saves the head, too, where an adapter is of it
# What decides the result and is honoured, with PEFT's defaults ...
HONOURED: dict[str, Any] = {
    "r": 8, "lora_alpha": 8, "target_modules": None, "exclude_modules": None, "rank_pattern": {}, "alpha_pattern": {},
    "use_rslora": False, "layers_to_transform": None, "layers_pattern": None,
}  # fmt: skip
# ... what does not decide it (dropout acts in training only, and is not applied in training here) ...
HARMLESS = {
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode",
    "lora_dropout", "init_lora_weights", "megatron_core", "qalora_group_size",
}  # fmt: skip
# ... and everything else must be switched off. Other initialisations than these also move the backbone's own weights.
INITIALISATIONS = (None, True, False, "gaussian", "orthogonal")
OFF: tuple[Any, ...] = (None, False, "none", "", {}, [])


Low = tuple[nn.Parameter, nn.Parameter, float]  # A [rank, in], B [out, rank] and the scale of B A


@dataclass
class Adapter:
    """A set of low-rank updates, by the path of the layer that they adapt."""

    options: dict[str, Any]  # the honoured part of adapter_config.json
    layers: dict[str, Low]


class Adapters:
    """The adapters of one backbone (which is frozen by this): any number by name; one is active, or several on rows of their
    own (`mix`)."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone.requires_grad_(False)
        self.adapters: dict[str, Adapter] = {}
        self.active: str | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._mixtures: list[_Mixture] = []
        self._mixed: tuple[str | None, ...] = ()  # the adapters that `mix` has put to work
        self._merged: dict[str, nn.Parameter] = {}  # the original weights, by layer path, while an adapter is merged

    def add(
        self, name: str, rank: int = 8, alpha: float = 16.0, targets: Sequence[str] | str = ("q_proj", "v_proj"),
        seed: int | None = None, **options: Any,
    ) -> None:  # fmt: skip
        """A fresh trainable adapter that changes nothing yet: A Kaiming-uniform as in nn.Linear (from `seed`, else the
        global generator), B zero, scale alpha / rank. `targets`: layer names or path endings, a regular expression for
        whole paths, or "all-linear"; `options`: more PEFT options (use_rslora, rank_pattern, ...). Raises InputError.
        """
        where, targets = f"adapter {name!r}", targets if isinstance(targets, str) else list(targets)
        for key in options.keys() - HONOURED.keys():
            raise InputError(f"{where}: {key} is not supported")
        options |= {"r": rank, "lora_alpha": alpha, "target_modules": targets, "peft_type": "LORA"}
        generator = None if seed is None else torch.Generator().manual_seed(seed % 2**63)
        layers: dict[str, Low] = {}
        for path, (rank, scale) in self._new(name, options, where).items():
            linear = self._linear(path)
            a = torch.empty(rank, linear.in_features)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            b = torch.zeros(linear.out_features, rank)
            a, b = (t.to(linear.weight.device, _dtype(linear)) for t in (a, b))
            layers[path] = nn.Parameter(a), nn.Parameter(b), scale
        self.adapters[name] = Adapter(_honoured(options), layers)

    def load(self, name: str, path: str | Path, trainable: bool = False) -> None:
        """The adapter in the PEFT folder `path`. Raises InputError, naming option or tensor, if it is damaged, for
        another backbone (a head's adapter may come with the head: then it must be this one's), or uses what is not
        implemented here. A regular expression in target_modules is run as it stands, as PEFT does: one made to take
        forever does."""
        folder = Path(path)
        options = read_object(folder / CONFIG, required=True)
        scales = self._new(name, options, str(folder / CONFIG))
        expected: dict[str, tuple[int, ...]] = {}
        for layer, (rank, _) in scales.items():
            linear = self._linear(layer)
            a, b = _keys(layer)
            expected |= {a: (rank, linear.in_features), b: (linear.out_features, rank)}
        head = self._merged.get("lm_head", self.backbone.lm_head.weight)
        heads = {HEAD: tuple(head.shape)} if "lm_head" in scales else {}
        stored = locate_tensors([folder / WEIGHTS], expected, optional=heads)
        if HEAD in stored and not torch.equal(read_tensor(stored[HEAD], HEAD, heads[HEAD], head.device, head.dtype), head):
            raise InputError(f"{stored[HEAD]}: tensor {HEAD!r} is not the backbone's head")
        layers: dict[str, Low] = {}
        for layer, (_, scale) in scales.items():
            device, dtype = self._linear(layer).weight.device, _dtype(self._linear(layer))
            pair = (read_tensor(stored[key], key, expected[key], device, dtype) for key in _keys(layer))
            low_a, low_b = (nn.Parameter(tensor, requires_grad=trainable) for tensor in pair)
            layers[layer] = low_a, low_b, scale
        self.adapters[name] = Adapter(_honoured(options), layers)

    def save(self, name: str, path: str | Path) -> None:
        """Write the adapter as a PEFT folder (adapter_config.json and adapter_model.safetensors), never half a file. InputError
        where it holds a number that is not finite, which `load` would refuse, or the disk refuses."""
        adapter = self._get(name)
        if not all(bool(tensor.isfinite().all()) for tensor in self.parameters(name)):
            raise InputError(f"{path}: adapter {name!r} holds a number that is not finite, and is not saved")
        config = adapter.options | {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True,
            "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
        }  # fmt: skip
        tensors: dict[str, Tensor] = {}
        for layer, (a, b, _) in adapter.layers.items():
            tensors |= dict(zip(_keys(layer), (a.detach().cpu(), b.detach().cpu()), strict=True))
        save_folder(Path(path), (CONFIG, config), (WEIGHTS, tensors))

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The adapter's A and B, layer by layer, for an optimiser."""
        return [tensor for a, b, _ in self._get(name).layers.values() for tensor in (a, b)]

    def adapts(self, path: str) -> bool:
        """Whether the active adapter changes the module of that path."""
        return self.active is not None and path in self.adapters[self.active].layers

    def activate(self, name: str | None) -> None:
        """Make `name` the one active adapter (None: the bare backbone). Undoes a merge."""
        adapter = None if name is None else self._get(name)
        self.unmerge()
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._mixtures, self._mixed = [], [], ()
        for path, update in adapter.layers.items() if adapter is not None else ():
            self._hooks.append(self.backbone.get_submodule(path).register_forward_hook(_Update(*update)))
        self.active = name

    def merge(self, name: str | None) -> None:
        """Make `name` active by folding scale * B A into the weights: no cost per token, but no gradient either, and
        the sum is rounded to the backbone's dtype. The original weights are kept aside. Weights that are spread over
        processes stay as they are: then it is `activate`."""
        if ranks.in_step():
            return self.activate(name)
        if self._merged and name == self.active:
            return
        self.activate(None)
        if name is None:
            return
        adapter = self._get(name)
        with torch.no_grad():
            for path, (a, b, scale) in adapter.layers.items():
                linear = self._linear(path)
                self._merged[path] = cast(nn.Parameter, linear.weight)
                merged = (linear.weight.to(a.dtype) + (b @ a) * scale).to(linear.weight.dtype)
                linear.weight = nn.Parameter(merged, requires_grad=False)  # new: a tied embedding keeps the old one
        self.active = name

    def mix(self, names: Sequence[str | None], rows: np.ndarray) -> None:
        """Let several adapters work on one batch [rows, ..., dim], each on rows of its own: rows [rows], indices into
        `names`. No gradient. A single one stays as it is, merged or not. `activate` ends it."""
        if len(names) == 1:
            return
        index = torch.from_numpy(rows).to(self.backbone.lm_head.weight.device)
        if self._mixed != tuple(names):
            adapters = [Adapter({}, {}) if name is None else self._get(name) for name in names]
            self.activate(None)
            for path in dict.fromkeys(path for adapter in adapters for path in adapter.layers):
                linear = self._linear(path)
                updates = {i: adapter.layers[path] for i, adapter in enumerate(adapters) if path in adapter.layers}
                self._mixtures.append(_Mixture(updates, linear.weight))
                self._hooks.append(linear.register_forward_hook(self._mixtures[-1]))
            self._mixed = tuple(names)
        for mixture in self._mixtures:
            mixture.gate = (index[:, None] == mixture.owner).to(mixture.a.dtype)

    def unmerge(self) -> None:
        """Put the original weights (the very tensors, so every bit) back after `merge`; then no adapter is active."""
        if self._merged:
            self.active = None
        for path, weight in self._merged.items():
            self._linear(path).weight = weight
        self._merged = {}

    def _linear(self, path: str) -> nn.Linear:
        return cast(nn.Linear, self.backbone.get_submodule(path))

    def _get(self, name: str) -> Adapter:
        if name not in self.adapters:
            raise InputError(f"no adapter named {name!r} (there are: {', '.join(map(repr, self.adapters)) or 'none'})")
        return self.adapters[name]

    def _new(self, name: str, options: Any, where: str) -> dict[str, tuple[int, float]]:
        if name in self.adapters:
            raise InputError(f"an adapter named {name!r} exists already")
        return resolve(self.backbone, options, where)


class _Update:
    """The forward hook of one adapted linear layer: adds scale * B A x to its output."""

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        self.a, self.b, self.scale = a, b, scale

    def __call__(self, linear: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
        return (out + F.linear(F.linear(inputs[0].to(self.a.dtype), self.a) * self.scale, self.b)).to(out.dtype)


class _Mixture:
    """The forward hook of a linear layer under several adapters: all A's are stacked, all B's laid side by side, and
    what a row has of the others' A x is multiplied by 0 in between. In the layer's own dtype."""

    gate: Tensor  # [rows, owner]: 1 where the row is of the adapter that owns this row of `a`

    def __init__(self, updates: Mapping[int, Low], weight: Tensor) -> None:
        self.a = torch.cat([a.detach() for a, _, _ in updates.values()]).to(weight.dtype)
        self.b = torch.cat([b.detach() * scale for _, b, scale in updates.values()], dim=1).to(weight.dtype).T
        self.owner = torch.tensor([i for i, (a, _, _) in updates.items() for _ in a], device=weight.device)

    def __call__(self, linear: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
        own = F.linear(inputs[0].flatten(0, -2), self.a) * self.gate
        return torch.addmm(out.flatten(0, -2), own, self.b).view_as(out)


def _keys(path: str) -> tuple[str, str]:
    """The names PEFT stores a layer's A and B under."""
    return f"base_model.model.{path}.lora_A.weight", f"base_model.model.{path}.lora_B.weight"


def _dtype(linear: nn.Linear) -> torch.dtype:
    return torch.promote_types(linear.weight.dtype, torch.float32)


def _honoured(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: options.get(key, default) for key, default in HONOURED.items()}


def resolve(backbone: Backbone, options: Any, where: str) -> dict[str, tuple[int, float]]:
    """What an adapter_config.json means for this backbone: layer path -> (rank, scale). Raises InputError, beginning
    with `where`, on options that are invalid, unsupported or match no layer."""
    if not isinstance(options, dict) or options.get("peft_type") != "LORA":
        raise InputError(f"{where}: peft_type must be 'LORA'")
    for key, value in options.items():
        if key not in HONOURED and key not in HARMLESS and not any(value == off for off in OFF):
            raise InputError(f"{where}: {key} = {value!r:.80} is not supported")
    if options.get("init_lora_weights") not in INITIALISATIONS:
        raise InputError(f"{where}: init_lora_weights = {options['init_lora_weights']!r:.80} is not supported")
    options = _honoured(options)
    if type(options["use_rslora"]) is not bool:
        raise InputError(f"{where}: use_rslora must be true or false")
    try:
        layers = {}
        for path, module in backbone.named_modules():
            if not _targeted(path, module, options):
                continue
            if not isinstance(module, nn.Linear):
                raise InputError(f"{where}: target_modules matches {path!r}, which is not a linear layer")
            rank = _pattern(options["rank_pattern"] or {}, path, options["r"])
            alpha = _pattern(options["alpha_pattern"] or {}, path, options["lora_alpha"])
            if type(rank) is not int or rank < 1:
                raise InputError(f"{where}: the rank of {path} must be a positive integer, not {rank!r:.80}")
            if type(alpha) not in (int, float) or not abs(alpha) < 1e30:
                raise InputError(f"{where}: lora_alpha of {path} must be a finite number, not {alpha!r:.80}")
            layers[path] = (rank, alpha / (math.sqrt(rank) if options["use_rslora"] else rank))
    except (re.error, TypeError, AttributeError) as error:  # a pattern that does not compile, a value of a wrong type
        raise InputError(f"{where}: invalid target or pattern option ({error})") from error
    if not layers:
        raise InputError(f"{where}: target_modules {options['target_modules']!r:.80} matches no layer of this backbone")
    return layers


def _targeted(path: str, module: nn.Module, options: Mapping[str, Any]) -> bool:
    """PEFT's rule: exclusions first; a string is a regular expression for the whole path; a list holds whole paths or
    their endings, and only endings are narrowed by layers_to_transform."""
    targets, indices = options["target_modules"], options["layers_to_transform"]
    if options["exclude_modules"] and _named(path, options["exclude_modules"]):
        return False
    if isinstance(targets, str):
        if indices is not None or options["layers_pattern"] is not None:
            raise TypeError("layers_to_transform and layers_pattern need target_modules to be a list")
        if targets.lower() == ALL_LINEAR:
            return isinstance(module, nn.Linear) and path != "lm_head"
        return _named(path, targets)
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise TypeError("target_modules must be a string or a list of strings")
    if options["layers_pattern"] and indices in (None, []):
        raise TypeError("layers_pattern needs layers_to_transform")
    if path in targets or not _named(path, targets) or indices is None or indices == []:
        return _named(path, targets)
    patterns = options["layers_pattern"] or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    matches = (re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", path) for pattern in patterns)
    found = next((match for match in matches if match is not None), None)
    return found is not None and int(found["index"]) in ([indices] if isinstance(indices, int) else indices)


def _named(path: str, names: str | Sequence[str]) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return path in names or any(path.endswith(f".{name}") for name in names)


def _pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that matches the path or an ending of it that follows a dot."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)
