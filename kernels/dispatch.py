"""Which tensors Triton computes."""

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


ON = ("1", "true", "on", "y", "yes")  # what Triton takes for yes, in any case


def runs_triton(x: Tensor) -> bool:
    """Whether Triton computes x: a CUDA tensor, or any under Triton's interpreter (TRITON_INTERPRET=1, set before the
    kernels are first used). float64 is PyTorch's everywhere."""
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ON  # as triton.knobs says, which is slow to import
    return x.dtype != torch.float64 and (x.is_cuda or interpreted) and _installed()


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 2 where there is none, so that the interpreter runs every loop."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program can have; of an H100 where there is no GPU."""
    if device.type != "cuda":
        return 227 * 1024
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # which torch's stub lacks
