"""The rows of Parquet and Arrow files and of Hugging Face data sets, a few at a time.

They are read by pyarrow and `datasets`, which are asked for when they are needed: `pip install 'fastft[data]'`.
"""

from __future__ import annotations

import datetime
import importlib
import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fastft.common.errors import UserError
from fastft.data.json_rows import BadRecord, in_one_line

_PREFIX = "hf:"
_SAVED = ("state.json", "dataset_dict.json")
"""What lies in a folder that `save_to_disk` of `datasets` wrote: of one split, of several."""
_BYTES_AT_ONCE = 2 << 20
_MOST_ROWS = 4096
_BUFFER_BYTES = 1 << 20


def _needed(module: str, what: str) -> Any:
    """A module of the extra.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(f"{what} needs {package}, which is not installed: pip install 'fastft[data]'") from error


class Unzstd(io.RawIOBase):
    """What a file compressed by zstd holds.

    Raises:
        EOFError: while reading, where the file is cut, or not what it should be.
    """

    def __init__(self, file: io.BufferedReader[Any], path: Path) -> None:
        pa = _needed("pyarrow", f"{path} is compressed by zstd, which")
        self._stream = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Reads up to as many bytes as there is room for."""
        try:
            content = self._stream.read(len(buffer))
        except OSError as error:
            raise EOFError(str(error)) from error
        buffer[: len(content)] = content
        return len(content)


def parquet_rows(path: Path, read: Callable[[int], None]) -> Iterator[tuple[int, Any]]:
    """Yields (row, object or `BadRecord`) of a Parquet file; it is told to `read` how many bytes of it are behind.

    Raises:
        UserError: the file is torn, or pyarrow is not there.
    """
    pa, pq = (_needed(name, f"{path} is Parquet, which") for name in ("pyarrow", "pyarrow.parquet"))
    try:
        # Buffered: column by column in small parts, also where the whole file is one group of rows.
        with pq.ParquetFile(path, memory_map=False, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            size, n = path.stat().st_size, max(1, file.metadata.num_rows)
            groups = (file.metadata.row_group(index) for index in range(file.metadata.num_row_groups))
            text = sum(group.total_byte_size for group in groups)
            batches = file.iter_batches(batch_size=_rows_at_once(text, n), use_threads=False)
            names = file.schema_arrow.names
            yield from _numbered(map(_values, batches), names, path, lambda rows: read(size * rows // n))
    except (pa.ArrowException, OSError) as error:
        raise _torn(path, "Parquet", error) from error


def arrow_rows(path: Path, read: Callable[[int], None]) -> Iterator[tuple[int, Any]]:
    """The same of an Arrow file or stream.

    Raises:
        UserError: the file is torn, or pyarrow is not there.
    """
    pa = _needed("pyarrow", f"{path} is Arrow, which")
    try:
        with pa.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            with (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source) as reader:
                n = reader.num_record_batches if is_file else None
                batches = reader if n is None else map(reader.get_batch, range(n))
                size = source.size()
                told = _told(batches, read, lambda index: source.tell() if n is None else size * index // n)
                yield from _numbered(map(_values, _small(told)), reader.schema.names, path, lambda _: None)
    except (pa.ArrowException, OSError) as error:
        raise _torn(path, "Arrow", error) from error


def _torn(path: Path, kind: str, error: Exception) -> Exception:
    """What pyarrow found, in one line; what the system says of a file as it is."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return UserError(f"{path} is not whole {kind}: {' '.join(str(error).split())}; fetch or write it again")


def _rows_at_once(size: int, n_rows: int) -> int:
    return max(1, min(_MOST_ROWS, _BYTES_AT_ONCE * n_rows // max(1, size)))


def _told(batches: Any, read: Callable[[int], None], end_of: Callable[[int], int]) -> Iterator[Any]:
    """Batches, of which it is told when they are behind; `end_of` says where in the file that of a number ends."""
    seen = 0
    for index, batch in enumerate(batches, start=1):
        yield batch
        before, seen = seen, end_of(index)
        read(seen - before)


def _small(batches: Any) -> Iterator[Any]:
    """Batches in parts of some megabytes."""
    for batch in batches:
        rows = _rows_at_once(batch.nbytes, batch.num_rows)
        for begin in range(0, batch.num_rows, rows):
            yield batch.slice(begin, rows)


def _values(batch: Any) -> list[Any]:
    """The rows of a batch as objects; a reason in place of one that has no such value, as text that is not UTF-8."""
    try:
        values: list[Any] = batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows > 1:
            return [value for at in range(batch.num_rows) for value in _values(batch.slice(at, 1))]
        return [f"holds what cannot be read: {' '.join(str(error).split())}"]
    return values


def _numbered(
    batches: Iterable[list[Any]], names: list[str], path: Path, passed: Callable[[int], None]
) -> Iterator[tuple[int, Any]]:
    """The rows of batches (objects, or the reason why one is none) numbered from 1; `passed` is told how many are
    behind."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}: two columns have the name `{in_one_line(twice)}`, expected different names")
    row = 0
    for batch in batches:
        for value in batch:
            row += 1
            is_bad = isinstance(value, str)
            yield row, BadRecord(row, value) if is_bad else {key: _plain(item) for key, item in value.items()}
        passed(len(batch))


def _plain(value: Any) -> Any:
    """A value as JSON has it: bytes as text where they are, else as their number, times and decimals as text."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return value if all(type(item) is int for item in value) else [_plain(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return f"{len(value)} bytes"
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else str(value)


# Data sets


def is_dataset(path: Path) -> bool:
    """Whether a path means a Hugging Face data set: `hf:ID`, or a folder that `datasets` wrote."""
    return str(path).startswith(_PREFIX) or any((path / name).is_file() for name in _SAVED)


def dataset_rows(path: Path, read: Callable[[int], None]) -> Iterator[tuple[int, Any]]:
    """Yields (row, object or `BadRecord`) of a data set's split.

    Raises:
        UserError: it cannot be loaded, has no such split, or `datasets` is not there.
    """
    dataset = _loaded(path)
    size = max(1, sum(file.stat().st_size for file in _files(dataset)))
    n = max(1, len(dataset))
    for name, feature in dataset.features.items():
        if getattr(feature, "decode", False):  # an image or a sound: its bytes will do
            dataset = dataset.cast_column(name, type(feature)(decode=False))
    batches = dataset.with_format(None).iter(batch_size=_rows_at_once(size, n))
    lists = ([dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)] for batch in batches)
    try:
        yield from _numbered(lists, dataset.column_names, path, lambda rows: read(size * rows // n))
    except UserError:
        raise
    except (ValueError, OverflowError) as error:
        raise UserError(f"{path} holds what cannot be read: {' '.join(str(error).split())}") from error


def dataset_files(path: Path) -> list[Path]:
    """The files that hold a data set's split.

    Raises:
        UserError: as `dataset_rows`.
    """
    return _files(_loaded(path))


def _files(dataset: Any) -> list[Path]:
    return [Path(file["filename"]) for file in dataset.cache_files]


def _loaded(path: Path) -> Any:
    """The split of a data set that is named: `hf:ID`, `hf:ID:SPLIT`, `hf:ID:CONFIG:SPLIT`, or a folder alone."""
    datasets = _needed("datasets", f"{path} is a data set, which")
    name, *more = str(path).removeprefix(_PREFIX).split(":")
    if not name or len(more) > 2 or not all(more):
        raise UserError(f"got {path}, expected hf:ID, hf:ID:SPLIT or hf:ID:CONFIG:SPLIT")
    folder = Path(name)
    try:
        if any((folder / saved).is_file() for saved in _SAVED):
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, *more[:-1])
    except Exception as error:  # whatever the library and its readers may raise
        said = " ".join(str(error).split())
        raise UserError(
            f"cannot load the data set {name}: {said}; expected an id of the Hub, which takes a network, or a folder"
        ) from error
    splits = found if isinstance(found, dict) else {str(found.split or "train"): found}
    split = more[-1] if more else next(iter(splits)) if len(splits) == 1 else "train"
    if split not in splits:
        raise UserError(f"{name} has no split {split}, expected one of {', '.join(splits)}: hf:{name}:SPLIT")
    return splits[split]
