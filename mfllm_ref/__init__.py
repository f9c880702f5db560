"""mfllm-ref: a plain-PyTorch reference implementation of MF-LLM (arXiv 2504.21582)."""

__version__ = "0.1.0"
