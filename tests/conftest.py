"""A language model with random weights and a tokenizer of its own: what tests of the society wing run on. And where
Triton runs in tests."""

import os
import sys

# Tests are small and start many processes: a second thread would take more time than it saves, and wait for the others' turns.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton settles when it is imported whether its kernels run in its interpreter, so that is done before any other
    # module may import it. Afterwards the variable would send every model of the suite there: `triton_device` sets it.
    os.environ["TRITON_INTERPRET"] = "1"
    import kernels.agent_attention_backward
    import kernels.agent_attention_triton
    import kernels.ib_loss_triton

    del os.environ["TRITON_INTERPRET"]

import train
from mfllm_ref import doors, pretrain
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


@pytest.fixture
def triton_device(monkeypatch):
    """The device whose tensors the dispatchers send to Triton: CUDA if there is one, else the CPU, interpreted."""
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return "cpu"


@pytest.fixture(params=["pytorch", "triton"])
def path(request):
    """A device for each of a dispatcher's two paths."""
    return "cpu" if request.param == "pytorch" else request.getfixturevalue("triton_device")


@pytest.fixture
def door(monkeypatch, capsys):
    """Runs train.py with these arguments, in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        capsys.readouterr()
        code = doors.run_door("train.py", train.main)
        return code, *capsys.readouterr()

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)
