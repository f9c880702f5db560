"""Tensor programs: each file holds a definition in plain PyTorch and the fast ways to compute it."""

from kernels.agent_attention import agent_attention

__all__ = ["agent_attention"]
