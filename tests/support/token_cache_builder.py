"""Fills a token cache in a process of its own, to be killed or measured.

python token_cache_builder.py DATA CACHE WORKERS: encodes the file's training split; prints a JSON line with its
fingerprint and by how many bytes the process's peak of memory has grown. WORKERS may be `plain`: without the cache.

python token_cache_builder.py DATA CACHE kills: does it in forks, each killed before its nth change in CACHE, for each n
there is, and each followed by a whole one; prints the number of kills and the fingerprints that came out.

python token_cache_builder.py DATA CACHE beside OTHER: reads the file as a run does beside another one, which is held in
memory, audits both and encodes their training splits as one; prints the same line.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

from warm_launcher import Changes

from fastft.data import sources
from fastft.data.encode import EncodedSet, EncodingRules, encode
from fastft.data.prompts import ALPACA, RESPONSES
from fastft.data.reading import load_records
from fastft.data.records import split
from fastft.data.token_cache import RecordFile, TokenCache, pick
from fastft.data.tokenizer import gpt2_tokenizer
from fastft.model.gpt2 import config_for
from fastft.run.config import TrainOptions
from fastft.run.data import load_data

SEED = 7


def build(data: Path, folder: Path, workers: int | None = None) -> EncodedSet:
    file = RecordFile.open(data, TokenCache(folder))
    indices = split(len(file), SEED).train
    return file.encode(indices, ALPACA, gpt2_tokenizer(), EncodingRules(RESPONSES, 1024), workers=workers)


def build_plain(data: Path) -> EncodedSet:
    held = load_records(str(data)).good
    records = pick(held, split(len(held), SEED).train)
    return encode(records, ALPACA, gpt2_tokenizer(), max_length=1024)


def build_beside(data: Path, folder: Path, other: Path) -> EncodedSet:
    sources.cache_for = lambda path, _: TokenCache(folder) if path == data else None
    options = TrainOptions(data=[str(data), str(other)], split_seed=SEED)
    both = load_data(options)
    both.audit()
    return both.encode("train", options, config_for("gpt2"))


def forget_peak() -> int:
    """Lets the peak of memory begin anew (Linux: what the imports took would hide what is measured); its bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])


def killed(data: Path, folder: Path, kill_at: int) -> bool:
    """Whether a fork that builds came to its `kill_at`th change."""
    pid = os.fork()
    if pid == 0:
        sys.addaudithook(Changes(str(folder), kill_at))
        build(data, folder)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) < 0


def kills(data: Path, folder: Path) -> None:
    number, fingerprints = 1, set()
    os.fsync = lambda _: None  # what is written survives a killed process without it
    while killed(data, folder, number):
        fingerprints.add(build(data, folder).fingerprint())
        left = [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]
        assert not left, left
        shutil.rmtree(folder)
        number += 1
    print(json.dumps({"kills": number - 1, "fingerprints": sorted(fingerprints)}))


if __name__ == "__main__":
    gpt2_tokenizer().encode("the vocabulary is read")
    data, folder, how = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    if how == "kills":
        kills(data, folder)
    else:
        before = forget_peak()
        if how == "beside":
            some = build_beside(data, folder, Path(sys.argv[4]))
        else:
            some = build_plain(data) if how == "plain" else build(data, folder, int(how))
        print(json.dumps({"fingerprint": some.fingerprint(), "grown": peak_bytes() - before}))
