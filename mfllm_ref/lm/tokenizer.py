"""Text to ids and back: tokenizer.json (by `tokenizers`) or tokenizer.model (by `sentencepiece`).

Notable:
- Nobody's text is ever a control token. The encoder is built without any added token, special or not, so "<|im_end|>"
  or "</s>" in a post is spelt out like every other text; text that holds none of them splits as the checkpoint's own
  tokenizer splits it. Decoding knows them all and leaves the special ones out.
- In a chat, added tokens are looked for in what the template wrote alone. What lies between two of them, the template's
  and the users' words joined, is encoded as plain text: the ids are the usual ones, and no content can close its turn.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
import tokenizers

from mfllm_ref.errors import InputError
from mfllm_ref.lm.chat import ChatTemplate
from mfllm_ref.lm.checkpoint import read_object

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
USER_DEFINED, CONTROL = 4, 3  # sentencepiece's types of piece


class Added(NamedTuple):
    """A token matched as a whole, apart from the text model."""

    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class Tokenizer:
    """Made by `Tokenizer.load`. `vocab_size` is the largest id, added tokens included, and one; `eos_ids` end a text, and
    `end_id` is the one to end a text with (None: there is none); `bos_id` begins a prompt (None where the checkpoint's
    tokenizer puts nothing in front)."""

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """The tokenizer of a checkpoint's folder. Raises InputError naming a missing or damaged file."""
        folder = Path(path)
        for name, kind in (("tokenizer.json", _Json), ("tokenizer.model", _SentencePiece)):
            if (folder / name).is_file():
                return cls(folder, kind(folder / name, read_object(folder / "tokenizer_config.json")))
        raise InputError(f"{folder}: no tokenizer.json and no tokenizer.model")

    def __init__(self, folder: Path, model: "_Json | _SentencePiece") -> None:
        self.folder, self.model = folder, model
        config = read_object(folder / "tokenizer_config.json")
        self.vocab_size = model.size
        names = {**read_object(folder / "special_tokens_map.json"), **config}
        self._names = {key: name for key in NAMED if (name := _content(names.get(key))) is not None}
        self._template = ChatTemplate.find(folder, config)
        end = self._id("eos_token")
        declared: tuple[int, ...] = ()
        for name in ("generation_config.json", "config.json"):
            declared = declared or _ids(read_object(folder / name).get("eos_token_id"), folder / name)
        # A chat model's tokenizer names the token that ends a turn; other models' may name one they never learnt.
        own = () if end is None or (declared and self._template is None) else (end,)
        self.eos_ids = tuple(sorted({*declared, *own}))
        self.end_id = end if end in self.eos_ids else next(iter(declared), None)
        # As in transformers, a tokenizer.json says itself what it puts in front.
        prepends = config.get("add_bos_token") if isinstance(model, _SentencePiece) else None
        self.bos_id = model.bos if prepends is None else self._id("bos_token") if prepends else None

    def _id(self, name: str) -> int | None:
        return self.model.id(self._names[name]) if name in self._names else getattr(self.model, name, None)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no BOS, no EOS, no added token. Raises InputError for what is not valid Unicode text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return self.model.encode([_checked(text) for text in texts])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special ids have none. Raises InputError for an id that does not exist."""
        return self.decode_batch([ids])[0]

    def decode_batch(self, batch: Sequence[Sequence[int]]) -> list[str]:
        """`decode` of each sequence."""
        for ids in batch:
            if len(ids) and not 0 <= min(ids) <= max(ids) < self.vocab_size:
                raise InputError(f"{self.folder}: token ids must lie between 0 and {self.vocab_size - 1}")
        return self.model.decode([list(ids) for ids in batch])

    def chat(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:  # fmt: skip
        """Ids of a chat in the checkpoint's own template, BOS included if the template writes one.

        messages: {"role", "content"} each, both text; roles are single words. `variables` go to the template as they
        are; it does not see the contents themselves (see mfllm_ref/lm/chat.py).
        Raises InputError without a template, for messages that are not so, and for what the template itself refuses.
        """
        if self._template is None:
            raise InputError(f"{self.folder}: the checkpoint has no chat template")
        for message in messages:
            if set(message) != {"role", "content"} or not re.fullmatch(r"\w+", str(message["role"]), re.ASCII):
                raise InputError("chat: a message has a role, one word, and a content, and nothing else")
            _checked(message["content"])
        variables = {**self._names, "add_generation_prompt": add_generation_prompt, **variables}
        return self._encode_parts(self._template.render(messages, variables))

    def _encode_parts(self, parts: list[str]) -> list[int]:
        """Ids of parts joined, with added tokens recognised in even parts only."""
        text = "".join(parts)
        found = self.model.find(parts[0])
        at = len(parts[0])
        for content, template in zip(parts[1::2], parts[2::2], strict=True):
            at += len(content)
            found += [(start + at, end + at, added) for start, end, added in self.model.find(template)]
            at += len(template)
        ids, done = [], 0
        for start, end, added in [*found, (len(text), len(text), None)]:
            plain = text[done:start]
            if added is not None and added.lstrip:
                plain = plain.rstrip()
            if plain:
                ids += self.model.encode([plain], first=done == 0)[0]
            if added is None:
                break
            ids.append(added.id)
            done = end
            while added.rstrip and done < len(text) and text[done].isspace():
                done += 1
        return ids


def _checked(text: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"text was expected, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"not valid Unicode text: {error.reason} at character {error.start}") from None
    return text


def _content(token: Any) -> str | None:
    """A token's text, given as text or as {"content": text, ...}."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _ids(value: Any, where: Path) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(value) is not int or not 0 <= value < 2**31 for value in values):
        raise InputError(f"{where}: eos_token_id must be a token id or a list of them, not {value!r:.60}")
    return tuple(values)


def _declared(folder: Path, config: dict[str, Any]) -> tuple[dict[str, Added], set[str]]:
    """(the added tokens that added_tokens.json and `config`, the parsed tokenizer_config.json, name; all special tokens that a
    folder names)."""
    names = read_object(folder / "special_tokens_map.json") | config
    extra = names.get("extra_special_tokens")
    named = (names | extra if isinstance(extra, dict) else names).items()  # a model's own, image_token say, too
    special = {text for key, token in named if key.endswith("_token") and (text := _content(token)) is not None}
    try:
        given = {token: Added(id, token in special) for token, id in read_object(folder / "added_tokens.json").items()}
        for id, token in (config.get("added_tokens_decoder") or {}).items():
            given[token["content"]] = Added(int(id), *(bool(token.get(key)) for key in Added._fields[1:]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: damaged added_tokens_decoder in tokenizer_config.json ({error!r:.80})") from None
    for token, added in given.items():
        if not isinstance(token, str) or not token or type(added.id) is not int or not 0 <= added.id < 2**24:
            raise InputError(f"{folder}: an added token must be text with an id, not {token!r:.60} with {added.id!r:.60}")
    return given, special | {token for token, added in given.items() if added.special}


class _Model:
    """What both kinds share: the added tokens. Subclasses set `added`, `size` (of all ids) and `bos`."""

    added: dict[str, Added]

    def find(self, text: str) -> list[tuple[int, int, Added]]:
        """(start, end, token) of the added tokens in a template's text: leftmost first, the longest of those."""
        words = sorted(self.added, key=len, reverse=True)
        pattern = "|".join(rf"\b{re.escape(w)}\b" if self.added[w].single_word else re.escape(w) for w in words)
        matches = re.finditer(pattern, text) if pattern else ()
        return [(match.start(), match.end(), self.added[match.group()]) for match in matches]


class _Json(_Model):
    """A tokenizer.json. `full` decodes; `plain` encodes and knows no added token; `later` is `plain` for text that does
    not begin the input, where some tokenizers put no space in front."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        spec = read_object(path, required=True)
        declared, special = _declared(path.parent, config)
        try:
            if "merges" in spec["model"] and spec["model"].get("continuing_subword_prefix"):  # some such files end the process
                raise ValueError("a BPE model with a continuing_subword_prefix is not supported")
            self.full = tokenizers.Tokenizer.from_str(json.dumps(spec))
            for token, (id, *_) in sorted(declared.items(), key=lambda item: item[1].id):
                if self.full.token_to_id(token) is None:
                    flags = dict(zip(Added._fields[1:], declared[token][1:]))
                    self.full.add_tokens([tokenizers.AddedToken(token, normalized=not flags["special"], **flags)])
                    if self.full.token_to_id(token) != id:
                        raise ValueError(f"the next added token would get another id than {token!r:.60} has, {id}")
            self.full.add_special_tokens(sorted(text for text in special if self.full.token_to_id(text) is not None))
            self.full.no_truncation()
            self.full.no_padding()
            self.added = {
                token.content: Added(id, token.special, token.lstrip, token.rstrip, token.single_word)
                for id, token in self.full.get_added_tokens_decoder().items()
            }
            self.parts = _spellings(spec["model"], self.added)
            model = spec["model"] | ({"dropout": None} if "dropout" in spec["model"] else {})  # which makes encodings random
            bare = {"model": model, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
            plain = json.dumps(spec | bare)
            self.plain = tokenizers.Tokenizer.from_str(plain)
            once = re.sub(r'("prepend_scheme": )"first"', r'\1"never"', plain)
            self.later = self.plain if once == plain else tokenizers.Tokenizer.from_str(once)
            self.size = max(self.full.get_vocab(with_added_tokens=True).values(), default=-1) + 1
            text = next((t for t in ("a", *self.full.get_vocab()) if self.full.encode(t, add_special_tokens=False).ids), "")
            bare, whole = (self.full.encode(text, add_special_tokens=add).ids for add in (False, True))
        except BaseException as error:  # the library raises nothing more specific, and its panics are not even Exceptions
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise InputError(f"{path}: not a tokenizer: {error}") from None
        self.bos = whole[0] if len(whole) > len(bare) > 0 and whole[0] != bare[0] else None

    def id(self, token: str) -> int | None:
        return self.full.token_to_id(token)

    def encode(self, texts: list[str], first: bool = True) -> list[list[int]]:
        encoder = self.plain if first else self.later
        batch = [encoding.ids for encoding in encoder.encode_batch(texts, add_special_tokens=False)]
        if not self.parts:
            return batch
        return [[part for id in ids for part in self.parts.get(id, (id,))] for ids in batch]

    def decode(self, batch: list[list[int]]) -> list[str]:
        return self.full.decode_batch(batch, skip_special_tokens=True)


def _spellings(model: dict[str, Any], added: dict[str, Added]) -> dict[int, list[int]]:
    """An added token may be an item of the text model's vocabulary as well: by id, the ids of its characters, to put in its
    place. A single character stays what it is, as without it text could not be spelt, and so does what unknown text becomes."""
    vocab = model["vocab"] if isinstance(model["vocab"], dict) else {piece: id for id, (piece, _) in enumerate(model["vocab"])}

    def spelt(character: str) -> list[int]:
        pieces = [character] if character in vocab else [f"<0x{byte:02X}>" for byte in character.encode()]
        return [vocab[piece] for piece in pieces if piece in vocab]

    tokens = [token for token in added if token in vocab and len(token) > 1 and token != model.get("unk_token")]
    return {vocab[token]: [id for character in token for id in spelt(character)] for token in tokens}


class _SentencePiece(_Model):
    """A tokenizer.model, in Llama-2's and Mistral's conventions: a space is put before the text, unknown characters
    become bytes, BOS comes first unless tokenizer_config.json says otherwise."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        try:
            proto, defined = _demote(path.read_bytes())
            space = config.get("add_prefix_space") is not False
            bare = proto + b"\x1a\x02\x18\x00"  # protobuf merges repeats: normalizer_spec { add_dummy_prefix: false }
            self.later = sentencepiece.SentencePieceProcessor(model_proto=bare)
            self.plain = sentencepiece.SentencePieceProcessor(model_proto=proto) if space else self.later
            if config.get("legacy"):
                self.later = self.plain
        except (RuntimeError, ValueError, IndexError) as error:
            raise InputError(f"{path}: not a sentencepiece model: {error}") from None
        model = self.plain
        pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
        self.bytes = {i: int(piece[3:-1], 16) for i, piece in enumerate(pieces) if model.is_byte(i)}
        apart = [i for i in range(len(pieces)) if model.is_control(i) or model.is_unknown(i)]
        declared, special = _declared(path.parent, config)
        self.added = {pieces[i]: Added(i, i not in defined or pieces[i] in special) for i in apart} | declared
        self.pieces = dict(enumerate(pieces)) | {added.id: token for token, added in self.added.items()}
        self.ids = {piece: id for id, piece in self.pieces.items()}
        self.silent = {added.id for added in self.added.values() if added.special}
        self.strips = space
        self.size = max(self.pieces) + 1
        self.bos = model.bos_id() if model.bos_id() >= 0 else None
        self.eos_token = model.eos_id() if model.eos_id() >= 0 else None
        self.bos_token = self.bos

    def id(self, token: str) -> int | None:
        return self.ids.get(token)

    def encode(self, texts: list[str], first: bool = True) -> list[list[int]]:
        return (self.plain if first else self.later).encode(texts)

    def decode(self, batch: list[list[int]]) -> list[str]:
        return [self._decode(ids) for ids in batch]

    def _decode(self, ids: list[int]) -> str:
        """Pieces joined, runs of byte pieces read as UTF-8, the space in front taken off."""
        text, run = [], bytearray()
        for id in [*(id for id in ids if id not in self.silent), None]:
            if id in self.bytes:
                run.append(self.bytes[id])
                continue
            if run:
                try:
                    text.append(run.decode())
                except UnicodeDecodeError:
                    text.append("\ufffd" * len(run))
                run.clear()
            text.append("" if id is None else self.pieces.get(id, "").replace("\u2581", " "))
        joined = "".join(text)
        return joined[1:] if self.strips and joined.startswith(" ") else joined


def _demote(proto: bytes) -> tuple[bytes, set[int]]:
    """(a sentencepiece model with its user-defined pieces, which would be matched in text, made control pieces, which are not;
    their ids). ModelProto's field 1 is a piece, whose field 3 is its type; both are found by walking protobuf's fields."""
    out, at, id = bytearray(proto), 0, -1
    defined: set[int] = set()

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            value |= (out[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if out[at - 1] < 128:
                return value, at

    while at < len(out):
        key, at = varint(at)
        if key & 7 != 2:
            raise ValueError("unexpected field")
        size, at = varint(at)
        end = at + size
        id += key == 0x0A
        while key == 0x0A and at < end:
            field, at = varint(at)
            if field == 0x18 and out[at] == USER_DEFINED:
                out[at] = CONTROL
                defined.add(id)
            if field & 7 == 5:
                at += 4
            elif field & 7 == 2:
                size, at = varint(at)
                at += size
            else:
                _, at = varint(at)
        at = end
    return bytes(out), defined
