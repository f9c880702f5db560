"""LoRA against peft, both ways, and what an adapter must never do to the backbone."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mfllm_ref.errors import InputError
from mfllm_ref.lm.backbone import Backbone
from mfllm_ref.lm.config import Config
from mfllm_ref.lm.lora import Adapters

CONFIG = {
    "model_type": "qwen2", "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "tie_word_embeddings": True,
}  # fmt: skip
IDS = torch.arange(30).reshape(2, 15)
# Every way to say which layers, at which rank and scale. `layers_to_transform` narrows endings, never whole paths.
OPTIONS: dict[str, dict] = {
    "default": {"target_modules": ["q_proj", "v_proj"]},
    "rank": {"r": 3, "lora_alpha": 7, "target_modules": ["down_proj", "o_proj", "k_proj"]},
    "path": {"target_modules": ["model.layers.1.mlp.up_proj", "self_attn.q_proj"]},
    "regex": {"target_modules": r"model\.layers\.[02]\.(self_attn\.[qk]|mlp\.gate)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "head": {"target_modules": ["lm_head", "q_proj"]},  # peft saves the whole head as well
    "exclude list": {"target_modules": "all-linear", "exclude_modules": ["q_proj", "model.layers.0.mlp.up_proj"]},
    "exclude regex": {"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "up_proj"], "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 5},
        "alpha_pattern": {r"model.layers.\d.self_attn.v_proj": 3, "proj": 99, "1.self_attn.q_proj": 12},
    },
    "patterns rslora": {
        "target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"down_proj": 1},
        "alpha_pattern": {"k_proj": 1},
    },
    "one layer": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 2},
    "layers": {"target_modules": ["q_proj", "model.layers.1.self_attn.v_proj"], "layers_to_transform": [0, 2]},
    "layers pattern": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    "no layers": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "dropout": {"target_modules": ["q_proj"], "lora_dropout": 0.3},
    "gaussian": {"target_modules": ["v_proj"], "init_lora_weights": "gaussian"},
}  # fmt: skip


def pair(**changes: object) -> tuple[transformers.PreTrainedModel, Backbone]:
    """The same random weights in transformers and here."""
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**CONFIG | changes)).eval()
    backbone = Backbone(Config.from_json(CONFIG | changes, "config.json")).eval()
    backbone.load_state_dict(model.state_dict())
    return model, backbone


def logits(backbone: Backbone) -> torch.Tensor:
    with torch.no_grad():
        return backbone(IDS)


def shake(adapters: Adapters, name: str, seed: int = 0) -> None:
    """Give B, which starts at zero, values that matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters.parameters(name):
        parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.3


@pytest.mark.parametrize("kind", OPTIONS)
def test_what_peft_saves_loads_here(kind: str, tmp_path: Path) -> None:
    """An adapter trained in peft under any honoured options has the same logits here, and unlike the bare ones."""
    model, backbone = pair()
    bare = logits(backbone)
    tuned = peft.get_peft_model(model, peft.LoraConfig(**OPTIONS[kind])).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter += torch.randn_like(parameter) * 0.3
        theirs = tuned(IDS).logits
    tuned.save_pretrained(tmp_path)
    adapters = Adapters(backbone)
    adapters.load("a", tmp_path)
    adapters.activate("a")
    assert (logits(backbone) - theirs).abs().max() < 1e-4
    assert (bare - theirs).abs().max() > 1e-2


@pytest.mark.parametrize("kind", OPTIONS)
def test_what_is_saved_here_loads_in_peft_and_here(kind: str, tmp_path: Path) -> None:
    """A saved adapter has equal logits in peft, and comes back here bit for bit."""
    model, backbone = pair()
    options = {"r": 8, "lora_alpha": 8} | OPTIONS[kind]
    options = {key: value for key, value in options.items() if key not in ("lora_dropout", "init_lora_weights")}
    adapters = Adapters(backbone)
    adapters.add("a", options.pop("r"), options.pop("lora_alpha"), options.pop("target_modules"), seed=1, **options)
    shake(adapters, "a")
    adapters.activate("a")
    ours = logits(backbone)
    adapters.save("a", tmp_path / "saved")
    adapters.load("b", tmp_path / "saved")
    for one, other in zip(adapters.parameters("a"), adapters.parameters("b"), strict=True):
        assert torch.equal(one, other) and one.requires_grad and not other.requires_grad
    adapters.activate("b")
    assert torch.equal(logits(backbone), ours)
    tuned = peft.PeftModel.from_pretrained(model, str(tmp_path / "saved")).eval()
    with torch.no_grad():
        assert (tuned(IDS).logits - ours).abs().max() < 1e-4


def test_a_fresh_adapter_starts_as_in_peft() -> None:
    """A has nn.Linear's initial distribution, B is zero and nothing changes; the same seed gives the same A."""
    _, backbone = pair()
    bare = logits(backbone)
    adapters = Adapters(backbone)
    adapters.add("a", rank=16, seed=7)
    adapters.add("b", rank=16, seed=7)
    adapters.activate("a")
    assert torch.equal(logits(backbone), bare)
    assert set(adapters.adapters["a"].layers) == {
        f"model.layers.{layer}.self_attn.{name}" for layer in range(3) for name in ("q_proj", "v_proj")
    }
    for a, b, scale in adapters.adapters["a"].layers.values():
        assert a.abs().max() <= 24**-0.5 and a.std().item() == pytest.approx((3 * 24) ** -0.5, rel=0.15)
        assert not b.any() and scale == 1.0 and a.dtype == torch.float32
    assert all(torch.equal(x, y) for x, y in zip(adapters.parameters("a"), adapters.parameters("b"), strict=True))


def test_only_the_active_adapter_learns_and_the_base_is_frozen() -> None:
    """Gradients reach the active adapter alone and are peft's."""
    model, backbone = pair()
    adapters = Adapters(backbone)
    for name in ("a", "b"):
        adapters.add(name, rank=2, targets=["q_proj", "down_proj"], seed=3)
        shake(adapters, name)
    adapters.activate("a")
    backbone(IDS).logsumexp(-1).sum().backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in backbone.parameters())
    assert all(parameter.grad is None for parameter in adapters.parameters("b"))
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj", "down_proj"]))
    for path, (a, b, _) in adapters.adapters["a"].layers.items():
        layer = tuned.base_model.model.get_submodule(path)
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a.data, b.data
    tuned(IDS).logits.logsumexp(-1).sum().backward()
    for path, (a, b, _) in adapters.adapters["a"].layers.items():
        layer = tuned.base_model.model.get_submodule(path)
        torch.testing.assert_close(a.grad, layer.lora_A["default"].weight.grad, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(b.grad, layer.lora_B["default"].weight.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_switching_and_merging_leave_no_trace(dtype: torch.dtype) -> None:
    """Any sequence of activations and merges gives each adapter its own logits, and at the end every bit of the
    backbone is what it was. Merged logits equal unmerged ones to rounding; a tied embedding is not merged into."""
    _, backbone = pair()
    backbone.to(dtype)
    original = {name: parameter.clone() for name, parameter in backbone.named_parameters()}
    adapters = Adapters(backbone)
    bare = logits(backbone)
    adapters.add("a", rank=4, seed=1)
    adapters.add("b", rank=2, targets=["lm_head", "up_proj"], seed=2)
    wide = torch.promote_types(dtype, torch.float32)
    assert all(parameter.dtype == wide for parameter in adapters.parameters("a"))
    outputs = {}
    for name in ("a", "b"):
        shake(adapters, name, seed=len(outputs))
        adapters.activate(name)
        outputs[name] = logits(backbone)
        assert outputs[name].dtype == dtype and not torch.equal(outputs[name], bare)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.06, torch.float64: 1e-13}[dtype]
    for name, merged in (("a", True), ("b", True), ("a", False), (None, False), ("b", True), ("b", False), ("a", True)):
        adapters.merge(name) if merged else adapters.activate(name)
        assert adapters.active == name
        expected = bare if name is None else outputs[name]
        assert (logits(backbone) - expected).abs().max() <= (tolerance * expected.abs().max() if merged else 0)
        assert torch.equal(backbone.get_parameter("model.embed_tokens.weight"), original["model.embed_tokens.weight"])
    adapters.unmerge()
    assert adapters.active is None and torch.equal(logits(backbone), bare)
    assert all(torch.equal(parameter, original[name]) for name, parameter in backbone.named_parameters())
    assert backbone.lm_head.weight is backbone.model.embed_tokens.weight


def test_over_a_bfloat16_backbone_the_update_keeps_its_digits() -> None:
    """A layer's output is the exact sum of its bfloat16 output and the float32 update, rounded once, as in peft."""
    model, backbone = pair()
    backbone.bfloat16()
    adapters = Adapters(backbone)
    adapters.add("a", rank=4, alpha=4, targets=["gate_proj"], seed=1)
    shake(adapters, "a")
    path = "model.layers.1.mlp.gate_proj"
    linear, (a, b, _) = backbone.get_submodule(path), adapters.adapters["a"].layers[path]
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    plain = linear(x)
    adapters.activate("a")
    exact = plain.double() + x.double() @ a.double().T @ b.double().T
    error = (linear(x).double() - exact).abs() / exact.abs()
    assert linear(x).dtype == torch.bfloat16 and error.max() <= 2**-8


def edit(change: dict) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))

    return apply


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return apply


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "dora": (edit({"use_dora": True}), "use_dora"),
    "modules to save": (edit({"modules_to_save": ["lm_head"]}), "modules_to_save"),
    "bias": (edit({"bias": "lora_only"}), "bias"),
    "fan in": (edit({"fan_in_fan_out": True}), "fan_in_fan_out"),
    "other method": (edit({"peft_type": "LOHA"}), "peft_type"),
    "lora bias": (edit({"lora_bias": True}), "lora_bias"),
    "tokens": (edit({"trainable_token_indices": [1, 2]}), "trainable_token_indices"),
    "parameters": (edit({"target_parameters": ["weight"]}), "target_parameters"),
    "alora": (edit({"alora_invocation_tokens": [3]}), "alora_invocation_tokens"),
    "megatron": (edit({"megatron_config": {"a": 1}}), "megatron_config"),
    "replication": (edit({"layer_replication": [[0, 2]]}), "layer_replication"),
    "qalora": (edit({"use_qalora": True}), "use_qalora"),
    "pissa": (edit({"init_lora_weights": "pissa_niter_4"}), "pissa_niter_4"),
    "olora": (edit({"init_lora_weights": "olora"}), "olora"),
    "unheard of": (edit({"use_future_option": 3}), "use_future_option"),
    "no targets": (edit({"target_modules": None}), "target_modules"),
    "other names": (edit({"target_modules": ["c_attn"]}), "c_attn"),
    "a norm": (edit({"target_modules": r".*norm"}), "layernorm"),
    "the embedding": (edit({"target_modules": ["embed_tokens"]}), "embed_tokens"),
    "bad regex": (edit({"target_modules": "("}), "invalid"),
    "bad pattern": (edit({"rank_pattern": {"*": 2}}), "invalid"),
    "pattern list": (edit({"alpha_pattern": [2]}), "invalid"),
    "bad layers": (edit({"layers_to_transform": "all"}), "invalid"),
    "regex and layers": (edit({"target_modules": ".*q_proj", "layers_to_transform": [1]}), "layers_to_transform"),
    "rank": (edit({"r": 0}), "rank"),
    "fraction": (edit({"r": 2.5}), "rank"),
    "other rank": (edit({"r": 9}), "has shape [4, 24], not [9, 24]"),
    "huge rank": (edit({"r": 10**12}), "has shape"),
    "alpha": (edit({"lora_alpha": "16"}), "lora_alpha"),
    "fewer layers": (edit({"layers_to_transform": [0]}), "unexpected tensor"),
    "more layers": (edit({"target_modules": ["q_proj", "v_proj", "k_proj"]}), "k_proj.lora_A.weight"),
    "list": (lambda f: (f / "adapter_config.json").write_text("[]"), "adapter_config.json"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json: no such file"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors: no such file"),
    "pickle": (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "no such file"),
    "missing": (weights(lambda t: t.pop(KEY)), f"missing tensor '{KEY}'"),
    "extra": (weights(lambda t: t.update({KEY + "s": torch.ones(1)})), KEY + "s"),
    "NaN": (weights(lambda t: t[KEY][0, 0].fill_(float("nan"))), f"'{KEY}' holds a value that is NaN"),
    "misshapen": (weights(lambda t: t.update({KEY: torch.ones(4, 25)})), f"'{KEY}' has shape [4, 25], not [4, 24]"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_change_the_result_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    """Unsupported options and damaged files are one line that names them, and leave no adapter behind."""
    _, backbone = pair()
    adapters = Adapters(backbone)
    adapters.add("a", rank=4, seed=0)
    adapters.save("a", tmp_path)
    apply, named = REFUSED[kind]
    apply(tmp_path)
    with pytest.raises(InputError) as error:
        adapters.load("b", tmp_path)
    assert named in str(error.value) and "\n" not in str(error.value) and "b" not in adapters.adapters


def test_an_adapter_for_another_backbone_is_refused(tmp_path: Path) -> None:
    """Other widths are refused by name and shape, more layers by name."""
    changes = ({"hidden_size": 32}, "has shape [8, 24], not [8, 32]"), ({"num_hidden_layers": 2}, "layers.2")
    for change, named in changes:
        adapters = Adapters(pair()[1])
        adapters.add("a", seed=0)
        adapters.save("a", tmp_path)
        with pytest.raises(InputError) as error:
            Adapters(pair(**change)[1]).load("a", tmp_path)
        assert named in str(error.value)


def test_names_must_be_new_to_add_and_known_to_use(tmp_path: Path) -> None:
    adapters = Adapters(pair()[1])
    adapters.add("a")
    for misuse in (
        lambda: adapters.add("a"), lambda: adapters.load("a", tmp_path), lambda: adapters.activate("b"),
        lambda: adapters.merge("b"), lambda: adapters.save("b", tmp_path), lambda: adapters.add("c", rank=-1),
        lambda: adapters.add("c", targets=["nothing"]), lambda: adapters.add("c", use_dora=True),
    ):  # fmt: skip
        with pytest.raises(InputError):
            misuse()


def test_what_load_would_refuse_is_not_saved(tmp_path: Path) -> None:
    """A good adapter is not replaced by one that cannot be read, and PEFT refuses layers_pattern alone."""
    adapters = Adapters(pair()[1])
    adapters.add("a", seed=2**70)
    adapters.save("a", tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with torch.no_grad():
        adapters.parameters("a")[0][0, 0] = float("nan")
    with pytest.raises(InputError, match="adapter 'a' holds a number that is not finite, and is not saved"):
        adapters.save("a", tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    with pytest.raises(InputError, match="layers_pattern needs layers_to_transform"):
        adapters.add("b", layers_pattern="layers")


def test_new_weights_never_lie_beside_an_old_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken off between the two files, a folder is refused; another lora_alpha would misread the weights in silence."""
    adapters = Adapters(pair()[1])
    adapters.add("a", alpha=16.0)
    adapters.add("b", alpha=160.0, seed=1)
    adapters.save("a", tmp_path)
    replace = os.replace

    def broken_off(source: Path, target: Path) -> None:
        if target.name == "adapter_config.json":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", broken_off)
    with pytest.raises(KeyboardInterrupt):
        adapters.save("b", tmp_path)
    with pytest.raises(InputError, match="adapter_config.json: no such file"):
        adapters.load("c", tmp_path)


def test_an_adapter_that_brings_another_head_is_refused(tmp_path: Path) -> None:
    """While another adapter is merged, the head to compare with is still the backbone's own."""
    model, backbone = pair()
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"])).save_pretrained(tmp_path)
    adapters = Adapters(backbone)
    adapters.load("a", tmp_path)
    shake(adapters, "a")
    adapters.merge("a")
    adapters.load("b", tmp_path)
    weights(lambda t: t["base_model.model.lm_head.base_layer.weight"].mul_(2))(tmp_path)
    with pytest.raises(InputError, match="lm_head.base_layer.weight' is not the backbone's head"):
        adapters.load("c", tmp_path)
