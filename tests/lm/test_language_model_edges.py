"""The language model where something runs out, is missing, or is not a number."""

import json
import math

import pytest
import torch

from mfllm_ref.errors import InputError
from mfllm_ref.lm import LanguageModel, worlds


def test_bos_comes_first_where_the_tokenizer_puts_it(folder, tmp_path):
    for file in folder["llama"].iterdir():
        (tmp_path / file.name).symlink_to(file)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").unlink()
    first = {"single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": []}
    template = {"type": "TemplateProcessing", **first, "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec | {"post_processor": template}))
    lm, bare = (LanguageModel.load(path, dtype=torch.float64) for path in (tmp_path, folder["llama"]))
    ids = [1, *lm.tokenizer.encode("the rumor")]
    assert 1 not in lm.tokenizer.encode("the rumor")
    for continuation in ("!", " is true"):
        assert lm.log_prob(["the rumor"], [continuation]) == bare.log_prob([ids], [continuation])
    assert lm.generate(["the rumor", ""], 6) == bare.generate([ids, [1]], 6)


def test_positions_run_out(lm):
    """A prompt may fill all positions, and gives one token then; one token more is refused."""
    limit = lm.backbone.config.max_positions
    full = [5 + i % 200 for i in range(limit)]
    long = lm.generate([full, full[:-3]], max_new_tokens=9, temperature=0)
    assert long == [lm.generate([full], 1, 0)[0], lm.generate([full[:-3]], 4, 0)[0]]
    with pytest.raises(InputError, match="prompt 1 has 97 tokens"):
        lm.generate([[5], full + [5]])
    written = lm.sample([full[:-3]], 9)[0]
    assert len(written) == 4 and lm.log_prob([full[:-3]], [written]) < 0, "what was written can be scored"
    with pytest.raises(InputError, match="prompt 0, with its continuation up to the last token, has 97 tokens"):
        lm.log_prob([full], [[5, 6]])
    assert lm.generate([full[:-3]], 10**13, temperature=0, repetition_penalty=1.1) == lm.generate([full[:-3]], 4, 0, repetition_penalty=1.1)


def test_no_nan_leaves_silently(folder):
    """A weight that became NaN: sampling and scoring both say so, whatever row it concerns."""
    lm = LanguageModel.load(folder["llama"])
    lm.backbone.model.norm.weight.data[0] = math.nan
    with pytest.raises(FloatingPointError):
        lm.generate(["a", "b"], 2)
    with pytest.raises(FloatingPointError):
        lm.log_prob(["a", "b"], ["c", ""])
    with pytest.raises(FloatingPointError):
        lm.ib_terms(["a"], [[5]], ["b"])


def test_ids_beyond_the_backbones_are_of_no_account(folder, lm, tmp_path):
    """A damaged tokenizer.json that gives a word the id four billion: text with a stop string is written all the same, without a
    table of four billion places."""
    for file in folder["llama"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["model"]["vocab"]["zzzz"] = 4 * 10**9
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    damaged = LanguageModel.load(tmp_path)
    assert damaged.tokenizer.vocab_size > 4 * 10**9
    assert damaged.generate(["the rumor"], 4, stop=("\n",)) == LanguageModel.load(folder["llama"]).generate(["the rumor"], 4, stop=("\n",))


def test_what_the_informations_terms_refuse(lm):
    for some in (([], [], []), (["a", "b"], [[5]], ["c", "d"]), (["a"], [[5]], [])):
        with pytest.raises(InputError, match="prior prompts$"):
            lm.ib_terms(*some)
    lm.add_adapter("of the head", targets=["lm_head"])
    with lm.adapter("of the head"), pytest.raises(InputError, match="adapts lm_head"):
        lm.ib_terms(["a"], [[5]], ["b"])


def test_nothing_to_do(lm):
    assert lm.generate([]) == [] and lm.generate(["a", "b"], max_new_tokens=0) == ["", ""]
    assert lm.log_prob([], []).shape == (0,)
    assert lm.log_prob(["a"], [""]).tolist() == [0.0]


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": -1}, {"temperature": -0.1}, {"temperature": math.nan}, {"top_k": -1}, {"top_p": 0.0},
        {"top_p": 1.1}, {"repetition_penalty": 0.0}, {"stop": [""]}, {"stop": [None]}, {"seeds": [1, 2]}, {"worlds": [1, 2]},
        {"adapters": [None, None]}, {"adapters": ["nowhere"]},
    ],
)  # fmt: skip
def test_bad_options_are_refused(lm, options):
    with pytest.raises(InputError):
        lm.generate(["a"], **options)
    if options.keys() <= {"max_new_tokens", "seeds", "worlds"}:
        with pytest.raises(InputError):
            lm.sample(["a"], **options)


@pytest.mark.parametrize("prompt", ["", [], [320], [-1], [0.5], "\ud800", None])
def test_bad_prompts_are_refused(lm, prompt):
    with pytest.raises(InputError) as error:
        lm.generate([prompt])
    assert "\n" not in str(error.value)
    with pytest.raises(InputError):
        lm.log_prob(["a", "b"], ["c"])


def test_refusals_say_which_text_it_is(lm, folder):
    for call, said in (
        (lambda: lm.log_prob(["fine", "fine"], ["a", [10**6]]), "continuation 1: token ids"),
        (lambda: lm.generate(["fine", "a\ud800"]), "prompt 1 is not valid Unicode"),
        (lambda: lm.generate(text for text in ["fine"]), "a list of prompts was expected"),
        (lambda: LanguageModel.load(folder["llama"], device="gpu"), "device 'gpu'"),
    ):
        with pytest.raises(InputError, match=said):
            call()


def test_an_end_that_the_backbone_lacks_ends_no_score(folder, tmp_path):
    for file in folder["llama"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(json.loads((tmp_path / "config.json").read_text()) | {"eos_token_id": 5000}))
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    lm = LanguageModel.load(tmp_path)
    with pytest.raises(InputError, match="names no end of text token, or one that the backbone does not have"):
        lm.log_prob(["a"], ["b"], end_of_text=True)


def test_batches_hold_prompts_of_like_length():
    """Attention pads a batch to its longest: a world's agents are taken by length, whatever the caller's order."""
    ids = [[1, 2, *[3] * (5 * (i * 7 % 10) + 1)] for i in range(10)]
    (chunk,) = worlds.cut(ids, [5] * 10, [(None, 0)] * 10, 10**9, 10**6, None)
    sizes = [len(ids[agent]) for agent in worlds.members(chunk)]
    assert sizes == sorted(sizes) and sorted(worlds.members(chunk)) == list(range(10))


def test_half_precision_runs(folder):
    for dtype in (torch.bfloat16, torch.float16):
        lm = LanguageModel.load(folder["llama"], dtype=dtype)
        prompts, worlds_ = ["the rumor", "the 谣言", "who knows", "who !"], [0, 0, 1, 1]
        assert len(lm.generate(prompts, 4, worlds=worlds_)) == 4
        exact = LanguageModel.load(folder["llama"]).log_prob(prompts, ["a"] * 4, worlds_)
        score = lm.log_prob(prompts, ["a"] * 4, worlds_)
        assert score.dtype == torch.float32
        torch.testing.assert_close(score, exact, rtol=0.2, atol=0.5)


@pytest.mark.parametrize(("sizes", "rows", "chunks"), [
    ([10] * 35, 256, [180, 170]), ([10] * 35, 100, [90, 90, 90, 80]), ([1000], 256, [250] * 4), ([7], 256, [7]), ([3, 900], 512, [455, 448]),
    ([10] * 35, None, [350]), ([], 256, []),
])  # fmt: skip
def test_processes_find_even_chunks_to_share(sizes, rows, chunks):
    """Of agents, a power of two of them, a world's cut one keeping its whole prefix; every agent once."""
    keys = [(None, world) for world, size in enumerate(sizes) for _ in range(size)]
    ids = [[1, 2, world + 3, agent] for agent, (_, world) in enumerate(keys)]
    found = worlds.cut(ids, [5] * len(ids), keys, 10**9, 10**6, rows)
    assert sorted((len(worlds.members(chunk)) for chunk in found), reverse=True) == chunks
    assert sorted(agent for chunk in found for agent in worlds.members(chunk)) == list(range(len(ids)))
    assert all(len(world.prefix) == 3 for chunk in found for world in chunk)
