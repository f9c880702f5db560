"""Decoding on a GPU: a step from one token to the next is recorded once, as a CUDA graph, and replayed.

Notable:
- A step of a small backbone is some thirty launches a layer, each with work for a few microseconds: the GPU would wait for
  the CPU, which takes longer to queue them. A replay is a single launch.
- A graph holds addresses, not values. So all that changes from token to token (the tokens, their places and positions, the
  agents' lengths) lies in tensors that stay where they are, and moving on is part of the recording.
- What is fixed in it is the batch and the slots of its caches: the caller makes a new `Replay` where those change.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from kernels.dispatch import runs_triton
from mfllm_ref.lm.backbone import Backbone
from mfllm_ref.lm.worlds import Prefixes, Step

SPARE = 2**31  # bytes that torch may hold unused before a graph is recorded


def replayable(x: Tensor) -> bool:
    """Whether steps on caches like x may be recorded: Triton computes their attention, and nothing waits for the CPU."""
    return x.is_cuda and runs_triton(x)


class Replay:
    """A decode step that may be repeated: every call feeds the next token. Arguments as `worlds.Step`'s, for the first of them.

    The first call computes as usual, so that all kernels are compiled and loaded, the second one records; later ones replay.
    What a call returns is overwritten by the next.
    """

    def __init__(
        self, backbone: Backbone, lengths: np.ndarray, world: np.ndarray, prefixes: Prefixes, cache_k: Tensor, cache_v: Tensor
    ) -> None:  # fmt: skip
        full = np.full_like(lengths, cache_k.shape[3])
        self.step = Step(backbone, lengths, world, prefixes, cache_k, cache_v, planned=full)
        self.ids = torch.zeros(len(lengths), dtype=torch.int64, device=cache_k.device)
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.hidden: Tensor

    def __call__(self, ids: Tensor) -> Tensor:
        """ids int64 [agents] -> hidden [agents, dim]."""
        self.ids.copy_(ids)
        self.calls += 1
        if not ids.is_cuda:  # under Triton's interpreter
            self._move()
        elif self.graph is None:
            self._on_side_stream(record=self.calls > 1)
        if self.graph is not None:
            self.graph.replay()
        return self.hidden

    def _move(self) -> None:
        self.hidden = self.step(self.ids)
        self.step.advance()

    def _on_side_stream(self, record: bool) -> None:
        """CUDA records no default stream; what libraries keep a stream (cuBLAS its workspace) is made by the call before."""
        stream, usual = _side_stream(self.ids.device), torch.cuda.current_stream()
        # A graph has memory of its own, which torch keeps when the graph is gone and cannot free while another is recorded.
        if record and torch.cuda.memory_reserved() - torch.cuda.memory_allocated() > SPARE:
            torch.cuda.empty_cache()
        stream.wait_stream(usual)
        with torch.cuda.stream(stream):
            if not record:
                self._move()
            else:
                self.graph = torch.cuda.CUDAGraph()
                self.graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._move()
                finally:
                    self.graph.capture_end()
        usual.wait_stream(stream)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
