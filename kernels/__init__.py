"""Tensor programs: each file holds a definition in plain PyTorch and the fast ways to compute it."""

from kernels.agent_attention import agent_attention
from kernels.ib_loss import IBTerms, ib_loss

__all__ = ["IBTerms", "agent_attention", "ib_loss"]
