"""The backbone against transformers, family by family, and the properties nobody else checks for us."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mfllm_ref.lm.backbone as module
from mfllm_ref.errors import InputError
from mfllm_ref.lm.backbone import Backbone, causal_attention, plain_attention
from mfllm_ref.lm.config import Config

FAMILIES = ("qwen2", "qwen3", "llama", "mistral")
BASE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def oracle(config: dict, seed: int = 0) -> transformers.PreTrainedModel:
    """transformers' model of a published config.json, all weights random (also biases and norms, which start flat)."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model


def ours(model: transformers.PreTrainedModel, config: dict) -> Backbone:
    backbone = Backbone(Config.from_json(config, "config.json"))
    backbone.load_state_dict(model.state_dict())
    return backbone.eval()


def token_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(BASE["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def published_configs(draw: st.DrawFn, family: str) -> dict:
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = kv_heads * group
    head_dim = draw(st.sampled_from([4, 6, 16, 22]))
    explicit = draw(st.booleans())  # head_dim in the file, and then not hidden_size / heads
    config = BASE | {
        "model_type": family,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": heads * (draw(st.sampled_from([2, 8, 12])) if explicit else head_dim),
        "intermediate_size": draw(st.integers(1, 70)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "tie_word_embeddings": draw(st.booleans()),
        "rope_theta": draw(st.sampled_from([100.0, 10000.0, 500000])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
        "rope_scaling": draw(st.sampled_from([None, {"rope_type": "default"}, LLAMA3])),
    }
    if explicit or family == "qwen3":
        config["head_dim"] = head_dim
    if family in ("llama", "qwen3"):
        config["attention_bias"] = draw(st.booleans())
    if family == "llama":
        config["mlp_bias"] = draw(st.booleans())
    if family == "mistral":
        config["sliding_window"] = draw(st.sampled_from([None, 1, 3, 100]))
    if family.startswith("qwen"):
        config |= {"use_sliding_window": draw(st.booleans()), "sliding_window": draw(st.integers(1, 8))}
        config["max_window_layers"] = draw(st.integers(0, 3))
    return config


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_equal_transformers(family: str) -> None:
    """For every drawn configuration, in either layout of config.json: float32 logits within 1e-4 of transformers, and
    the same greedy continuation."""

    @settings(max_examples=25, derandomize=True, deadline=None, database=None)
    @given(config=published_configs(family), seed=st.integers(0, 999))
    def check(config: dict, seed: int) -> None:
        model = oracle(config, seed)
        written = model.config.to_dict()  # the layout of transformers 5
        assert Config.from_json(written, "v5") == Config.from_json(config, "published")
        backbone = ours(model, written if seed % 2 else config)
        assert Config.from_json(backbone.config.to_json(), "ours") == backbone.config
        ids = token_ids(2, 13, seed=seed)
        with torch.no_grad():
            assert (backbone(ids) - model(ids).logits).abs().max() < 1e-4
            theirs = ids
            for _ in range(6):
                ids = torch.cat((ids, backbone(ids)[:, -1].argmax(-1, keepdim=True)), dim=1)
                following = model(theirs, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
                theirs = torch.cat((theirs, following), dim=1)
        assert torch.equal(ids, theirs)

    check()


def test_keys_left_out_mean_what_transformers_makes_of_them() -> None:
    """A sparse config.json means the same to both, family by family."""
    for family in FAMILIES:
        sparse = {key: BASE[key] for key in ("vocab_size", "intermediate_size", "num_hidden_layers")}
        sparse |= {"model_type": family, "hidden_size": 64, "num_attention_heads": 32}
        model = oracle(sparse)
        config = Config.from_json(sparse, "config.json")
        with torch.no_grad():
            assert (ours(model, sparse)(token_ids(1, 5)) - model(token_ids(1, 5)).logits).abs().max() < 1e-4
        assert config == Config.from_json(model.config.to_dict(), "v5"), family


def test_positions_turn_queries_and_keys_as_in_transformers() -> None:
    """Positions far beyond the context, with llama3's scaling, and per row: logits as transformers' position_ids."""
    config = BASE | {"model_type": "llama", "rope_scaling": LLAMA3}
    model = oracle(config)
    ids = token_ids(2, 9)
    positions = torch.stack((torch.arange(9) + 3000, torch.arange(9) * 7))
    backbone = ours(model, config)
    with torch.no_grad():
        # An explicit mask keeps transformers from reading jumps in position_ids as borders between packed documents.
        mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
        theirs = model(ids, attention_mask=mask, position_ids=positions).logits
        assert (backbone(ids, positions) - theirs).abs().max() < 1e-4
        assert torch.equal(backbone(ids, positions[0]), backbone(ids, positions[:1].expand(2, -1)))


def test_gradients_equal_transformers() -> None:
    """The loss's gradient with respect to every weight is transformers' own."""
    config = BASE | {"model_type": "qwen3", "head_dim": 10, "tie_word_embeddings": True}
    model = oracle(config)
    backbone = ours(model, config)
    ids = token_ids(3, 11)
    for net, logits in ((model, model(ids).logits), (backbone, backbone(ids))):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        assert all(parameter.grad is not None for parameter in net.parameters())
    theirs = dict(model.named_parameters())
    for name, parameter in backbone.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(backbone(ids), logits.detach()), "what saves memory where no gradient is made changes no bit"


def test_attend_sees_each_layer_once_and_decides_its_attention() -> None:
    """Passing the default attention through the hook changes nothing; passing a block mask separates the blocks."""
    config = BASE | {"model_type": "mistral", "sliding_window": 3, "head_dim": 6}
    backbone = Backbone(Config.from_json(config, "config.json")).double()
    ids, seen = token_ids(2, 8), []

    def default(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert q.shape == (2, 4, 8, 6) and k.shape == v.shape == (2, 2, 8, 6)
        seen.append(layer)
        return causal_attention(q, k, v, backbone.config.windows[layer])

    block = torch.block_diag(torch.ones(5, 5), torch.ones(3, 3)).tril().bool()

    def blocks(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=block & ~block.tril(-3), enable_gqa=True)

    with torch.no_grad():
        assert torch.equal(backbone(ids, attend=default), backbone(ids)) and seen == [0, 1]
        separate = torch.cat((backbone(ids[:, :5]), backbone(ids[:, 5:])), dim=1)
        positions = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
        torch.testing.assert_close(backbone(ids, positions, blocks), separate, rtol=0, atol=1e-12)


def test_in_float64_a_row_does_not_depend_on_its_batch_nor_on_later_tokens() -> None:
    """Row i's logits are the same alone, in a batch, and as the prefix of a longer text, to float64 rounding."""
    for family in FAMILIES:
        config = Config.from_json(BASE | {"model_type": family, "sliding_window": 4}, "config.json")
        backbone = Backbone(config).double()
        ids = token_ids(7, 19)
        with torch.no_grad():
            together = backbone(ids)
            for row in range(7):
                alone = backbone(ids[row : row + 1, :12])
                torch.testing.assert_close(alone, together[row : row + 1, :12], rtol=0, atol=1e-12)


def test_half_precision_and_autocast_stay_near_float32() -> None:
    """bfloat16 weights and bfloat16 autocast give float32's logits up to bfloat16's digits; q, k, v share one dtype."""
    config = BASE | {"model_type": "qwen3", "head_dim": 8, "attention_bias": True}
    backbone = ours(oracle(config), config)
    ids, dtypes = token_ids(2, 9), set()

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dtypes.update({q.dtype, k.dtype, v.dtype})
        return causal_attention(q, k, v, None)

    exact = backbone(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = backbone(ids, attend=attend)
        mixed.float().logsumexp(-1).sum().backward()
    assert mixed.dtype == torch.bfloat16 and len(dtypes) == 1
    half = backbone.bfloat16()(ids)
    assert half.dtype == torch.bfloat16
    for approximate in (mixed, half):
        assert (approximate.float() - exact).abs().max() < 0.03 * exact.abs().max()
    assert backbone.float()(ids[:0]).shape == (0, 9, 61)


@pytest.mark.parametrize("window", [None, 5])
def test_plain_products_are_the_same_attention(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 products of whole matrices give the fused kernel's values and gradients; in bfloat16, where a CPU prefers them
    for training, both stay near float32's."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    up = torch.randn(2, 4, 9, 8, dtype=torch.float64)

    def both(out: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        return [out.double(), *(g.double() for g in torch.autograd.grad(out, inputs, up.to(out.dtype)))]

    visible = torch.ones(9, 9, dtype=torch.bool).tril().triu(-9 if window is None else 1 - window)
    mask = torch.zeros(9, 9, dtype=torch.float64).masked_fill_(~visible, -torch.inf)
    fused = both(causal_attention(q, k, v, window), (q, k, v))
    for plain in (plain_attention(q, k, v, mask), plain_attention(q, k, v, mask.expand(2, 1, 9, 9))):
        torch.testing.assert_close(both(plain, (q, k, v)), fused, rtol=0, atol=1e-12)
    calls = []
    monkeypatch.setattr(module, "plain_attention", lambda *inputs: calls.append(1) or plain_attention(*inputs))
    rough = tuple(x.detach().bfloat16().requires_grad_() for x in (q, k, v))
    for found, exact in zip(both(causal_attention(*rough, window), rough), fused, strict=True):
        assert (found - exact).abs().max() < 0.03 * exact.abs().max()
    assert calls == [1]
    causal_attention(*(x.detach() for x in rough), window)
    assert calls == [1], "without a gradient the fused kernel does it"


def test_bfloat16_rounds_where_transformers_does() -> None:
    """RoPE's frequencies and angles stay float32 in a bfloat16 model: the logits over thousands of positions are transformers'."""
    config = BASE | {"model_type": "llama"}
    weights = oracle(config)
    model = transformers.LlamaForCausalLM(weights.config).eval()
    for module in model.modules():  # parameters only: a cast of the whole module would round the angles' buffer
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(parameter.bfloat16()))
    model.load_state_dict(weights.state_dict())
    backbone = ours(weights, config).bfloat16()
    positions = 333 * torch.arange(12)[None]
    with torch.no_grad():
        theirs = model(token_ids(1, 12), position_ids=positions).logits
        # Products round in ways of the machine's own, which costs 0.018 at most; frequencies in bfloat16 0.037 and more.
        assert (backbone(token_ids(1, 12), positions) - theirs).abs().max() <= 0.025 * theirs.abs().max()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"model_type": None}, "model_type None"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
        ({"rope_scaling": "llama3"}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "'dynamic'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 33}, "hidden_size 33"),
        ({"hidden_size": 32.0}, "hidden_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"intermediate_size": 10**30}, "intermediate_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"head_dim": 7}, "head_dim 7"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
        ({"model_type": "mistral", "layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ({"model_type": "mistral", "sliding_window": None, "layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "chunked"]}, "layer_types"),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(change: dict, named: str) -> None:
    config = BASE | {"model_type": "llama"} | change
    with pytest.raises(InputError) as error:
        Config.from_json(config, "some/config.json")
    assert str(error.value).startswith("some/config.json: ") and named in str(error.value)
