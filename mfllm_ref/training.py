"""What every training loop needs: a state to resume from, one safetensors file written whole or not at all, and errors that say
at which step a number stopped being finite."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mfllm_ref.errors import InputError
from mfllm_ref.runs import write_bytes

STATE = "state.safetensors"  # in a run's folder, until the run is finished


@contextmanager
def at(step: int, batch: str) -> Iterator[None]:
    """Within, a FloatingPointError or an InputError, the language model's own too, says the step and what it learned from there."""
    try:
        yield
    except (FloatingPointError, InputError) as error:
        raise type(error)(f"{error} at step {step} ({batch})") from None


def finite(what: str, value: float) -> float:
    """`value`; FloatingPointError where it is NaN or infinite."""
    if not math.isfinite(value):
        raise FloatingPointError(f"the {what} became {value}")
    return value


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimizers' state as named tensors: `<optimizer>.<parameter>.<entry>`."""
    return {
        f"{k}.{index}.{entry}": torch.as_tensor(value)
        for k, optimizer in enumerate(optimizers)
        for index, entries in optimizer.state_dict()["state"].items()
        for entry, value in entries.items()
    }


def load_optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`, onto optimizers of the same parameters."""
    for k, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        state["state"] = {}
        for name, tensor in tensors.items():
            owner, index, entry = name.split(".", 2)
            if owner == str(k):
                state["state"].setdefault(int(index), {})[entry] = tensor
        optimizer.load_state_dict(state)


def save_state(path: Path, facts: Mapping, **groups: Mapping[str, Tensor]) -> None:
    """Write groups of named tensors, and `facts` (JSON), as one file."""
    tensors = {f"{group}:{name}": t.detach().cpu().contiguous() for group, some in groups.items() for name, t in some.items()}
    said = json.dumps(facts)
    write_bytes(path, safetensors.torch.save(tensors, {"facts": said, "sha256": _digest(said, tensors)}))


def _digest(facts: str, tensors: Mapping[str, Tensor]) -> str:
    whole = hashlib.sha256(facts.encode())
    for name, tensor in sorted(tensors.items()):
        whole.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b"")
    return whole.hexdigest()


def load_state(path: Path, device: torch.device) -> tuple[dict, dict[str, dict[str, Tensor]]] | None:
    """(facts, groups of tensors) of `save_state`; None where there is no file. InputError for a damaged one."""
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            said = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        if said["sha256"] != _digest(said["facts"], tensors):
            raise ValueError("not what was written")
        facts = json.loads(said["facts"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: damaged, cannot resume ({type(error).__name__})") from None
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        group, _, name = key.partition(":")
        groups.setdefault(group, {})[name] = tensor.to(device)
    return facts, groups
