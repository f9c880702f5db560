"""A language model with random weights and a tokenizer of its own: what tests of the society wing run on."""

import pytest
import torch

from mfllm_ref import pretrain
from mfllm_ref.lm import LanguageModel
from mfllm_ref.lm.backbone import Backbone
from mfllm_ref.lm.checkpoint import save_backbone
from mfllm_ref.runs import write_bytes, write_json
from mfllm_ref.society import agora

SHAPE = pretrain.Shape(dim=32, layers=2, heads=4, kv_heads=2, intermediate=48, vocab=700)


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory):
    """A checkpoint folder: a byte-fallback BPE trained on agora's words, and random weights."""
    folder = tmp_path_factory.mktemp("random")
    texts = [action.text for index in range(4) for action in agora.event("train", index).actions]
    write_bytes(folder / "tokenizer.json", pretrain.train_tokenizer(texts, SHAPE.vocab).to_str().encode())
    for name, content in pretrain.tokenizer_files().items():
        write_json(folder / name, content)
    torch.manual_seed(0)
    backbone = Backbone(pretrain.config_for("qwen2", SHAPE, SHAPE.vocab))
    pretrain.initialise(backbone, torch.Generator().manual_seed(0))
    save_backbone(backbone, folder, dtype=torch.float32)
    return folder


@pytest.fixture(scope="session")
def random_lm(random_folder):
    """The random model in float64, where no token depends on the batch."""
    return LanguageModel.load(random_folder, dtype=torch.float64)
