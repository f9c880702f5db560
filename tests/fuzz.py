"""Hostile files: damaged events, configurations, weights, indexes, adapters, tokenizers, templates, interventions and records.

    python tests/fuzz.py 60        # a minute of atheris, guided by coverage; without atheris, of blind damage

Whatever a file holds, reading it succeeds or is an `InputError`: no other exception, no hang, no memory above 1 GB, no file
opened outside the folder that the user named. The hypothesis tests of tests/property/test_hostile.py use the same targets.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
try:
    import atheris
except ImportError:  # there are wheels for Linux alone
    atheris = None
if atheris is not None and __name__ == "__main__":
    with atheris.instrument_imports(include=["mfllm_ref"]):
        import mfllm_ref.simulation  # noqa: F401

import safetensors.torch
import torch

from mfllm_ref import pretrain, runs, simulation
from mfllm_ref.errors import InputError
from mfllm_ref.lm import chat
from mfllm_ref.lm.backbone import Backbone
from mfllm_ref.lm.checkpoint import load_backbone, save_backbone
from mfllm_ref.lm.lora import Adapters
from mfllm_ref.lm.tokenizer import Tokenizer
from mfllm_ref.society import agora
from mfllm_ref.society.readers import load_events, write_events
from mfllm_ref.training import load_state, save_state

SECONDS, MEMORY = 10, 2**30  # an input may take so long; so much memory beyond what the process holds
chat.PATIENCE = SECONDS / 2
WORKER = Path(chat.__file__).with_name("chat_worker.py")  # the one process that may be started
FIXTURES = ROOT / "tests" / "society" / "fixtures"


class Target(NamedTuple):
    """A folder that is read, the file in it that is damaged, and how it is read."""

    folder: Path
    file: str
    read: Callable[[Path], object]

    @property
    def whole(self) -> bytes:
        return (self.folder / self.file).read_bytes()


def read_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    tokenizer.decode(tokenizer.encode("The dam leaks <|im_end|> 漏水"))
    if tokenizer._template is not None:
        tokenizer.chat([{"role": "user", "content": "Is it true?"}])


def targets(place: Path) -> dict[str, Target]:
    """All targets, their valid folders made below `place`."""
    events = [agora.event("train", index) for index in range(2)]
    found = {}
    (place / "own").mkdir()
    small = [type(e)(e.id, e.topic, e.domain, e.language, e.actions[:3], e.posts[:1], e.facts) for e in events]
    write_events(small, place / "own" / "e.jsonl")
    (place / "own" / "i.json").write_text('[{"step": 0, "actions": [{"profile": "a nurse", "text": "No."}]}]')
    found["events"] = Target(place / "own", "e.jsonl", lambda folder: load_events(folder / "e.jsonl"))
    options = simulation.Settings(agents=40, warmup=14)
    found["intervention"] = Target(
        place / "own", "i.json", lambda folder: simulation.read_intervention(folder / "i.json", events, options)
    )
    for name, file in (
        ("rumdect", "7001.json"), ("ced", "rumor-repost/1_aa.json"), ("ced", "original-microblog/1_aa.json"),
        ("rumoureval", "train/harbour-fire/100/source-tweet/100.json"), ("rumoureval", "train-annotations/subtaskA.json"),
    ):  # fmt: skip
        found[f"{name} {Path(file).parent.name}"] = Target(FIXTURES / name, file, load_events)

    folder = place / "checkpoint"
    folder.mkdir()
    trained = pretrain.train_tokenizer(["a dam leaks", "share it"] * 5, 280)
    (folder / "tokenizer.json").write_text(trained.to_str())
    for name, content in pretrain.tokenizer_files().items():
        (folder / name).write_text(json.dumps(content))
    backbone = Backbone(pretrain.config_for("qwen2", pretrain.Shape(8, 1, 2, 1, 8, 280), 280))
    pretrain.initialise(backbone, torch.Generator().manual_seed(0))
    save_backbone(backbone, folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}")
    for file in ("config.json", "model.safetensors"):
        found[file] = Target(folder, file, load_backbone)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        found[file] = Target(folder, file, read_tokenizer)
    sharded = shutil.copytree(folder, place / "sharded")
    os.rename(sharded / "model.safetensors", sharded / "a.safetensors")
    names = safetensors.torch.load_file(sharded / "a.safetensors")
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "a.safetensors")}))
    found["index"] = Target(sharded, "model.safetensors.index.json", load_backbone)

    adapters = Adapters(backbone)
    adapters.add("a", rank=2, seed=0)
    adapters.save("a", place / "adapter")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        found[file] = Target(place / "adapter", file, lambda folder: Adapters(backbone).load("b", folder))

    import sentencepiece

    pieces = place / "pieces"
    pieces.mkdir()
    with open(pieces / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the dam leaks again"] * 20), model_writer=file, model_type="bpe", vocab_size=290,
            byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    found["tokenizer.model"] = Target(pieces, "tokenizer.model", read_tokenizer)
    (pieces / "added_tokens.json").write_text('{"<pad>": 290}')
    declared = {"291": {"content": "<sep>", "special": True, "lstrip": False}}
    (pieces / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": declared, "legacy": False}))
    for file in ("added_tokens.json", "tokenizer_config.json"):
        found[f"pieces {file}"] = Target(pieces, file, read_tokenizer)

    record = {"settings": {"seed": 0}, "sha256": {"weights": "ab"}}
    with runs.open_run(place / "run", record) as run:
        run.lines("rows.jsonl").append([{"n": 1}, {"n": 2}])
    save_state(place / "run" / "state.safetensors", {"step": 1}, adapter={"0": torch.zeros(2)})

    def resume(folder: Path) -> None:
        with runs.open_run(folder, record, resume=True) as run:
            list(run.lines("rows.jsonl"))
            load_state(folder / "state.safetensors", torch.device("cpu"))

    for file in ("run.json", "rows.jsonl", "state.safetensors"):
        found[file] = Target(place / "run", file, resume)
    return found


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Within the context an InputError is fine, SECONDS are enough, and no file outside `folder` is opened."""
    library = (str(ROOT), sys.prefix, sys.base_prefix)  # modules that are imported late

    def slow(*_) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, slow)
    signal.alarm(SECONDS)
    _watched.append((str(folder), *library))
    try:
        yield
    except InputError as error:
        assert "\n" not in str(error)
    finally:
        _watched.pop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


_watched: list[tuple[str, ...]] = []


def _audit(event: str, arguments: tuple) -> None:
    if _watched and event in ("open", "os.listdir", "os.remove", "os.rename", "subprocess.Popen", "socket.connect"):
        path = arguments[0]
        if event == "subprocess.Popen" and arguments[1][-1] == WORKER:
            return
        if event in ("subprocess.Popen", "socket.connect"):
            raise AssertionError(f"{event} {path}")
        if isinstance(path, str | bytes) and not os.path.abspath(os.fsdecode(path)).startswith(_watched[-1]):
            raise AssertionError(f"{event} {path!r} outside {_watched[-1][0]}")


sys.addaudithook(_audit)


def attempt(target: Target, content: bytes, place: Path) -> None:
    """Read the target with `content` in place of its file; raises whatever breaks the promise."""
    folder = place / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(target.folder, folder)
    (folder / target.file).write_bytes(content)
    with guarded(folder):
        target.read(folder)


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """`whole` with a few bytes changed, pieces cut, doubled or moved, or numbers and words replaced."""
    out = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(out) + 1)
        end = min(len(out), start + rng.choice((1, 1, 2, 8, 64)))
        out[start:end] = rng.choice((
            b"", rng.randbytes(end - start), bytes(out[start:end]) * 2, b"null", b"-1", b"1e999", b"99999999999999999999",
            b"\xff", b"\x00", b'"', b"{", b"[" * 5000, b"../../etc/passwd", b"\\ud800",
        ))  # fmt: skip
    return bytes(out)


def limit_memory() -> None:
    """No more than MEMORY beyond the address space that the process has now."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))


def main(seconds: float) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        found = targets(place)
        for target in found.values():
            attempt(target, target.whole, place)  # whole files are read without complaint, and what is late is imported
        order = list(found.values())
        if atheris is None:
            limit_memory()
            rng, end, count = random.Random(0), time.monotonic() + seconds, 0
            while time.monotonic() < end:
                target = order[count % len(order)]
                content = damaged(target.whole, rng)
                try:
                    attempt(target, content, place)
                except BaseException:
                    Path("crash.bin").write_bytes(content)
                    print(f"{target.file}: the content is in crash.bin", file=sys.stderr)
                    raise
                count += 1
            print(f"{count} damaged files, blind")
            return
        corpus = place / "corpus"
        corpus.mkdir()
        for k, target in enumerate(order):
            (corpus / str(k)).write_bytes(bytes([k]) + target.whole)
        atheris.Setup(
            [sys.argv[0], str(corpus), f"-max_total_time={int(seconds)}", "-max_len=8192", f"-timeout={SECONDS}",
             "-rss_limit_mb=2048", "-print_final_stats=1", "-verbosity=0"],
            lambda data: attempt(order[data[0] % len(order)], data[1:], place) if data else None,
        )  # fmt: skip
        limit_memory()
        atheris.Fuzz()


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60)
