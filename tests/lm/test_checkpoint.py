"""Checkpoint folders: both ways with transformers, and every kind of damage refused in one line that names it."""

import json
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import mfllm_ref.lm.checkpoint as checkpoint
from mfllm_ref.errors import InputError
from mfllm_ref.lm.backbone import Backbone
from mfllm_ref.lm.checkpoint import load_backbone, read_object, save_backbone
from mfllm_ref.lm.config import Config

SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS = {
    "qwen2": {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"head_dim": 12, "attention_bias": True},
    "llama": {"mlp_bias": True, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}},
    "mistral": {"sliding_window": 5, "head_dim": 6},
}
EMBEDDING, UP = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"
IDS = torch.arange(40).reshape(2, 20)


def random_backbone(family: str, **changes: object) -> Backbone:
    torch.manual_seed(3)
    return Backbone(Config.from_json(SMALL | VARIANTS[family] | {"model_type": family} | changes, "config.json"))


@pytest.mark.parametrize("family", VARIANTS)
@pytest.mark.parametrize("shards", [1, 3])
def test_what_transformers_saves_loads_here(family: str, shards: int, tmp_path: Path) -> None:
    """Single file or shards with an index: the loaded backbone has transformers' logits, frozen and in eval mode."""
    config = transformers.AutoConfig.for_model(family, **SMALL, **VARIANTS[family])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size=size // shards + 4096)
    assert (tmp_path / checkpoint.INDEX).exists() == (shards > 1)
    backbone = load_backbone(tmp_path)
    assert not backbone.training and not any(parameter.requires_grad for parameter in backbone.parameters())
    with torch.no_grad():
        assert (backbone(IDS) - model(IDS).logits).abs().max() < 1e-4


@pytest.mark.parametrize("family", VARIANTS)
def test_what_is_saved_here_loads_in_transformers_and_here(family: str, tmp_path: Path) -> None:
    """A saved folder has equal logits in transformers, and loads back bit for bit, whatever dtype it was stored in."""
    backbone = random_backbone(family)
    save_backbone(backbone, tmp_path / "new" / "folder", torch.float32, extra={"eos_token_id": 5})
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "folder", dtype=torch.float32).eval()
    assert model.config.eos_token_id == 5
    assert len({path.stat().st_mode for path in (tmp_path / "new" / "folder").iterdir()}) == 1, "who may read one may read all"
    with torch.no_grad():
        assert (backbone(IDS) - model(IDS).logits).abs().max() < 1e-4
    again = load_backbone(tmp_path / "new" / "folder")
    assert again.config == backbone.config
    for name, parameter in backbone.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter)
    save_backbone(backbone, tmp_path / "half")
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert ("lm_head.weight" in stored) != backbone.config.tied
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        half = load_backbone(tmp_path / "half", "cpu", dtype)
        for name, parameter in half.named_parameters():
            assert parameter.dtype == dtype
            assert torch.equal(parameter, backbone.get_parameter(name).bfloat16().to(dtype))
    assert (half.lm_head.weight is half.model.embed_tokens.weight) == backbone.config.tied


def test_pieces_do_not_change_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading row by row gives the same weights as reading whole tensors, and finds a NaN in the last row."""
    save_backbone(random_backbone("qwen2"), tmp_path)
    whole = load_backbone(tmp_path)
    monkeypatch.setattr(checkpoint, "PIECE", 1000)
    for name, parameter in load_backbone(tmp_path).named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name))
    damage(tmp_path, lambda tensors: tensors[EMBEDDING][-1, -1].fill_(float("nan")))
    with pytest.raises(InputError, match="NaN"):
        load_backbone(tmp_path)


def test_saving_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interruption while the new files are written leaves the old checkpoint as it was, and no temporary files."""
    save_backbone(random_backbone("llama"), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_backbone(random_backbone("qwen3"), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_disk_that_refuses_is_one_line(tmp_path: Path) -> None:
    """A limit on file size stands for the full disk: the old checkpoint stays, nothing is left beside it."""
    save_backbone(random_backbone("llama"), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(InputError, match="too large"):
            save_backbone(random_backbone("qwen3"), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    with pytest.raises(InputError, match="config.json"):
        save_backbone(random_backbone("qwen3"), tmp_path / "config.json")


def test_a_cache_of_symbolic_links_is_followed(tmp_path: Path) -> None:
    """The layout of the Hugging Face cache: a snapshot folder whose files are links to blobs outside it."""
    save_backbone(random_backbone("mistral"), tmp_path / "blobs")
    shard(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(Path("..") / "blobs" / file.name)
    assert torch.equal(load_backbone(tmp_path / "snapshot")(IDS), load_backbone(tmp_path / "blobs")(IDS))


def test_old_rotary_buffers_and_an_equal_tied_head_are_ignored(tmp_path: Path) -> None:
    save_backbone(random_backbone("qwen2"), tmp_path)
    expected = load_backbone(tmp_path)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors[EMBEDDING].clone()

    damage(tmp_path, add)
    assert torch.equal(load_backbone(tmp_path)(IDS), expected(IDS))


def test_memory_grows_by_the_weights_and_little_more(tmp_path: Path) -> None:
    """Peak growth while loading, stored in bfloat16 and asked for in float32, stays under 1.2 times the weights."""
    wide = {"vocab_size": 40000, "hidden_size": 512, "num_hidden_layers": 1, "head_dim": 8, "tie_word_embeddings": True}
    save_backbone(random_backbone("qwen3", **wide), tmp_path)
    program = """
import re, sys
from mfllm_ref.lm.checkpoint import load_backbone
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
backbone = load_backbone(sys.argv[1])
print((peak() - before) / sum(parameter.numel() * 4 for parameter in backbone.parameters()))
"""
    assert 0.9 < float(run(program, tmp_path)) < 1.2


def run(program: str, argument: Path) -> str:
    """What a Python program prints in a process of its own, where memory can be measured and limited."""
    root = Path(checkpoint.__file__).parents[2]
    command = [sys.executable, "-c", program, str(argument)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout


def damage(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite the weights after `change`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def shard(folder: Path) -> None:
    """Split the weights over two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "model.safetensors").unlink()


def edit(folder: Path, name: str, change: Callable[[dict], object]) -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        shard(folder)
        edit(folder, "model.safetensors.index.json", lambda content: change(content["weight_map"]))

    return apply


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    return lambda folder: damage(folder, change)


def raw(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return apply


def header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Edit the JSON header of the safetensors file, with the data left as they are."""

    def rewrite(data: bytes) -> bytes:
        length = struct.unpack("<Q", data[:8])[0]
        content = json.loads(data[8 : 8 + length])
        change(content)
        text = json.dumps(content).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return raw(rewrite)


def duplicate_shard(folder: Path) -> None:
    shard(folder)
    first, second = sorted(folder.glob("model-*.safetensors"))
    save_file(load_file(first) | load_file(second), second)


def duplicate_index_entry(folder: Path) -> None:
    shard(folder)
    file = folder / "model.safetensors.index.json"
    file.write_text(file.read_text().replace('{"lm_head.weight": ', '{"lm_head.weight": "a", "lm_head.weight": '))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing tensor": (weights(lambda t: t.pop(UP)), UP),
    "missing head": (weights(lambda t: t.pop("lm_head.weight")), "missing tensor 'lm_head.weight'"),
    "extra tensor": (weights(lambda t: t.update({"model.extra": torch.ones(2)})), "model.extra"),
    "extra layer": (lambda f: edit(f, "config.json", lambda c: c.update(num_hidden_layers=2)), "model.layers.2."),
    "misshapen": (weights(lambda t: t.update({UP: t[UP].T.contiguous()})), f"{UP}' has shape [32, 48], not [48, 32]"),
    "NaN": (weights(lambda t: t[UP][7, 3].fill_(float("nan"))), f"{UP}' holds a value that is NaN"),
    "inf": (weights(lambda t: t[UP][7, 3].fill_(float("-inf"))), f"{UP}' holds a value that is infinite"),
    "integers": (weights(lambda t: t.update({UP: t[UP].to(torch.int8)})), f"{UP}' is of dtype I8"),
    "truncated": (raw(lambda data: data[:-10]), "model.safetensors"),
    "empty": (raw(lambda data: b""), "model.safetensors"),
    "trailing bytes": (raw(lambda data: data + b"\0" * 16), "model.safetensors"),
    "huge header": (raw(lambda data: struct.pack("<Q", 2**62) + data[8:]), "model.safetensors"),
    "text": (raw(lambda data: b"version https://git-lfs.github.com/spec/v1\n"), "model.safetensors"),
    "overlap": (header(lambda h: h[UP].update(data_offsets=h["lm_head.weight"]["data_offsets"])), "model.safetensors"),
    "outside": (header(lambda h: h[UP].update(data_offsets=[10**12, 10**12 + 3072])), "model.safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "pickle only": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "model.safetensors: no such file"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "bad JSON": (lambda f: (f / "config.json").write_text('{"model_type": '), "config.json"),
    "JSON list": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "deep JSON": (lambda f: (f / "config.json").write_text("[" * 10**5), "config.json"),
    "not UTF-8": (lambda f: (f / "config.json").write_bytes(b'{"model_type": "\xff"}'), "config.json"),
    "NaN in JSON": (lambda f: edit(f, "config.json", lambda c: c.update(rope_theta=float("nan"))), "config.json"),
    "unknown family": (lambda f: edit(f, "config.json", lambda c: c.update(model_type="bert")), "'bert'"),
    "unequal head": (lambda f: edit(f, "config.json", lambda c: c.update(tie_word_embeddings=True)), "lm_head.weight"),
    "parent entry": (index(lambda m: m.update({UP: "../x.safetensors"})), "'../x.safetensors'"),
    "nested entry": (index(lambda m: m.update({UP: "a/b"})), "'a/b'"),
    "absolute entry": (index(lambda m: m.update({UP: "/etc/passwd"})), "'/etc/passwd'"),
    "dots entry": (index(lambda m: m.update({UP: ".."})), "'..'"),
    "number entry": (index(lambda m: m.update({UP: 3})), UP),
    "absent shard": (index(lambda m: m.update({UP: "other.safetensors"})), "other.safetensors: no such file"),
    "empty index": (index(lambda m: m.clear()), "weight_map"),
    "index lies": (index(lambda m: m.update({UP: next(v for v in m.values() if v != m[UP])})), UP),
    "index silent": (index(lambda m: m.update({"model.extra": m.pop(UP)})), "model.extra"),
    "duplicate tensor": (duplicate_shard, "duplicate"),
    "duplicate entry": (duplicate_index_entry, "lm_head.weight"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_error_that_names_it(kind: str, tmp_path: Path) -> None:
    """Every damaged checkpoint is an InputError of one line that names the culprit."""
    save_backbone(random_backbone("llama", tie_word_embeddings=False), tmp_path)
    apply, named = DAMAGE[kind]
    apply(tmp_path)
    with pytest.raises(InputError) as error:
        load_backbone(tmp_path)
    assert named in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        load_backbone(tmp_path / "nowhere")


def test_what_overflows_the_requested_dtype_is_refused(tmp_path: Path) -> None:
    """1e30 is fine in bfloat16 and infinite in float16."""
    backbone = random_backbone("llama")
    backbone.get_parameter(UP).data[0, 0] = 1e30
    save_backbone(backbone, tmp_path)
    load_backbone(tmp_path, dtype=torch.bfloat16)
    with pytest.raises(InputError, match=f"{UP}.*too large for torch.float16"):
        load_backbone(tmp_path, dtype=torch.float16)


def test_declared_sizes_are_compared_before_memory_is_taken(tmp_path: Path) -> None:
    """A config.json that declares terabytes is refused by the shapes in the file, within 8 GB of address space."""
    save_backbone(random_backbone("llama"), tmp_path)
    huge = {"vocab_size": 2**24, "hidden_size": 2**20, "intermediate_size": 2**20, "num_hidden_layers": 200}
    edit(tmp_path, "config.json", lambda content: content.update(huge))
    program = """
import resource, sys
from mfllm_ref.errors import InputError
from mfllm_ref.lm.checkpoint import load_backbone
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**33, used + 2**33))
try:
    load_backbone(sys.argv[1])
except InputError as error:
    print(error)
"""
    assert "has shape" in run(program, tmp_path)


def test_json_with_a_repeated_key_is_refused_where_it_must_be_unique(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": {"b": 1, "b": 2}}')
    assert read_object(tmp_path / "x.json") == {"a": {"b": 2}}
    with pytest.raises(InputError, match="x.json.*'b'"):
        read_object(tmp_path / "x.json", unique=True)


def test_no_byte_of_the_header_can_crash_the_loader(tmp_path: Path) -> None:
    """Whatever single byte of length or header is damaged, the checkpoint either loads or is refused as input."""
    save_backbone(random_backbone("llama", num_hidden_layers=1), tmp_path)
    file = tmp_path / "model.safetensors"
    sound, refused, generator = file.read_bytes(), 0, torch.Generator().manual_seed(0)
    header_end = 8 + struct.unpack("<Q", sound[:8])[0]
    for place in range(0, header_end, 7):
        byte = int(torch.randint(256, (), generator=generator))
        file.write_bytes(sound[:place] + bytes([byte]) + sound[place + 1 :])
        try:
            load_backbone(tmp_path)
        except InputError:
            refused += 1
    assert refused > header_end / 7 / 2
