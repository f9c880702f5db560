"""What many tests run on: language models with random weights and a tokenizer of their own, the doors, in this process or in
others that can be killed, and where Triton runs."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

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

ROOT = Path(__file__).resolve().parents[1]
SHAPE = pretrain.Shape(dim=32, layers=2, heads=4, kv_heads=2, intermediate=48, vocab=700)


def random_checkpoint(folder: Path, layers: int) -> Path:
    """A checkpoint folder: a byte-fallback BPE trained on agora's words, and random weights."""
    texts = [action.text for index in range(4) for action in agora.event("train", index).actions]
    write_bytes(folder / "tokenizer.json", pretrain.train_tokenizer(texts, SHAPE.vocab).to_str().encode())
    for name, content in pretrain.tokenizer_files().items():
        write_json(folder / name, content)
    torch.manual_seed(0)
    backbone = Backbone(pretrain.config_for("qwen2", replace(SHAPE, layers=layers), SHAPE.vocab))
    pretrain.initialise(backbone, torch.Generator().manual_seed(0))
    save_backbone(backbone, folder, dtype=torch.float32)
    return folder


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("random"), 2)


@pytest.fixture(scope="session")
def shallow_folder(tmp_path_factory):
    """One layer, for tests that run whole doors many times."""
    return random_checkpoint(tmp_path_factory.mktemp("shallow"), 1)


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


class Server:
    """Runs doors in processes that can be killed; see door_server.py."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "door_server.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def ask(self, **request) -> dict:
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def start(self, *arguments, **how) -> int:
        return self.ask(start=[*map(str, arguments), "--threads", "1"], **how)["run"]

    def together(self, arguments: list[str], outs: list[Path], hows: list[dict]) -> list[dict]:
        """The same run into several folders, one process and core each."""
        started = [self.start(*arguments, "--out", out, **how) for out, how in zip(outs, hows, strict=True)]
        return [self.ask(end=run) for run in started]

    def run(self, *arguments, **how) -> dict:
        end = {key: how.pop(key) for key in ("signal", "after") if key in how}
        return self.ask(end=self.start(*arguments, **how), **end)


@pytest.fixture(scope="session")
def server():
    """Shared by all that kill, interrupt or start doors side by side."""
    server = Server()
    yield server
    server.process.stdin.close()
    assert server.process.wait(20) == 0
