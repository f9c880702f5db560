"""Text as probabilities: a transformer, its checkpoints, its tokenizer, its adapters, and `LanguageModel` over all."""

from mfllm_ref.lm.language_model import LanguageModel

__all__ = ["LanguageModel"]
