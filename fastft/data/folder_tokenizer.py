"""The tokenizer that lies in a folder beside weights: GPT-2's own, or another, through the `tokenizers` package.

GPT-2 in another language has ids of its own, often as many as GPT-2's, so it is the content that is compared and not
the size. Which files there are: `tokenizer.json`, which says everything, or the older `vocab.json` and `merges.txt`;
`tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` name the special tokens. What cannot be used
without changing the texts is refused: a model that is trained on other ids than its own learns from nothing.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from fastft.common import files
from fastft.common.console import warn
from fastft.common.errors import UserError
from fastft.data.tokenizer import END_OF_TEXT, Tokenizer, gpt2_tokenizer, no_such_token, sha256_of

NAMES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
"""The files of a tokenizer: those that are read, and `chat_template.jinja`, which goes with them."""

UNREAD = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "vocab.txt", "vocab.bpe", "encoder.json")
"""Files of tokenizers that are not read: where nothing else is there, the weights' ids are not known."""

_BYTE_LEVEL_CLASSES = ("GPT2Tokenizer", "RobertaTokenizer", "PreTrainedTokenizer", "TokenizersBackend")
"""Classes of transformers whose `vocab.json` and `merges.txt` mean what GPT-2's do; each also with `Fast` behind it."""

_GPT2_CONTENT = "6b81dbd64442b650b767e6e6aa14045b56f3503a1341ba574de0ad9977262983"
"""SHA-256 of GPT-2's vocabulary and merges, as `_content` writes them."""

_END_OF_TEXT = "<|endoftext|>"
_PROBE = "\n\n### Instruction:\nWhat's 12 + 3?\n\n### Response:\n<|user|>\n" + "".join(map(chr, range(0x20, 0x7F)))
"""What the prompts are made of, which must come back as it is: else no response would be found again."""


class FolderTokenizer(Tokenizer):
    """A model's own tokenizer.

    Args:
        contents: by name, the files it was read from, which are written beside a trained model as they are.
        folder: where they lie, for messages.
        config: what the model's `config.json` says; only `eos_token_id` is read, and only where the files name no
            end-of-text.

    Raises:
        UserError: the files are incomplete or contradict each other, or what they describe cannot be used.
    """

    def __init__(self, contents: Mapping[str, bytes], folder: str, config: Mapping[str, Any]) -> None:
        self._contents, self._folder, self._config = dict(contents), folder, dict(config)
        read = _Reader(contents, folder)
        self._description = read.description()
        self._named = read.special_tokens()
        added = self._description["added_tokens"]
        self._vocab: dict[str, int] = _vocab_of(self._description["model"])
        self._vocab |= {token["content"]: token["id"] for token in added}
        self.end_of_text = self._end_of_text()
        special = {token["id"] for token in added if token["special"]} - {self.end_of_text}
        self._with_text = frozenset(self._vocab.values()) - special
        self._gpt2 = gpt2_tokenizer() if _is_gpt2s(self._description) else None
        self.is_gpt2s = self._gpt2 is not None and not special and self.end_of_text == END_OF_TEXT
        if self._gpt2 is None:
            self._check_ids()
            self._check_texts()

    @functools.cached_property
    def _backend(self) -> tokenizers.Tokenizer:
        try:
            made = tokenizers.Tokenizer.from_str(json.dumps(self._description))
        except Exception as error:  # tokenizers raises plain exceptions
            raise UserError(f"{self._folder}: its tokenizer cannot be used ({error}); {_REMEDY}") from error
        made.encode_special_tokens = True  # as text: special tokens are never read out of text
        return made

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        if self._gpt2 is not None:  # only its special tokens are others
            return self._gpt2.encode(text)
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """See `Tokenizer`."""
        if self._gpt2 is not None:
            return self._gpt2.encode_with_starts(text)
        made = self._backend.encode(text, add_special_tokens=False)
        return made.ids, [begin for begin, _ in made.offsets]

    def size(self) -> int:
        """See `Tokenizer`."""
        return max(self._vocab.values()) + 1

    def special_tokens(self) -> frozenset[str]:
        """See `Tokenizer`."""
        return frozenset(token["content"] for token in self._description["added_tokens"] if token["special"])

    def special(self, token: str) -> int:
        """See `Tokenizer`."""
        if not token:
            return self.end_of_text
        if token not in self._vocab:
            raise no_such_token(token)
        return self._vocab[token]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        known = self._ids
        runs = itertools.groupby(ids, key=known.__contains__)
        return "".join(
            self._backend.decode([*run], skip_special_tokens=False) if is_known else _UNKNOWN * len([*run])
            for is_known, run in runs
        )

    def without_text(self, vocab_size: int) -> npt.NDArray[np.bool_] | None:
        """See `Tokenizer`. Special tokens are never learned, so that none but end-of-text stands for anything."""
        mask = np.ones(vocab_size, dtype=np.bool_)
        mask[[token for token in self._with_text if token < vocab_size]] = False
        return mask if mask.any() else None

    def check_fits(self, vocab_size: int, model: str | Path) -> None:
        """See `Tokenizer`."""
        if (last := max(self._with_text)) >= vocab_size:
            raise UserError(
                f"{model}: its tokenizer has the id {last} ({self._token_of(last)!r}), and its vocabulary "
                f"{vocab_size} ids; put the tokenizer's files there that the weights were made with"
            )

    def identity(self) -> dict[str, Any]:
        """See `Tokenizer`."""
        digest = hashlib.sha256()
        for name, content in sorted(self._contents.items()):
            if name == "chat_template.jinja":  # what it writes is encoded, not how
                continue
            digest.update(f"{name} {len(content)}\n".encode() + content)
        texts = {"gpt2": self._gpt2.identity()} if self._gpt2 else {"tokenizers": tokenizers.__version__}
        return {"files": digest.hexdigest(), "end_of_text": self.end_of_text, **texts}

    def fingerprint(self) -> str:
        """See `Tokenizer`. The end-of-text's token is left out: `files` may name it where `config.json` alone did."""
        added = [token for token in self._description["added_tokens"] if token["id"] != self.end_of_text]
        return sha256_of({**self._description, "added_tokens": added, "end_of_text": self.end_of_text})

    def files(self, n_ctx: int | None = None) -> dict[str, bytes]:
        """See `Tokenizer`: those that it was read from, and its end-of-text among them where `config.json` alone named
        it."""
        del n_ctx  # its own files say it, where they do
        if self._vocab.get(self._named.get("eos_token", _END_OF_TEXT)) == self.end_of_text:
            return dict(self._contents)
        config = json.loads(self._contents.get("tokenizer_config.json", b"{}"))
        config["eos_token"] = self._token_of(self.end_of_text)
        return {**self._contents, "tokenizer_config.json": json.dumps(config, indent=2).encode() + b"\n"}

    def special_ids(self) -> dict[str, int]:
        """See `Tokenizer`."""
        named = {key: self._vocab.get(self._named.get(key, "")) for key in ("bos_token", "pad_token")}
        own = {f"{key}_id": token for key, token in named.items() if token is not None}
        ends = {"bos_token_id": self.end_of_text, "pad_token_id": self.end_of_text}
        return {**ends, **own, "eos_token_id": self.end_of_text}

    def __reduce__(self) -> tuple[Callable[..., FolderTokenizer], tuple[Any, ...]]:
        return FolderTokenizer, (self._contents, self._folder, self._config)

    @functools.cached_property
    def _ids(self) -> frozenset[int]:
        return frozenset(self._vocab.values())

    def _token_of(self, wanted: int) -> str:
        return next(token for token, number in self._vocab.items() if number == wanted)

    def _end_of_text(self) -> int:
        """The id that ends a text: of the token that the files name, else GPT-2's, else what `config.json` says."""
        said, token = self._config.get("eos_token_id"), self._named.get("eos_token", _END_OF_TEXT)
        if token in self._vocab:
            if isinstance(said, int) and said != self._vocab[token]:
                warn(
                    f"{self._folder}: config.json says that {said} ends a text, its tokenizer {self._vocab[token]} "
                    f"({token!r}), which is taken"
                )
            return self._vocab[token]
        if "eos_token" in self._named:
            raise UserError(
                f"{self._folder}: its tokenizer names {token!r} as its end-of-text, and has no such token; {_REMEDY}"
            )
        if type(said) is int and said in self._vocab.values():
            return said
        raise UserError(
            f"{self._folder}: its tokenizer has no end-of-text, which tells where a response ends: got no eos_token in "
            f"tokenizer_config.json, no {_END_OF_TEXT}, no eos_token_id of a token in config.json; name one there"
        )

    def _check_ids(self) -> None:
        """The package numbers added tokens itself, whatever the file says."""
        for token in self._description["added_tokens"]:
            if (got := self._backend.token_to_id(token["content"])) != token["id"]:
                raise UserError(
                    f"{self._folder}: its tokenizer cannot be used: the added token {token['content']!r} has the id "
                    f"{token['id']}, where {got} is the next one; {_REMEDY}"
                )

    def _check_texts(self) -> None:
        """Refuses a tokenizer that does not give texts back: its ids would teach other texts than the data's.

        It may do what its own normalizer does (NFC, say), but not to what prompts are made of.
        """
        normalizer = self._backend.normalizer
        for probe in (_PROBE, *self._around_added(), *_EVERY_BYTE):
            wanted = probe if normalizer is None or probe is _PROBE else normalizer.normalize_str(probe)
            got = self.decode(self.encode(probe))
            if wanted not in (got, got.removeprefix(" ")):
                pairs = zip(got, wanted, strict=False)
                at = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(got), len(wanted)))
                raise UserError(
                    f"{self._folder}: its tokenizer does not give texts back: {wanted[at : at + 20]!r} becomes "
                    f"{got[at : at + 20]!r}; expected one that keeps every character, as byte-level BPE does"
                )

    def _around_added(self) -> tuple[str, ...]:
        """Texts with the added tokens that are read out of text: some take the white space beside them along."""
        read = [token["content"] for token in self._description["added_tokens"] if not token["special"]]
        return tuple("".join(f"a{space}{token}{space}b" for token in read) for space in (" ", "")) if read else ()


def _every_byte() -> tuple[str, ...]:
    """Characters that have in UTF-8 each byte that may stand there, one a text."""
    first = [*range(1, 0x80), *range(0x80, 0x800, 0x40)]  # up to DF
    first += [max(0x800, n << 12) for n in range(16)]  # E0 to EF
    first += [0x10000, 0x40000, 0x80000, 0xC0000, 0x100000]  # F0 to F4
    continued = range(0x4E00, 0x4E40)  # 80 to BF
    return tuple(map(chr, (*first, *continued)))


_EVERY_BYTE = _every_byte()
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_REMEDY = "put the tokenizer's files there that the weights were made with"


class _Reader:
    """Reads a tokenizer's files, and what they say of each other."""

    def __init__(self, contents: Mapping[str, bytes], folder: str) -> None:
        self._contents = contents
        self._folder = folder

    def description(self) -> dict[str, Any]:
        """The whole tokenizer as `tokenizer.json` has it, without what would cut, fill or vary texts."""
        if "tokenizer.json" in self._contents:
            made = self._whole()
            self._check_agree(made)
        else:
            made = self._of_vocab_and_merges()
        if made["model"].get("type") == "BPE":
            made["model"]["dropout"] = None
        return made | {"truncation": None, "padding": None, "post_processor": None}

    def special_tokens(self) -> dict[str, str]:
        """The tokens that the files name: `eos_token` and the like."""
        found: dict[str, str] = {}
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            for key in ("eos_token", "bos_token", "pad_token", "unk_token"):
                value = self._object(name).get(key)
                token = value.get("content") if isinstance(value, dict) else value
                if not isinstance(token, str):
                    continue
                if found.setdefault(key, token) != token and key == "eos_token":
                    raise self._refusal(
                        f"tokenizer_config.json says that {found[key]!r} is {key}, special_tokens_map.json {token!r}"
                    )
        return found

    def _whole(self) -> dict[str, Any]:
        made = self._object("tokenizer.json")
        model, added = made.get("model"), made.get("added_tokens") or []
        if not isinstance(model, dict) or not isinstance(added, list) or not all(map(_is_token, added)):
            raise self._refusal("tokenizer.json has no model, or no list of added tokens")
        if not (_is_vocab(model.get("vocab")) and _are_merges(model.get("merges") or [])):
            raise self._refusal("tokenizer.json has no vocabulary of tokens and their ids, or no list of merges")
        made["added_tokens"] = [dict(token) for token in added]
        ends = self.special_tokens().get("eos_token", _END_OF_TEXT)
        for token in made["added_tokens"]:  # an end-of-text is never read out of text, whatever its file says
            token["special"] = bool(token.get("special")) or token["content"] == ends
        return made

    def _of_vocab_and_merges(self) -> dict[str, Any]:
        config = self._object("tokenizer_config.json")
        kind = _class_named(config)
        if kind not in _BYTE_LEVEL_CLASSES:
            raise self._refusal(f"it is a {kind}, whose vocab.json and merges.txt are not GPT-2's kind")
        vocab, merges = self._vocab(), self._merges()
        added = self._added_tokens(vocab, config)
        specials = {*self.special_tokens().values(), _END_OF_TEXT}
        for token in specials & vocab.keys():
            added.setdefault(token, {"id": vocab[token]})
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        return {
            "version": "1.0",
            "added_tokens": [
                {
                    "id": token["id"],
                    "content": content,
                    **{key: bool(token.get(key)) for key in ("single_word", "lstrip", "rstrip")},
                    "normalized": bool(token.get("normalized", False)),
                    "special": bool(token.get("special")) or content in specials,
                }
                for content, token in sorted(added.items(), key=lambda item: item[1]["id"])
            ],
            "normalizer": None,
            "pre_tokenizer": byte_level | {"add_prefix_space": config.get("add_prefix_space") is True},
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": merges},
        }

    def _added_tokens(self, vocab: Mapping[str, int], config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """By their content, the tokens beside those of `vocab.json`, and those of it that are special."""
        added: dict[str, dict[str, Any]] = {}
        for content, number in self._object("added_tokens.json").items():
            if type(number) is not int:
                raise self._refusal("added_tokens.json is not an object from tokens to ids")
            added[content] = {"id": number}
        decoder = config.get("added_tokens_decoder")
        for number, token in decoder.items() if isinstance(decoder, dict) else ():
            if not (number.isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str)):
                raise self._refusal("tokenizer_config.json has added tokens without an id or a content")
            content = token["content"]
            known = vocab.get(content, added.get(content, {"id": int(number)})["id"])
            if known != int(number):
                raise self._refusal(f"tokenizer_config.json gives {content!r} the id {number}, another file {known}")
            added[content] = {**token, "id": int(number)}
        return added

    def _check_agree(self, made: Mapping[str, Any]) -> None:
        """Refuses a `tokenizer.json` that has another vocabulary than the older files beside it."""
        model = made["model"]
        added = {token["content"]: token["id"] for token in made["added_tokens"]}
        mine = _vocab_of(model) | added
        other = self._vocab() if "vocab.json" in self._contents else mine
        differ = [token for token, number in other.items() if mine.get(token) != number]
        differ += [token for token in mine.keys() - added.keys() if token not in other]
        if differ:
            token = differ[0]
            raise self._refusal(
                f"tokenizer.json and vocab.json contradict each other in {len(differ)} tokens ({token!r} is "
                f"{mine.get(token)} and {other.get(token)})"
            )
        if "merges.txt" in self._contents and _merges_of(model) != self._merges():
            raise self._refusal("tokenizer.json and merges.txt contradict each other")

    def _vocab(self) -> dict[str, int]:
        vocab = self._object("vocab.json")
        if not vocab or not all(type(n) is int and n >= 0 for n in vocab.values()):
            raise self._refusal("vocab.json is not an object from tokens to ids")
        if len(set(vocab.values())) < len(vocab):
            raise self._refusal("vocab.json gives two tokens one id")
        return vocab

    def _merges(self) -> list[str]:
        try:
            lines = self._contents["merges.txt"].decode("utf-8").replace("\r\n", "\n").split("\n")
        except UnicodeDecodeError as error:
            raise self._refusal("merges.txt is not UTF-8") from error
        merges = [line for line in lines if line and not line.startswith("#version")]
        if not all(line.count(" ") == 1 for line in merges):
            raise self._refusal("merges.txt has lines that are not two tokens")
        return merges

    def _object(self, name: str) -> dict[str, Any]:
        """A JSON file; empty where it is not there."""
        if name not in self._contents:
            return {}
        content = self._contents[name]
        if content.startswith(files.LFS_POINTER):
            raise self._refusal(f"{name} is a pointer of Git LFS, not the file itself (`git lfs pull` fetches it)")
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise self._refusal(f"{name} is not JSON ({error})") from error
        if not isinstance(value, dict):
            raise self._refusal(f"{name} is not an object")
        return value

    def _refusal(self, what: str) -> UserError:
        return UserError(f"{self._folder}: its tokenizer cannot be used: {what}; {_REMEDY}")


def tokenizer_of(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder: GPT-2's own where the files describe it, another one, or None where there is none.

    Raises:
        UserError: there is one that cannot be used.
    """
    contents = {name: _bytes_of(folder / name) for name in NAMES if (folder / name).is_file()}
    if "tokenizer.json" not in contents and not contents.keys() >= {"vocab.json", "merges.txt"}:
        found = [name for name in (*NAMES[1:4], *UNREAD) if (folder / name).is_file()]
        if found:
            raise UserError(
                f"{folder}: got {', '.join(found)} as its tokenizer, expected tokenizer.json, or vocab.json and "
                "merges.txt; save it again with transformers, `AutoTokenizer.from_pretrained(FOLDER)."
                "save_pretrained(NEW_FOLDER)`"
            )
        kind = _class_named(files.object_or_empty(folder / "tokenizer_config.json"))
        if kind not in _BYTE_LEVEL_CLASSES:
            raise UserError(
                f"{folder}: tokenizer_config.json says it is a {kind}, and its vocabulary is not there; expected "
                "tokenizer.json beside it, as transformers' save_pretrained writes it"
            )
        return None
    config = files.object_or_empty(folder / "config.json")  # it is checked where the weights are read
    made = FolderTokenizer(contents, str(folder), config)
    return gpt2_tokenizer() if made.is_gpt2s else made


def with_special_tokens(tokenizer: Tokenizer, tokens: Sequence[str], end: str) -> Tokenizer:
    """A tokenizer with the special tokens that a template writes, and the template's end as its end-of-text.

    Tokens that it has already keep their ids, and become special; the others get the next ones.

    Args:
        tokenizer: the model's.
        tokens: by their text.
        end: the one of them that ends an answer; empty: the tokenizer's own end-of-text stays.

    Returns:
        The tokenizer itself, where it has all that.

    Raises:
        UserError: its files are not installed.
    """
    known = tokenizer.special_tokens()
    if known >= set(tokens) and (not end or tokenizer.special(end) == tokenizer.end_of_text):
        return tokenizer
    contents = _with_tokens(tokenizer.files(), [token for token in tokens if token not in known], end)
    return FolderTokenizer(contents, "the tokenizer with a template's tokens", {} if end else tokenizer.special_ids())


def _with_tokens(contents: Mapping[str, bytes], tokens: Sequence[str], end: str) -> dict[str, bytes]:
    """A tokenizer's files with further special tokens in them, in each file that holds such."""
    read = _Reader(contents, "the model's tokenizer")
    description = read.description()
    vocab = _vocab_of(description["model"]) | {one["content"]: one["id"] for one in description["added_tokens"]}
    following = max(vocab.values()) + 1
    added: dict[str, int] = {}
    for token in tokens:
        added[token] = vocab.get(token, following + sum(number >= following for number in added.values()))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    changed = dict(contents)
    config = json.loads(contents.get("tokenizer_config.json", b"{}"))
    decoder = {**config.get("added_tokens_decoder", {})}
    decoder |= {str(number): {"content": token, **flags} for token, number in added.items()}
    config["added_tokens_decoder"] = decoder
    if end:
        config["eos_token"] = end
        config.setdefault("pad_token", _END_OF_TEXT if _END_OF_TEXT in vocab else end)
    changed["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
    if end and "special_tokens_map.json" in contents:
        named = {**json.loads(contents["special_tokens_map.json"]), "eos_token": end}
        changed["special_tokens_map.json"] = json.dumps(named, indent=2, ensure_ascii=False).encode() + b"\n"
    if "tokenizer.json" in contents:
        whole = json.loads(contents["tokenizer.json"])
        others = [one for one in whole.get("added_tokens") or [] if one["content"] not in added]
        own = [{"id": number, "content": token, **flags} for token, number in added.items()]
        whole["added_tokens"] = sorted([*others, *own], key=lambda one: one["id"])
        changed["tokenizer.json"] = json.dumps(whole, ensure_ascii=False).encode()
    return changed


def _class_named(config: Mapping[str, Any]) -> str:
    """The class of transformers that a `tokenizer_config.json` names; GPT-2's where it names none."""
    return str(config.get("tokenizer_class") or _BYTE_LEVEL_CLASSES[0]).removesuffix("Fast")


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check its permissions") from error


def _is_gpt2s(description: Mapping[str, Any]) -> bool:
    """Whether texts get GPT-2's ids: its vocabulary, merges and rules, and no token beside them that is read out of
    text."""
    model, cut = description["model"], description.get("pre_tokenizer") or {}
    plain = {"dropout": None, "continuing_subword_prefix": "", "end_of_word_suffix": "", "ignore_merges": False}
    return (
        model.get("type") == "BPE"
        and all((model.get(key) or usual) == usual for key, usual in plain.items())
        and description.get("normalizer") is None
        and (cut.get("type"), cut.get("add_prefix_space"), cut.get("use_regex", True)) == ("ByteLevel", False, True)
        and (description.get("decoder") or {}).get("type") == "ByteLevel"
        and all(token["special"] for token in description["added_tokens"])
        and _content(_vocab_of(model), _merges_of(model)) == _GPT2_CONTENT
    )


def _content(vocab: Mapping[str, int], merges: Sequence[str]) -> str:
    """SHA-256 of a byte-pair vocabulary and its merges, whatever file they stood in."""
    ordered = sorted(vocab.items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps([ordered, merges]).encode()).hexdigest()


def _vocab_of(model: Mapping[str, Any]) -> dict[str, int]:
    """Tokens to ids of a model of `tokenizer.json`; a unigram model has a list of them, with their scores."""
    vocab = model.get("vocab")
    return dict(vocab) if isinstance(vocab, dict) else {entry[0]: n for n, entry in enumerate(vocab or [])}


def _merges_of(model: Mapping[str, Any]) -> list[str]:
    """As in `merges.txt`: newer files write pairs."""
    return [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or []]


def _is_vocab(value: object) -> bool:
    """Whether a model of `tokenizer.json` has a vocabulary: ids by token, or pairs of a token and its score."""
    if isinstance(value, dict):
        return all(type(number) is int for number in value.values())
    return isinstance(value, list) and all(isinstance(one, list) and one and isinstance(one[0], str) for one in value)


def _are_merges(value: object) -> bool:
    """Whether these are merges: texts of two tokens, or pairs of them."""
    if not isinstance(value, list):
        return False
    parts = (part for pair in value for part in (pair if isinstance(pair, list) else [pair]))
    return all(isinstance(part, str) for part in parts)


def _is_token(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("content"), str) and type(value.get("id")) is int
