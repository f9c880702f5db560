"""Added tokens that lie beside a tokenizer.json."""

import json

import pytest
import tokenizers as tk
import transformers

from mfllm_ref.errors import InputError
from mfllm_ref.lm.tokenizer import Tokenizer


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
def test_added_tokens_that_a_tokenizer_json_lacks_come_from_the_files_beside_it(file, tmp_path):
    """In the order of their ids, as in transformers; where that makes another id of one, the folder is refused."""
    vocab = {character: i for i, character in enumerate(sorted(tk.pre_tokenizers.ByteLevel.alphabet()))}
    model = tk.Tokenizer(tk.models.BPE(vocab, []))
    model.pre_tokenizer, model.decoder = tk.pre_tokenizers.ByteLevel(add_prefix_space=False), tk.decoders.ByteLevel()
    model.save(str(tmp_path / "tokenizer.json"))
    template = "{{ messages[0].content }}<end>"
    config = {"eos_token": "<end>", "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}

    def folder(ids):
        named = {file: ids, "tokenizer_config.json": config}
        if file == "tokenizer_config.json":
            entries = {str(id): {"content": token, "special": token == "<end>"} for token, id in ids.items()}
            named = {file: config | {"added_tokens_decoder": entries}}
        for name, content in named.items():
            (tmp_path / name).write_text(json.dumps(content))
        return tmp_path

    ours = Tokenizer.load(folder({"<end>": 257, "<note>": 256}))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "a"}]
    assert ours.chat(chat) == theirs.apply_chat_template(chat, return_dict=False) == [vocab["a"], 257]
    assert ours.eos_ids == (theirs.eos_token_id,) == (257,) and ours.vocab_size == len(theirs) == 258
    ids = [*ours.encode("a"), 256, 257]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "a<note>"
    assert not {256, 257} & set(ours.encode("a<note><end>"))
    with pytest.raises(InputError, match="another id than '<end>' has, 263"):
        Tokenizer.load(folder({"<end>": 263}))
