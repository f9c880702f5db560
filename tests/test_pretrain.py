import copy
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mfllm_ref import doors, pretrain, report, simulation, training
from mfllm_ref.errors import InputError
from mfllm_ref.lm import LanguageModel
from mfllm_ref.lm.backbone import Backbone
from mfllm_ref.lm.checkpoint import save_backbone
from mfllm_ref.lm.tokenizer import Tokenizer
from mfllm_ref.packing import collate
from mfllm_ref.society import agora, prompts
from mfllm_ref.society.annotate import RuleAnnotator
from mfllm_ref.society.corpus import Corpus, Mixture, Past
from mfllm_ref.society.events import DIMENSIONS
from mfllm_ref.society.readers import load_events, write_events
from mfllm_ref.society.signals import parse

TEXTS = st.text(alphabet=st.characters(codec="utf-8"), max_size=60) | st.sampled_from(
    ["<0x41>", "<|endoftext|>", "转发微博[哈哈]", "\u2028\x00", "43% of 100% 5%", "🕯️"]
)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(TEXTS)
def test_the_tokenizer_decodes_what_it_encoded(random_lm, text):
    """For any text decode(encode(text)) is the text, and no id of end of text is among the ids."""
    ids = random_lm.tokenizer.encode(text)
    assert random_lm.tokenizer.decode(ids) == text
    assert 0 not in ids


def test_drawing_the_tokenizers_texts_hears_ctrl_c():
    """Python raises KeyboardInterrupt in its main thread alone, and drawing the texts takes minutes on a slow machine."""
    threads = set()

    def texts():
        for number in range(3000):
            threads.add(threading.get_ident())
            yield f"text {number}"

    pretrain.train_tokenizer(texts(), 300)
    assert threads == {threading.main_thread().ident}


def test_a_label_and_its_share_are_one_piece():
    """Wherever a share is stated, one token holds the label and its percentage, and the heading if it is the first of its
    dimension: the same tokens where a summary is written and where it is read."""
    written = {
        "en": ["stance: support 45%", " oppose 05%", " neutral 100%", "; belief: doubt 10%"],
        "zh": ["立场：支持45%", " 反对05%", " 中立100%", "；信念：怀疑10%"],
    }
    trained = pretrain.train_tokenizer(["".join(pieces) for pieces in written.values()] * 20, 900)
    for language, pieces in written.items():
        assert trained.encode("".join(pieces)).tokens == pieces
        read = trained.encode(prompts.WORDING[language].population + "".join(pieces) + "\n").tokens
        assert read[-len(pieces) - 1 : -1] == pieces
    assert trained.encode(" oppose 05% neutral 100%").tokens == [" oppose 05%", " neutral 100%"]


def test_a_tokenizer_is_trained_on_populations_in_every_events_language():
    event = agora.event("train", 0)
    both = [replace(event, id=language, language=language, actions=event.actions[:40]) for language in ("en", "zh")]
    texts = list(pretrain.sample_texts(Corpus(2, RuleAnnotator(), 10, Mixture(), both.__getitem__), 20, 0))
    for language in ("en", "zh"):
        populations = sum(parse(text, language).keys() == DIMENSIONS.keys() for text in texts)
        assert populations >= 10 * pretrain.POPULATIONS, language


@pytest.mark.parametrize("mixed", [True, False])
def test_an_update_weighs_a_summarys_tokens_more(mixed):
    """Loss and gradient are those of the mean over all learned tokens, a summary's counting SUMMARY_WEIGHT times, of products
    in bfloat16 or of none."""
    corpus = Corpus(2, RuleAnnotator(), 10, Mixture(summaries=0.5), lambda index: agora.event("train", index))
    tokenizer = Tokenizer.load(Path(__file__).resolve().parents[1] / "checkpoints" / "tiny")
    backbone = Backbone(pretrain.config_for("qwen2", pretrain.Shape(32, 2, 4, 2, 48, 0), tokenizer.vocab_size))
    pretrain.initialise(backbone, torch.Generator().manual_seed(0))
    before = copy.deepcopy(backbone)
    plan = pretrain.Settings(steps=1, rows=6, mixed=mixed)
    row = next(pretrain.train_steps(backbone, tokenizer, corpus, plan, 0, pretrain.optimizers(backbone, plan.lr)))
    rng = np.random.default_rng([plan.seed, 1, 0])
    batch = collate([corpus.draw(rng) for _ in range(plan.rows)], tokenizer, end=0)
    weights = torch.tensor([pretrain.SUMMARY_WEIGHT if sort == "mean-field" else 1.0 for sort in batch.sorts])
    assert 0 < batch.sorts.count("mean-field") < plan.rows
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        sums, counts = pretrain.loss_sums(before, batch)
    other = pretrain.loss_sums(before, batch)[0] if mixed else None
    assert not mixed or not torch.equal(sums, other), "so that the two cases can be told apart"
    loss = (weights * sums).sum() / (weights * counts).sum()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in before.parameters()]).norm()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-6) and row["gradient_norm"] == pytest.approx(norm.item(), rel=1e-3)


def test_dropout_is_noise_of_the_step_while_training_and_nothing_after():
    """The same seed drops the same, another one other numbers; a loaded or finished backbone drops nothing."""
    corpus = Corpus(2, RuleAnnotator(), 10, Mixture(), lambda index: agora.event("train", index))
    tokenizer = Tokenizer.load(Path(__file__).resolve().parents[1] / "checkpoints" / "tiny")
    backbone = Backbone(pretrain.config_for("qwen2", pretrain.Shape(32, 2, 4, 2, 48, 0), tokenizer.vocab_size))

    def losses(dropout, start):
        trained, plan = copy.deepcopy(backbone), pretrain.Settings(steps=4, rows=2, seed=2**62, dropout=dropout)
        steps = pretrain.train_steps(trained, tokenizer, corpus, plan, start, [])  # nothing is learned
        return [row["loss"] for row in steps], LanguageModel(trained, tokenizer)

    (usual, _), (some, lm), (again, _), (late, _) = losses(0.0, 0), losses(0.5, 0), losses(0.5, 0), losses(0.5, 2)
    assert some == again and late == some[2:] and all(a != b for a, b in zip(usual, some, strict=True))
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(lm.backbone(ids), backbone.eval()(ids))


@pytest.mark.parametrize("width", [3, 1000])
def test_the_held_out_loss_is_what_real_actions_cost_who_is_told_the_shares(width):
    """Nats a token of the language model, of as many actions as fit, without dropout though it is in training."""
    tokenizer = Tokenizer.load(Path(__file__).resolve().parents[1] / "checkpoints" / "tiny")
    backbone = Backbone(pretrain.config_for("qwen2", pretrain.Shape(32, 2, 4, 2, 48, 0), tokenizer.vocab_size))
    pasts = [Past(agora.event("train", index), RuleAnnotator(), 10) for index in range(2)]
    for module in backbone.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    lost = pretrain.held_out_loss(backbone, tokenizer, pasts, width)
    assert backbone.training
    lm, nats, tokens = LanguageModel(backbone, tokenizer), 0.0, 0
    for past in pasts:
        document = past.policy(15, "empirical", width)
        branches = document.branches[: int(collate([("", document)], tokenizer, end=0).segments.max())]
        assert len(branches) == 3 or 3 < len(branches) < 150
        texts = [text for _, text in branches]
        nats -= lm.log_prob([document.prefix + private for private, _ in branches], texts, end_of_text=True).sum().item()
        tokens += sum(len(tokenizer.encode(text)) + 1 for text in texts)
    assert lost == pytest.approx(nats / tokens, rel=1e-5)


def test_optimizer_state_survives_tensors():
    torch.manual_seed(0)
    shape = pretrain.Shape(dim=16, layers=1, heads=2, kv_heads=1, intermediate=16, vocab=300)
    backbones = [Backbone(pretrain.config_for("qwen2", shape, 300)) for _ in range(2)]
    backbones[1].load_state_dict(backbones[0].state_dict())
    ids = torch.arange(12).reshape(2, 6)

    def step(backbone, optimizers):
        torch.nn.functional.cross_entropy(backbone(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    first = pretrain.optimizers(backbones[0], 1e-2)
    step(backbones[0], first)
    second = pretrain.optimizers(backbones[1], 1e-2)
    backbones[1].load_state_dict(backbones[0].state_dict())
    tensors = {name: t.clone() for name, t in training.optimizer_tensors(first).items()}
    training.load_optimizer_tensors(second, tensors)
    for backbone, optimizers in zip(backbones, (first, second), strict=True):
        step(backbone, optimizers)
    for p, q in zip(*(b.parameters() for b in backbones), strict=True):
        assert torch.equal(p, q)


def test_the_learning_rate_rises_stays_and_falls():
    rates = [pretrain.learning_rate(step, 400, 1.0) for step in range(400)]
    assert rates[0] == pytest.approx(0.02) and max(rates) == 1.0 and rates[-1] == pytest.approx(0.005)
    assert np.all(np.diff(rates[:50]) > 0) and np.all(np.diff(rates[200:]) < 0)


def test_initial_weights_are_a_function_of_the_seed():
    shape = pretrain.Shape(dim=16, layers=2, heads=2, kv_heads=1, intermediate=16, vocab=300)
    one, two = (Backbone(pretrain.config_for("qwen3", shape, 300)) for _ in range(2))
    for backbone in (one, two):
        pretrain.initialise(backbone, torch.Generator().manual_seed(7))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("events", [None, [agora.event("train", index) for index in range(10)]])
def test_a_corpus_remembers_as_long_as_it_is_told(events):
    corpus, held_out = pretrain.corpora(events, 10, 960)
    assert {past.half_life for past in (corpus.past(0), *held_out)} == {960}


@pytest.mark.parametrize("events", [None, [agora.event("train", index) for index in range(10)]])
def test_a_corpus_abridges_as_it_is_told(events):
    """By default every summary tells of all dimensions."""
    for abridged, least in ((0.0, len(DIMENSIONS)), (1.0, 1)):
        corpus, rng = pretrain.corpora(events, 10, abridged=abridged)[0], np.random.default_rng(0)
        drawn = [corpus.draw(rng) for _ in range(240)]
        said = {len(parse(text, "en")) for sort, document in drawn if sort == "mean-field" for _, text in document.branches[:1]}
        assert min(said) == least and max(said) == len(DIMENSIONS), abridged


def test_events_that_are_left_out_are_kept_from_pretraining():
    events = [agora.event("train", index) for index in range(4)]
    corpus, held_out = pretrain.corpora(events, 10, leave_out=[events[2].id])
    assert {corpus.past(i).event.id for i in range(corpus.count)} == {events[i].id for i in (0, 1, 3)}
    assert [past.event.id for past in held_out] == [events[2].id]
    with pytest.raises(InputError, match="4 events are too few to pretrain on and to keep these"):
        pretrain.corpora(events, 10, leave_out=[event.id for event in events])


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    """Ten events as JSON Lines."""
    path = tmp_path_factory.mktemp("data") / "events.jsonl"
    write_events([agora.event("train", index) for index in range(10)], path)
    return path


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "mistral"])
def test_a_new_backbone_is_transformers_own_family(tmp_path, model_type):
    """The same logits, over more tokens than a small mistral's window."""
    backbone = Backbone(pretrain.config_for(model_type, pretrain.Shape(32, 2, 4, 2, 48, 0), 300))
    pretrain.initialise(backbone, torch.Generator().manual_seed(0))
    save_backbone(backbone, tmp_path, dtype=torch.float32)
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert oracle.config.model_type == model_type
    assert getattr(oracle.config, "sliding_window", None) == (256 if model_type == "mistral" else None)
    ids = torch.arange(290)[None]
    with torch.no_grad():
        assert (oracle(ids).logits - backbone(ids)).abs().max() < 1e-4


def test_a_pretrained_folder_loads_in_transformers_and_a_killed_run_resumes_to_the_same_bytes(
    small_data, tmp_path, monkeypatch, door
):
    # All as in earnest, but small.
    monkeypatch.setitem(pretrain.SHAPES, "tiny", pretrain.Shape(32, 2, 4, 2, 48, 700))
    monkeypatch.setattr(pretrain, "TOKENIZER_DOCUMENTS", 100)
    options = ["--stage", "pretrain", "--data", small_data, "--shape", "tiny", "--steps", 4, "--rows", 2]
    options += ["--save-every", 2, "--threads", 1, "--half-life", 960, "--leave-out", "agora-train-0003"]
    assert door(*options, "--out", tmp_path / "whole")[0] == 0
    lm = LanguageModel.load(tmp_path / "whole")
    ids = torch.tensor([lm.tokenizer.encode("Topic: a dam\nPost:\n")])
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    assert (oracle(ids).logits - lm.backbone(ids)).abs().max() < 1e-4
    # Not AutoTokenizer: it forces Qwen2's own pieces on every checkpoint of type qwen2.
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "whole").encode("Topic: a dam\nPost:\n") == ids[0].tolist()
    *log, last = [json.loads(line) for line in open(tmp_path / "whole" / "log.jsonl")]
    pasts = pretrain.corpora(load_events(small_data), 10, 960, ["agora-train-0003"])[1]
    lost = pretrain.held_out_loss(lm.backbone, lm.tokenizer, pasts, 32)
    assert log[-1]["dev_loss"] == pytest.approx(lost, rel=2e-4) != log[0]["dev_loss"], "of what is written, but for its rounding"
    assert [row["step"] for row in log] == [0, 1, 2, 3] and (tmp_path / "whole" / "loss.png").stat().st_size > 5000
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["settings"]["half_life"] == 960
    assert last == {"response": json.loads((tmp_path / "whole" / "run.json").read_text())["response"]}

    write = training.write_bytes

    def interrupted(path, content):
        write(path, content)
        if path.name == "state.safetensors":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "write_bytes", interrupted)
        code, _, said = door(*options, "--out", tmp_path / "cut")
    assert code == 130 and f"--out {tmp_path / 'cut'} --resume" in said
    code, _, said = door(*options, "--resume")
    assert code == 2 and "--resume needs --out" in said
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    code, _, said = door(*options, "--seed", 1, "--out", tmp_path / "cut", "--resume")
    assert code == 2 and "seed" in said
    clip, norms = torch.nn.utils.clip_grad_norm_, []

    def poisoned(parameters, most):
        norms.append(clip(parameters, most) * torch.nan)
        return norms[-1]

    state = tmp_path / "cut" / "state.safetensors"
    kept, (facts, groups) = state.read_bytes(), training.load_state(state, torch.device("cpu"))
    groups["backbone"].popitem()
    training.save_state(state, facts, **groups)
    code, _, said = door(*options, "--out", tmp_path / "cut", "--resume")
    assert code == 2 and "other parameters" in said and state.name in said
    state.write_bytes(kept)
    with monkeypatch.context() as patch:  # a gradient that is not finite: nothing moves, what is on disk stays good
        patch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
        code, _, said = door(*options, "--out", tmp_path / "cut", "--resume")
    assert code == 2 and "the gradient became nan at step 2 (agora-train-" in said and "good state is in state.safetensors" in said
    assert len(norms) == len(said.splitlines()) == 1 and state.read_bytes() == kept
    assert door(*options, "--out", tmp_path / "cut", "--resume")[0] == 0
    files = [simulation.weights_of(tmp_path / name) for name in ("whole", "cut")]
    assert files[0].keys() == files[1].keys() >= {"weights/model.safetensors", "tokenizer/tokenizer.json", "config/config.json"}
    for one, other in zip(*(some.values() for some in files), strict=True):
        assert one.read_bytes() == other.read_bytes(), "equal backbones have equal digests in the records of what is done with them"
    assert door(*options, "--out", tmp_path / "cut", "--resume")[0] == 0, "a finished run stays as it is"

    # Another pretraining goes on from it: at first the same numbers, then other weights, the same tokens.
    more = ["--stage", "pretrain", "--data", small_data, "--rows", 2, "--threads", 1, "--backbone", tmp_path / "whole"]
    code, _, said = door(*more, "--steps", 3, "--shape", "tiny", "--out", tmp_path / "more")
    assert code == 2 and "--shape: is that of --backbone" in said and not (tmp_path / "more").exists()
    for name, damage, said in (("untied", {"tie_word_embeddings": False}, "its head"), ("odd", {"model_type": "x"}, "model_type")):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | damage))
        tensors = load_file(tmp_path / name / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
        save_file(tensors, tmp_path / name / "model.safetensors")
        code, _, errors = door(*more[:-1], tmp_path / name, "--steps", 3, "--out", tmp_path / "more")
        assert code == 2 and said in errors and len(errors.splitlines()) == 1 and not (tmp_path / "more").exists()
    assert door(*more, "--steps", 3, "--lr", 1e-9, "--dropout", 0, "--out", tmp_path / "same")[0] == 0
    assert door(*more, "--steps", 3, "--dropout", 0, "--abridged", 1, "--out", tmp_path / "more")[0] == 0
    first = [json.loads(open(tmp_path / name / "log.jsonl").readline()) for name in ("same", "more")]
    assert first[0]["loss"] != first[1]["loss"], "the same weights, but summaries that end early"
    same, other = (LanguageModel.load(tmp_path / name) for name in ("same", "more"))
    assert (same.backbone(ids) - lm.backbone(ids)).abs().max() < 0.02 < (other.backbone(ids) - lm.backbone(ids)).abs().max()
    record = json.loads((tmp_path / "more" / "run.json").read_text())
    assert (record["settings"]["model_type"], record["settings"]["shape"]) == ("qwen2", None), "its own, not a new backbone's"
    assert record["settings"]["half_life"] == 960 and "weights/model.safetensors" in record["sha256"]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "more" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(("fast", "dtype", "mixed"), [
    (True, "auto", True), (False, "auto", False), (True, "float32", False), (False, "bfloat16", True),
])  # fmt: skip
def test_products_are_bfloat16_where_the_cpu_multiplies_it_fast(tmp_path, monkeypatch, door, fast, dtype, mixed):
    """Elsewhere they take 40 times as long as float32's."""
    used = []
    monkeypatch.setattr(doors, "fast_bfloat16", lambda: fast)
    monkeypatch.setattr(pretrain, "run", lambda run, settings, *_, **__: used.append(settings["mixed"]) or {"parameters": 0, "response": {}})
    monkeypatch.setattr(report, "loss_curve", lambda *_: None)
    arguments = ("--stage", "pretrain", "--dtype", dtype, "--device", "cpu", "--threads", 1, "--out", tmp_path / "out")
    door(*arguments)
    assert used == [mixed]


@pytest.mark.parametrize(("arguments", "said"), [
    (["--data", "nowhere"], "nowhere"), (["--split", "dev"], "--split dev"), (["--leave-out", "a"], "--leave-out a"),
    (["--lr", "7"], "--lr 7"), (["--steps", "0"], "--steps"), (["--stage", "x"], "--stage"),
    (["--stage", "pretrain", "--dropout", "1"], "--dropout 1"), (["--stage", "pretrain", "--abridged", "1.1"], "--abridged 1.1"), (["--stage", "pretrain", "--dropout", "nan"], "--dropout nan"),
    (["--stage", "pretrain", "--data", ..., "--leave-out", "nobody"], "--leave-out nobody: no such event"),
    (["--stage", "pretrain", "--dtype", "float64"], "--dtype float64"), (["--stage", "pretrain", "--steps", "3,4"], "--steps 3,4"),
])  # fmt: skip
def test_bad_options_are_one_line(tmp_path, arguments, said, small_data, door):
    arguments = [small_data if argument is ... else argument for argument in arguments]
    code, _, errors = door(*arguments, "--out", tmp_path / "out")
    assert code == 2 and said in errors and len(errors.splitlines()) == 1
    assert not (tmp_path / "out").exists()
