"""Large data sets: records read one by one, token ids in memory-mapped files, made once by several processes.

What is made of a data file is kept in a folder of the cache whose name is the SHA-256 of everything that it depends
on: the file's content, what is a record of it, the template, the tokenizer, the mask options, the records chosen.
Another content is another name, so nothing is ever out of date. A folder is written beside its place and renamed into
it, and its DONE file holds the SHA-256 of every other file: a killed process leaves nothing that is used, and what is
torn is made again.

    tokens-KEY/    ids.int32, offsets.int64, spans.int64, span_offsets.int64, rows.int64 (an `EncodedSet`), DONE
    joined-KEY/    the same of several files, one after another
    records-KEY/   DONE alone: how many records a file holds, the malformed ones, a digest of them
    audit-KEY/     DONE alone: what the audit found
    picked-KEY/    DONE alone: a few records, such as those that training answers as samples
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import numpy as np
import numpy.typing as npt

from fastft.common import files
from fastft.common.console import meter, say, warn
from fastft.common.errors import FastftError, UserError
from fastft.data.audit import Findings, audit
from fastft.data.chat_template import AnyTemplate
from fastft.data.containers import Form, bytes_of, content_of, text_bytes_of
from fastft.data.encode import (
    Chunk,
    EncodedSet,
    EncodingReport,
    EncodingRules,
    Happened,
    Text,
    agreeing,
    encode_documents,
    encode_texts,
    peeked,
    texts_of,
)
from fastft.data.json_rows import BadRecord
from fastft.data.reading import Piece, stream_records, taken_for
from fastft.data.records import ReadingRules, Record, Split, Tokens, Turn, digest_of
from fastft.data.tokenizer import Tokenizer

LARGE_FILE = 32 << 20
"""Bytes of a data file from which `auto` uses the cache. In memory such a file (100,000 records of 330 bytes) takes
some 5 s to encode at each start and a few hundred MB; smaller ones are not worth files on the disk."""

_FORMAT = 7  # to be raised when the same inputs would make other files
_DONE = "DONE"
_DTYPES = {"ids": np.int32, "offsets": np.int64, "spans": np.int64, "span_offsets": np.int64, "rows": np.int64}

_CHUNK_RECORDS = 2048
_CHUNK_CHARACTERS = 1 << 22
"""Records and text that are encoded at a time: what bounds memory, also where records are long."""
_MOST_WORKERS = 8
"""More would wait for the one process that reads: parsing a record takes about an eighth of encoding it."""
_RECORDS_A_WORKER = 20_000
"""Fewer are encoded sooner than another process has started (it imports torch)."""
_FEW = 64
"""Records that are kept in the cache when they are picked out of a file."""
_EXAMPLES_AT_ONCE = 1 << 13
_MIB = 1 << 20

Facts = dict[str, Any]
Indices = npt.NDArray[np.int64]


def cache_for(path: Path, token_cache: str) -> TokenCache | None:
    """The cache that a data file's records and tokens go through, None where they are held in memory.

    Args:
        path: the data file.
        token_cache: `auto` (large files, in the cache folder), `none`, or a folder.
    """
    if token_cache == "none":
        return None
    if token_cache != "auto":
        return TokenCache(Path(token_cache))
    try:
        size = text_bytes_of(path)
    except (OSError, UserError):
        return None  # reading it will say why
    return TokenCache(files.cache_folder() / "tokens") if size >= LARGE_FILE else None


@dataclass(frozen=True, slots=True)
class TokenCache:
    """A folder of things that were made once. Any of them can be removed at any time."""

    folder: Path

    def get(self, what: str, key: Facts, make: Callable[[Path], Facts]) -> tuple[Path, Facts]:
        """The folder of what belongs to a key and the facts about it, made where it is not there or torn.

        Args:
            what: begins the folder's name.
            key: everything that the result depends on.
            make: fills an empty folder and returns facts, as JSON.

        Raises:
            UserError: the cache cannot be written.
        """
        written_key = json.dumps({"format": _FORMAT, "byteorder": sys.byteorder, **key}, sort_keys=True)
        path = self.folder / f"{what}-{hashlib.sha256(written_key.encode()).hexdigest()}"
        try:
            facts, _ = _read_whole(path, written_key)
            if facts is not None:
                return path, facts
            files.make_folder(self.folder, remedy="choose another with --token_cache")
            with _locked(self.folder / f".{path.name}.lock"):
                return path, self._make(path, written_key, make)
        except OSError as error:
            raise UserError(
                f"cannot use the token cache {self.folder}: {error.strerror or error}; "
                "free space, choose another with --token_cache, or --token_cache none"
            ) from error

    def _make(self, path: Path, written_key: str, make: Callable[[Path], Facts]) -> Facts:
        """Makes the folder, unless the process that held the lock before has."""
        facts, fault = _read_whole(path, written_key)
        if facts is not None:
            return facts
        self._remove_leftovers()
        beside = path.with_name(f".{path.name}.tmp")
        shutil.rmtree(beside, ignore_errors=True)  # of a killed process: this one has the lock
        beside.mkdir()
        try:
            facts = make(beside)
            _write_done(beside, written_key, facts)
            if path.exists():
                warn(f"{path} is made again: {fault}")
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            beside.replace(path)
            files.fsync(self.folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return facts

    def _remove_leftovers(self) -> None:
        """Removes what killed processes had half written: folders whose lock nobody holds."""
        for left in self.folder.glob(".*.tmp"):
            with contextlib.suppress(filelock.Timeout), filelock.FileLock(left.with_suffix(".lock"), timeout=0):
                shutil.rmtree(left, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class RecordFile:
    """The usable records of a data file, read anew whenever they are iterated over: memory does not grow with them.

    Attributes:
        path: the file, folder or data set.
        cache: where what is made of it is kept.
        rules: what is a record of it.
        content: SHA-256 of all that it holds.
        n: usable records.
        bad: the malformed ones.
        digest: `records.digest_of` the usable records.
        pieces: the files that it is made of.
        taken_for: how a file is read, where its name says something else.
    """

    path: Path
    cache: TokenCache
    rules: ReadingRules
    content: str
    n: int = 0
    bad: list[BadRecord] = field(default_factory=list)
    digest: str = ""
    pieces: list[Piece] = field(default_factory=list)
    taken_for: str | None = None

    @classmethod
    def open(cls, path: Path, cache: TokenCache, rules: ReadingRules | None = None) -> RecordFile:
        """Reads the file once, where the cache does not know it yet.

        Raises:
            UserError: it cannot be read, or is not JSON.
        """
        unread = cls(path, cache, rules or ReadingRules(), content_of(path))
        _, facts = unread._made("records", {}, lambda _: _survey(path, unread.rules))
        pieces = [Piece(**{**piece, "form": Form(**piece["form"])}) for piece in facts["pieces"]]
        return replace(
            unread,
            n=facts["n"],
            bad=[BadRecord(*bad) for bad in facts["bad"]],
            digest=facts["digest"],
            pieces=pieces,
            taken_for=taken_for(path, pieces),
        )

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[Record]:
        return (record for record in stream_records(self.path, self.rules) if isinstance(record, Record))

    def pick(self, indices: Indices) -> list[Record]:
        """The records with the given indices, in their order; a few are kept in the cache."""
        if len(indices) > _FEW:
            return pick(self, indices)

        def make(_: Path) -> Facts:
            return {"records": [asdict(record) for record in pick(self, indices)]}

        _, facts = self._made("picked", {"indices": indices.tolist()}, make)
        return [_from_json(record) for record in facts["records"]]

    def audit(self, parts: Split, template: AnyTemplate) -> Findings:
        """What `fastft.data.audit.audit` finds in all records."""
        key = {
            "template": template.description(),
            "parts": [_digest_of_indices(indices) for indices in (parts.train, parts.test, parts.val)],
        }
        _, facts = self._made("audit", key, lambda _: asdict(audit(self, parts, template, self.rules.end_marks)))
        return Findings(**facts)

    def encode(
        self,
        indices: Indices,
        template: AnyTemplate,
        tokenizer: Tokenizer,
        rules: EncodingRules,
        *,
        name: str = "records",
        workers: int | None = None,
    ) -> EncodedSet:
        """What `fastft.data.encode.encode` makes of the records with the given indices, its arrays memory-mapped.

        Args:
            indices: `[n]` int64, the records, each once, in the order of the examples.
            template: gives the prompt's and the response's text.
            tokenizer: the model's; it is part of the key.
            rules: the mask and the limit.
            name: what the records are, for the progress.
            workers: processes that encode; chosen by their number and the machine's cores where it is not given.

        Raises:
            UserError: as `encode` does, or the cache cannot be written.
        """
        key = {
            "indices": _digest_of_indices(indices),
            "template": template.description(),
            "tokenizer": tokenizer.identity(),
            "rules": asdict(rules),
        }
        n_workers = _workers_for(len(indices)) if workers is None else workers

        def make(folder: Path) -> Facts:
            chosen = np.zeros(self.n, dtype=np.bool_)
            chosen[indices] = True
            first, texts = peeked(texts_of(itertools.compress(self, chosen), template, rules.learn))
            order = indices
            if first is not None and first.is_document:
                encoded, order = encode_documents(texts, tokenizer, rules), np.sort(indices)
            else:
                encoded = encode_chunks(_chunks(texts), tokenizer, rules, workers=n_workers)
            return _write_arrays(folder, encoded, order, rules.max_length, f"encoding {name}")

        folder, facts = self._made("tokens", key, make)
        return _open_arrays(folder, facts)

    def check_unchanged(self) -> None:
        """Refuses to go on with what was read since the file was opened, where it is another file now.

        Raises:
            UserError: it is.
        """
        if content_of(self.path) != self.content:
            raise UserError(f"{self.path} has changed while it was read; start again when it is complete")

    def _made(self, what: str, key: Facts, make: Callable[[Path], Facts]) -> tuple[Path, Facts]:
        """`TokenCache.get` of something that is made of this file."""

        def make_of_the_same(folder: Path) -> Facts:
            facts = make(folder)
            self.check_unchanged()
            return facts

        return self.cache.get(what, {"content": self.content, "reading": asdict(self.rules), **key}, make_of_the_same)


def joined(sets: Sequence[EncodedSet], cache: TokenCache | None) -> EncodedSet:
    """Several sets as one, their examples one after another.

    Args:
        sets: at least one.
        cache: keeps the whole, memory-mapped; in memory where it is None.
    """
    if len(sets) == 1:
        return sets[0]
    report = EncodingReport(*(
        [row for one in sets for row in getattr(one.report, of.name)] for of in fields(EncodingReport)
    ))  # fmt: skip
    if cache is None:
        arrays: dict[str, Any] = {name: np.concatenate(list(_blocks(name, sets))) for name in _DTYPES}
        return EncodedSet(**arrays, report=report)
    key = {"sets": [[one.fingerprint(), _digest_of_indices(one.rows)] for one in sets]}
    folder, facts = cache.get("joined", key, lambda into: _write_joined(into, sets))
    return replace(_open_arrays(folder, facts), report=report)


def pick(records: Iterable[Record], indices: Indices) -> list[Record]:
    """The records with the given indices, in their order, in one pass."""
    if not len(indices):
        return []
    wanted = set(indices.tolist())
    found = {
        index: record
        for index, record in enumerate(itertools.islice(records, int(indices.max()) + 1))
        if index in wanted
    }
    return [found[index] for index in indices.tolist()]


def _from_json(record: dict[str, Any]) -> Record:
    """A record that was written as JSON, which knows lists alone."""
    turns = tuple(Turn(*turn) for turn in record["turns"])
    tokens = Tokens(*map(tuple, record["tokens"])) if record["tokens"] is not None else None
    return Record(**{**record, "notes": tuple(record["notes"]), "turns": turns, "tokens": tokens})


def _digest_of_indices(indices: Indices) -> str:
    return hashlib.sha256(np.ascontiguousarray(indices).data).hexdigest()


# Encoding in several processes


def encode_chunks(
    chunks: Iterable[list[Text]], tokenizer: Tokenizer, rules: EncodingRules, *, workers: int
) -> Iterator[Chunk]:
    """Encodes chunks in their order, with up to `workers` processes; one encodes in this process.

    Raises:
        FastftError: a worker has died.
    """
    if workers <= 1:
        for texts in chunks:
            yield encode_texts(texts, tokenizer, rules)
        return
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(_Worker(tokenizer, rules)) for _ in range(workers)]
        busy: deque[_Worker] = deque()
        for texts in chunks:
            done = None if idle else busy[0].receive()
            busy.append(idle.pop() if idle else busy.popleft())
            busy[-1].send(texts)  # it waits for them: only one chunk is with a worker at a time
            if done is not None:
                yield done
        while busy:
            yield busy.popleft().receive()


class _Worker:
    """A process that encodes. Not of `multiprocessing`: it must not import the program's main module again, which may
    be a script without a guard, and must end when this process is killed, which closes its standard input."""

    def __init__(self, tokenizer: Tokenizer, rules: EncodingRules) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from fastft.data.token_cache import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)},
        )
        self.send((tokenizer, rules))

    def send(self, value: Any) -> None:
        assert self._process.stdin is not None
        with self._named_death():
            pickle.dump(value, self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()

    def receive(self) -> Chunk:
        assert self._process.stdout is not None
        with self._named_death():
            chunk: Chunk = pickle.load(self._process.stdout)
            return chunk

    @contextlib.contextmanager
    def _named_death(self) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            self._process.kill()
            raise FastftError(
                f"a process that encodes the data has ended (exit status {self._process.wait()}); "
                "where memory was short, free some and start again"
            ) from error

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


def serve() -> None:
    """A worker: encodes what comes on standard input until that ends. Only its own parent writes to that pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # what a library prints must not end up between replies
    with contextlib.suppress(EOFError, BrokenPipeError):
        tokenizer, rules = pickle.load(requests)
        while True:
            chunk = encode_texts(pickle.load(requests), tokenizer, rules)
            pickle.dump(chunk, replies, protocol=pickle.HIGHEST_PROTOCOL)
            replies.flush()


def _workers_for(n_records: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _MOST_WORKERS, n_records // _RECORDS_A_WORKER))


def _chunks(texts: Iterable[Text]) -> Iterator[list[Text]]:
    chunk: list[Text] = []
    characters = 0
    for text in texts:
        chunk.append(text)
        characters += text.characters
        if len(chunk) == _CHUNK_RECORDS or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


# The files of an encoded set


def _write_arrays(folder: Path, chunks: Iterator[Chunk], indices: Indices, max_length: int, doing: str) -> Facts:
    """Writes the chunks, which are in file order, as an encoded set whose examples are in the order of `indices`."""
    happened = Happened()
    kept: list[npt.NDArray[np.bool_]] = []
    with _Writer(folder) as writer, meter(doing, len(indices)) as progress:
        for chunk in chunks:
            writer.write(chunk.ids, chunk.lengths, chunk.spans, chunk.n_spans, chunk.rows)
            happened.add(chunk.happened)
            kept.append(chunk.kept)
            progress.advance(by=len(chunk.kept))
    report = happened.checked_report(max_length)
    if (np.diff(indices) < 0).any():
        _rearrange(folder, _example_of(indices, np.concatenate(kept)))
    return {
        "fingerprint": _fingerprint(folder, are_suffixes=writer.are_suffixes),
        "common_prefix": writer.common_prefix,
        "report": asdict(report),
    }


def _write_joined(folder: Path, sets: Sequence[EncodedSet]) -> Facts:
    """Writes several sets as one."""
    for name in _DTYPES:
        with _file_of(folder, name).open("wb") as file:
            for block, array in zip(_blocks(name, sets), (getattr(one, name) for one in sets), strict=True):
                behind = _file_behind(array) if name == "ids" else None
                if behind is None:
                    file.write(np.ascontiguousarray(block, dtype=_DTYPES[name]).data)
                else:  # read, not mapped: the pages of a map would count as this process's
                    _feed(behind, file.write)
    whole = [one for one in sets if len(one)]
    beginning = min((one[0][: one.common_prefix()] for one in whole), key=len, default=np.zeros(0, dtype=np.int32))
    for one in whole:
        beginning = beginning[: agreeing(one.ids, one.offsets[:1], beginning)]
    return {
        "fingerprint": _fingerprint(folder, are_suffixes=all(one.are_suffixes for one in sets)),
        "common_prefix": len(beginning),
        "report": asdict(EncodingReport()),
    }


def _blocks(name: str, sets: Sequence[EncodedSet]) -> Iterator[npt.NDArray[Any]]:
    """What one array of several sets joined is made of: each set's, but that offsets go on from those before."""
    end, begin = 0, 0
    for one in sets:
        array: npt.NDArray[Any] = getattr(one, name)
        yield array[begin:] + end if name.endswith("offsets") else array
        if name.endswith("offsets"):
            end, begin = end + int(array[-1]), 1


def _file_behind(array: npt.NDArray[Any]) -> Path | None:
    """The file that an array maps the whole of; None of one in memory."""
    of: Any = array
    while of is not None:
        if isinstance(of, np.memmap) and of.filename is not None:
            return Path(of.filename)
        of = getattr(of, "base", None)
    return None


def _fingerprint(folder: Path, *, are_suffixes: bool) -> str:
    """`EncodedSet.fingerprint` of a folder's arrays, read by parts."""
    digest = hashlib.sha256()
    for name in ("ids", "offsets"):
        _feed(_file_of(folder, name), digest.update)
    if are_suffixes:
        _feed(_file_of(folder, "spans"), lambda block: digest.update(_beginnings(block)))
    else:
        for name in ("spans", "span_offsets"):
            _feed(_file_of(folder, name), digest.update)
    return digest.hexdigest()


def _beginnings(spans: bytes) -> bytes:
    """The first number of each pair."""
    return np.frombuffer(spans, dtype=_DTYPES["spans"]).reshape(-1, 2)[:, 0].tobytes()


def _open_arrays(folder: Path, facts: Facts) -> EncodedSet:
    return EncodedSet(
        ids=_mapped(folder, "ids"),
        offsets=_mapped(folder, "offsets"),
        spans=_mapped(folder, "spans"),
        span_offsets=_mapped(folder, "span_offsets"),
        rows=_mapped(folder, "rows"),
        report=EncodingReport(**facts["report"]),
        known_fingerprint=facts["fingerprint"],
        known_common_prefix=facts["common_prefix"],
    )


def _file_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.{np.dtype(_DTYPES[name]).name}"


def _mapped(folder: Path, name: str) -> npt.NDArray[Any]:
    path = _file_of(folder, name)
    shape = (-1, 2) if name == "spans" else (-1,)
    if not path.stat().st_size:  # nothing can be mapped of an empty file
        return np.zeros(0, dtype=_DTYPES[name]).reshape(shape)
    mapped = np.memmap(path, dtype=_DTYPES[name], mode="r").reshape(shape)
    return np.asarray(mapped)  # a plain view: np.memmap's own slices are slow


class _Writer:
    """Appends examples to the files of an encoded set."""

    def __init__(self, folder: Path) -> None:
        self._files = {name: _file_of(folder, name).open("wb") for name in _DTYPES}
        self._ids = self._spans = 0
        self._beginning: npt.NDArray[np.int32] | None = None
        self.are_suffixes = True
        """`EncodedSet.are_suffixes` of what was written."""
        for name in ("offsets", "span_offsets"):
            self._files[name].write(np.int64(0).tobytes())

    def write(
        self, ids: npt.NDArray[np.int32], lengths: Indices, spans: Indices, n_spans: Indices, rows: Indices
    ) -> None:
        """Appends examples of the given numbers of ids and spans."""
        if not len(lengths):
            return
        ends, span_ends = np.cumsum(lengths), np.cumsum(n_spans)
        arrays = (ids, self._ids + ends, spans, self._spans + span_ends, rows)
        for name, array in zip(_DTYPES, arrays, strict=True):
            self._files[name].write(np.ascontiguousarray(array, dtype=_DTYPES[name]).data)
        self._ids += int(ends[-1])
        self._spans += int(span_ends[-1])
        self.are_suffixes &= len(spans) == len(lengths) and bool((spans[:, 1] == lengths).all())
        beginning = (ids if self._beginning is None else self._beginning)[: int(lengths.min()) - 1]
        self._beginning = beginning[: agreeing(ids, ends - lengths, beginning)].copy()

    @property
    def common_prefix(self) -> int:
        """`EncodedSet.common_prefix` of what was written."""
        return 0 if self._beginning is None else len(self._beginning)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()


def _example_of(indices: Indices, kept: npt.NDArray[np.bool_]) -> Indices:
    """The examples, numbered in file order, in the order of `indices`.

    Args:
        indices: `[records]`, the records in the order wanted.
        kept: `[records]`, which of them, in file order, became an example.
    """
    rank = np.empty_like(indices)
    rank[np.argsort(indices)] = np.arange(len(indices))
    examples: Indices = (np.cumsum(kept) - 1)[rank[kept[rank]]]
    return examples


def _rearrange(folder: Path, order: Indices) -> None:
    """Puts the examples of a folder's arrays into another order, a few thousand at a time."""
    offsets, span_offsets, rows = (_mapped(folder, name) for name in ("offsets", "span_offsets", "rows"))
    arranged = folder / "arranged"
    arranged.mkdir()
    # Ids and spans are read, not mapped: in random order nearly all pages of a map would count as this process's.
    with (
        _Writer(arranged) as writer,
        _file_of(folder, "ids").open("rb", buffering=0) as ids,
        _file_of(folder, "spans").open("rb", buffering=0) as spans,
    ):
        for begin in range(0, len(order), _EXAMPLES_AT_ONCE):
            some = order[begin : begin + _EXAMPLES_AT_ONCE]
            own_ids, own_spans = _pieces(ids, offsets, some, 4), _pieces(spans, span_offsets, some, 16)
            lengths, n_spans = (ends[some + 1] - ends[some] for ends in (offsets, span_offsets))
            writer.write(
                np.frombuffer(own_ids, dtype=np.int32),
                lengths,
                np.frombuffer(own_spans, dtype=np.int64).reshape(-1, 2),
                n_spans,
                rows[some],
            )
    for path in arranged.iterdir():
        path.replace(folder / path.name)
    arranged.rmdir()


def _pieces(file: BinaryIO, offsets: Indices, some: Indices, size: int) -> bytes:
    """What a file has for some examples, whose elements of `size` bytes begin at `offsets`."""
    parts = []
    begins, ends = (size * offsets[some]).tolist(), (size * offsets[some + 1]).tolist()
    for begin, end in zip(begins, ends, strict=True):
        file.seek(begin)
        parts.append(file.read(end - begin))
    return b"".join(parts)


# What is known of a data file


def _survey(path: Path, rules: ReadingRules) -> Facts:
    """Reads a source once: how its files are read, how many usable records they hold, a digest of these, the others."""
    n = 0
    bad: list[BadRecord] = []
    pieces: list[Piece] = []

    def good(found: Iterable[Record | BadRecord]) -> Iterator[Record]:
        nonlocal n
        for record in found:
            if isinstance(record, BadRecord):
                bad.append(record)
            else:
                n += 1
                yield record

    with meter("reading MiB", -(-bytes_of(path) // _MIB)) as progress:
        read = _in_mib(progress.advance)
        digest = digest_of(good(stream_records(path, rules, read=read, begun=pieces.append)))
    return {
        "n": n,
        "digest": digest,
        "bad": [[one.row, one.reason, one.place] for one in bad],
        "pieces": [asdict(piece) for piece in pieces],
    }


def _in_mib(advance: Callable[..., None]) -> Callable[[int], None]:
    """Passes numbers of bytes on as whole MiB, each as soon as it has begun."""
    seen = 0

    def read(n: int) -> None:
        nonlocal seen
        before, seen = seen, seen + n
        if more := -(-seen // _MIB) - -(-before // _MIB):
            advance(by=more)

    return read


# Whole folders or none


def _write_done(folder: Path, written_key: str, facts: Facts) -> None:
    """Makes a folder whole: all its bytes on the disk, then the DONE file with what they must be."""
    manifest = {path.name: _identity(path) for path in sorted(folder.iterdir())}
    for name in manifest:
        files.fsync(folder / name)
    content = json.dumps({"key": written_key, "facts": facts, "files": manifest}, sort_keys=True)
    files.write_text(folder / _DONE, f"{hashlib.sha256(content.encode()).hexdigest()}\n{content}\n")
    files.fsync(folder)


def _read_whole(path: Path, written_key: str) -> tuple[Facts | None, str]:
    """The facts of a folder that is whole; else None, and why it is not."""
    try:
        digest, _, content = (path / _DONE).read_bytes().rstrip(b"\n").partition(b"\n")
    except OSError as error:
        return None, f"its DONE file cannot be read ({error.strerror})"
    if digest != hashlib.sha256(content).hexdigest().encode():
        return None, "its DONE file is torn"
    done = json.loads(content)
    if done["key"] != written_key:
        return None, "it is another key's"
    for name, identity in done["files"].items():
        try:
            if _identity(path / name, expected_bytes=identity["bytes"]) != identity:
                return None, f"{name} does not match its checksum"
        except OSError as error:
            return None, f"{name} cannot be read ({error.strerror})"
    return done["facts"], ""


def _identity(path: Path, *, expected_bytes: int | None = None) -> Facts:
    """Size and SHA-256; no SHA-256 where the size is not the expected one."""
    size = path.stat().st_size
    if expected_bytes not in (None, size):
        return {"bytes": size}
    digest = hashlib.sha256()
    _feed(path, digest.update)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _feed(path: Path, update: Callable[[bytes], object]) -> None:
    """Reads a file by parts: not mapped, so that its pages do not count as this process's memory."""
    with path.open("rb") as file:
        for block in iter(functools.partial(file.read, _MIB), b""):
            update(block)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the system lets go of the lock when a process dies. It saves work: two that make the same
    key would do it twice (as the ranks of a run would), and the folder's rename keeps even that harmless."""
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"waiting for another process that fills the token cache {path.parent}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
