"""Small random models of every family, written by transformers, that the language model's tests run on."""

import pytest
import tokenizers as tk
import torch
import transformers

from mfllm_ref.lm import LanguageModel

VOCAB, END = 320, 2
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96,
    "bos_token_id": None, "eos_token_id": END, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32, "rope_theta": 10000.0}  # fmt: skip
FAMILIES = {
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=12, tie_word_embeddings=True),
    "llama": lambda: transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=6),
}
WORDS = "the 谣言 rumor is 转发 true , false ! 今天天气真好 who knows".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder per family: random weights saved by transformers, a byte-level tokenizer smaller than the vocabulary."""
    tokenizer = tk.Tokenizer(tk.models.BPE())
    tokenizer.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tk.decoders.ByteLevel()
    alphabet, special = tk.pre_tokenizers.ByteLevel.alphabet(), ["<pad>", "<s>", "</s>"]
    trainer = tk.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    made = {}
    for number, (name, config) in enumerate(FAMILIES.items()):
        torch.manual_seed(number)
        model = transformers.AutoModelForCausalLM.from_config(config()).double().eval()
        for weight in model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.25)
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
        tokenizer.save(str(made[name] / "tokenizer.json"))
    return made


@pytest.fixture(scope="module")
def lm(folder):
    return LanguageModel.load(folder["qwen2"], dtype=torch.float64)
