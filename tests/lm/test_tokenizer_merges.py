"""BPE merges of a tokenizer.json: those that are refused, and those that lead to an added token or through one."""

import json

import pytest
import tokenizers as tk
import transformers

from mfllm_ref.errors import InputError
from mfllm_ref.lm.tokenizer import Tokenizer


@pytest.mark.parametrize("merges", [["a b"], [["a", "b"]], [["a", "\u4f60"]], [["a", "##b"]]])
def test_a_prefix_for_what_continues_a_word_is_refused(merges, tmp_path):
    """`tokenizers` panics on some such files, which ends the process; no checkpoint of the four families has one."""
    vocab = {piece: i for i, piece in enumerate(["a", "b", "\u4f60", "ab", "a\u4f60", "##b", "a##b"])}
    model = {"type": "BPE", "continuing_subword_prefix": "##", "vocab": vocab, "merges": merges}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    with pytest.raises(InputError, match="tokenizer.json: not a tokenizer: a BPE model with a continuing_subword_prefix"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("kind", ["whole words", "as it stands", "ignore_merges"])
def test_longer_pieces_are_made_through_an_added_token(kind, tmp_path):
    """Where transformers matches no added token, the ids are its own, even if merges make that token on the way; where a text's
    merges end in it, it gives way to what it was made of."""
    vocab = {character: i for i, character in enumerate(sorted(tk.pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("c", "a"), ("ca", "t"), ("Ġ", "cat"), ("Ġcat", "s")]
    vocab |= {"".join(merge): len(vocab) + i for i, merge in enumerate(merges)}
    vocab["alone"] = len(vocab)  # an item that no merge makes
    model = tk.Tokenizer(tk.models.BPE(vocab, merges, ignore_merges=kind == "ignore_merges"))
    model.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tk.decoders.ByteLevel()
    words = [tk.AddedToken(word, single_word=True) for word in ("cat", "ca", "alone")]
    if kind == "as it stands":
        model.normalizer = tk.normalizers.Lowercase()
        words = [tk.AddedToken(word, normalized=False) for word in ("cat", "ca", "alone")]
    model.add_tokens(words)
    model.save(str(tmp_path / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path)
    added = {vocab[word] for word in ("cat", "ca", "alone")}
    for text in (" CATS", " Cat", "a Cat's") if kind == "as it stands" else (" cats", "the cats'", " caps"):
        expected = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == [part for id in expected for part in ([vocab["c"], vocab["a"]] if id == vocab["ca"] else [id])]
    for text in ("cat", "a cat", "scat", "ca", "alone", "alone alone"):
        assert not added & set(ours.encode(text)) and ours.decode(ours.encode(text)) == text


def test_a_text_has_one_encoding(tmp_path):
    """A BPE's dropout, meant for training, would make another one in every call."""
    vocab = {character: i for i, character in enumerate(sorted(tk.pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("c", "a"), ("ca", "t")]
    vocab |= {"".join(merge): len(vocab) + i for i, merge in enumerate(merges)}
    model = tk.Tokenizer(tk.models.BPE(vocab, merges, dropout=0.5))
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert [tokenizer.encode("cat") for _ in range(20)] == [[vocab["cat"]]] * 20
