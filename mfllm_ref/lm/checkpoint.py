"""Hugging Face style checkpoint folders: config.json + safetensors, one file or shards with an index. Never pickle.

Notable:
- Strict: the configuration says which tensors there must be, and the files must hold exactly those, in those shapes,
  finite. All but the values is compared before memory is taken: the module is first built on the meta device.
- Frugal: a tensor is mapped, converted and checked in pieces of a few megabytes straight into its final place, and the
  mapping is closed after each piece, because mapped pages count as memory too. Peak growth is the weights themselves in
  the requested dtype, and little more.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mfllm_ref import ranks
from mfllm_ref.errors import InputError
from mfllm_ref.fields import an_object, read_json
from mfllm_ref.lm.backbone import Backbone, Config

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IGNORED = "rotary_emb.inv_freq"  # a buffer old checkpoints carry; it follows from the configuration
FLOATS = ("F64", "F32", "F16", "BF16")
PIECE = 2**24  # bytes mapped at a time
LARGEST_JSON = 2**28  # bytes


def load_backbone(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Backbone:
    """The backbone stored in the folder `path`, in eval mode with every parameter frozen, on `device` in `dtype`.

    Raises InputError, naming file and tensor, if the folder is not a complete, valid checkpoint of a supported family.
    """
    folder = Path(path)
    if dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise InputError(f"dtype {dtype}: a backbone computes in torch.float64, float32, float16 or bfloat16")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such kind of device, or PyTorch was built without it
        raise InputError(f"device {str(device)!r}: {str(error).splitlines()[0]}") from None
    if not folder.is_dir():
        raise InputError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    config = Config.from_json(read_object(folder / CONFIG, required=True), str(folder / CONFIG))
    with torch.device("meta"):
        backbone = Backbone(config)
    expected = {name: tuple(tensor.shape) for name, tensor in backbone.named_parameters()}  # a tied head counts once
    index = _index(folder)
    files = sorted({folder / entry for entry in index.values()}) or [folder / WEIGHTS]
    optional = {HEAD: expected[EMBEDDING]} if config.tied else {}
    stored = locate_tensors(files, expected, optional, ignored=lambda name: name.endswith(IGNORED))
    for name, entry in index.items():
        if stored.get(name, folder).name != entry and not name.endswith(IGNORED):
            raise InputError(f"{folder / entry}: missing tensor {name!r}, which {INDEX} says is here")
    if config.tied and HEAD in stored:
        _compare(stored, HEAD, EMBEDDING)
    tensors = {name: read_tensor(stored[name], name, shape, device, dtype) for name, shape in expected.items()}
    backbone.load_state_dict(tensors, assign=True, strict=False)  # strictness is above; a tied head is not in `tensors`
    backbone.tie()
    return backbone.eval().requires_grad_(False)


def shard(backbone: Backbone, device: str | torch.device) -> Backbone:
    """Spread a frozen backbone's layers over all processes, and put the rest on `device` (FSDP2). A layer's weights come
    together when it runs and are let go when it has run; embedding and head stay whole. Every process must then run the
    same passes: they share no other work from here on. Raises InputError where there is only one process."""
    if ranks.world_size() == 1:
        raise InputError("--shard: there is one process only, and nothing to spread weights over (see torchrun)")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    def gathering(layer: FSDPModule) -> Callable[..., None]:
        # FSDP brings weights back for a gradient that comes through a layer's output; that of a prefix comes through keys
        # and values alone, which `attend` takes out of the layer's middle.
        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            if out.requires_grad:
                out.register_hook(lambda gradient: layer.unshard())

        return hook

    mesh = init_device_mesh(torch.device(device).type, (ranks.world_size(),))
    for layer in backbone.model.layers:
        spread = fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(gathering(spread))
    ranks.keep_step()
    return backbone.to(device)


def save_backbone(
    backbone: Backbone, path: str | Path, dtype: torch.dtype = torch.bfloat16, extra: Mapping[str, Any] | None = None
) -> None:
    """Write `backbone` to the folder `path` as config.json and model.safetensors, weights in `dtype`, a tied head left
    out. `extra` entries (eos_token_id, say) are added to config.json. Each file appears complete or not at all."""
    name = str(dtype).removeprefix("torch.")
    config = backbone.config.to_json() | {"torch_dtype": name, "dtype": name} | dict(extra or {})
    tensors = {key: tensor.detach().to("cpu", dtype) for key, tensor in backbone.named_parameters()}
    save_folder(Path(path), (CONFIG, config), (WEIGHTS, tensors))


def read_object(path: Path, required: bool = False, unique: bool = False) -> dict[str, Any]:
    """The JSON object in one of a checkpoint's files; {} where one that is not `required` is not there. Raises InputError if
    it is missing or damaged (`unique`: or a key occurs twice)."""
    if not required and not path.is_file():
        return {}
    return an_object(read_json(path, unique, LARGEST_JSON), str(path), "it")


def _index(folder: Path) -> dict[str, str]:
    """Which file holds which tensor, as the index of a sharded checkpoint says; {} if there is a whole file, which
    wins, or neither."""
    index = folder / INDEX
    if (folder / WEIGHTS).exists() or not index.exists():
        return {}
    weight_map = read_object(index, unique=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: no weight_map")
    for name, entry in weight_map.items():
        # Anything but a bare name could reach outside the folder. (A symbolic link is the user's own: it is followed.)
        if not isinstance(entry, str) or entry in ("", ".", "..") or any(mark in entry for mark in "/\\\0"):
            raise InputError(f"{index}: the entry {entry!r:.80} of tensor {name!r} is not a bare file name")
    return weight_map


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """A memory-mapped safetensors file (its header is validated on opening), with its errors made InputErrors."""
    if not os.path.isfile(file):  # False too for names that no file can have
        raise InputError(f"{file}: no such file")
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: damaged or not a safetensors file ({error})") from error


def locate_tensors(
    files: Sequence[Path], expected: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]] | None = None, ignored: Callable[[str], bool] = lambda name: False,
) -> dict[str, Path]:  # fmt: skip
    """Which of `files` holds which tensor, after checking that together they hold each `expected` tensor (name ->
    shape) once, perhaps the `optional` ones, no other but `ignored` names, all floats. Reads headers only."""
    shapes = {**(optional or {}), **expected}
    stored: dict[str, Path] = {}
    for file in files:
        with open_tensors(file) as handle:
            for name in handle.keys():
                if ignored(name):
                    continue
                if name in stored:
                    raise InputError(f"{file}: duplicate tensor {name!r}, also in {stored[name].name}")
                if name not in shapes:
                    raise InputError(f"{file}: unexpected tensor {name!r}")
                shape, dtype = handle.get_slice(name).get_shape(), handle.get_slice(name).get_dtype()
                if tuple(shape) != tuple(shapes[name]):
                    raise InputError(f"{file}: tensor {name!r} has shape {shape}, not {list(shapes[name])}")
                if dtype not in FLOATS:
                    raise InputError(f"{file}: tensor {name!r} is of dtype {dtype}, not one of {', '.join(FLOATS)}")
                stored[name] = file
    missing = [name for name in expected if name not in stored]
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(f"{files[0] if len(files) == 1 else files[0].parent}: missing tensor {missing[0]!r}{others}")
    return stored


def _pieces(file: Path, name: str) -> Iterator[tuple[slice, Tensor]]:
    """A tensor's rows as mapped pieces of about PIECE bytes; each is valid until the next is asked for."""
    start, rows = 0, 1
    while start < rows:
        with open_tensors(file) as handle:
            view = handle.get_slice(name)
            shape = view.get_shape()
            rows, step = shape[0], max(1, PIECE // (8 * math.prod(shape[1:]) or 1))
            piece = view[start : start + step]
            yield slice(start, start + step), piece
            del piece, view
        start += step


def read_tensor(
    file: Path, name: str, shape: tuple[int, ...], device: str | torch.device, dtype: torch.dtype
) -> Tensor:
    """One tensor, converted to `dtype` on `device` piece by piece. Raises InputError if a value is not finite there."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    for rows, piece in _pieces(file, name):
        part = tensor[rows]
        part.copy_(piece)
        if not all(math.isfinite(bound) for bound in torch.aminmax(part)):  # NaN and infinity both reach the bounds
            kinds = ((piece.isnan(), "NaN"), (piece.isinf(), "infinite"), (part.isinf(), f"too large for {dtype}"))
            kind = next(kind for found, kind in kinds if bool(found.any()))
            raise InputError(f"{file}: tensor {name!r} holds a value that is {kind}")
    return tensor


def _compare(stored: Mapping[str, Path], name: str, other: str) -> None:
    """Refuse two tensors of one shape that should be equal and are not."""
    for (_, piece), (_, twin) in zip(_pieces(stored[name], name), _pieces(stored[other], other), strict=True):
        if not bool((piece == twin).all()):
            raise InputError(f"{stored[name]}: tie_word_embeddings is true but {name!r} differs from {other!r}")


def save_folder(folder: Path, config: tuple[str, dict[str, Any]], weights: tuple[str, dict[str, Tensor]]) -> None:
    """Write a JSON file and a safetensors file, each given as (name, content), into `folder` (made if need be). Both
    are written and flushed under temporary names first, so that an interruption leaves no half-written file.
    InputError where the disk refuses. Of several processes only rank 0 writes."""
    if ranks.rank():
        return
    temporary = {name: folder / f".{name}.part" for name in (weights[0], config[0])}
    tensors = {name: tensor.contiguous() for name, tensor in weights[1].items()}
    text = json.dumps(config[1], indent=2, ensure_ascii=False, allow_nan=False, sort_keys=True) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, temporary[weights[0]], {"format": "pt"})
            temporary[config[0]].write_text(text, encoding="utf-8")
            temporary[weights[0]].chmod(temporary[config[0]].stat().st_mode)  # the library's files are their owner's alone
            for file in temporary.values():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
            (folder / config[0]).unlink(missing_ok=True)  # an interruption must not leave an old one that misreads new weights
            for name, file in temporary.items():
                os.replace(file, folder / name)
        finally:
            for file in temporary.values():
                file.unlink(missing_ok=True)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder}: cannot be written ({error})") from error
