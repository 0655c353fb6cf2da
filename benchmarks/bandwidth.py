"""How fast this machine's memory is read and written: what the floors of the benchmarks count bytes by.

Torch's own operators measure it: a loop in C with eight vectors in flight, with or without prefetching, read at the
same rate within the noise. Of torch's operators the fastest are taken, since a floor must not be too high.
"""

from __future__ import annotations

import statistics

from benchmarks import common

BYTES = 1 << 30
"""Of the array: several times any processor's caches."""
ROUNDS = 7


def stream_bandwidth(*, writes: bool = False, device: str = "cpu") -> float:
    """Bytes a second that torch's threads stream, all together: the median of several rounds.

    Args:
        writes: of a pass that writes each byte back where it was read, both counted, as an optimizer's update does;
            else of reading alone.
        device: whose memory.
    """
    import torch

    array = torch.zeros(BYTES // 4, dtype=torch.float32, device=device)  # float32, which every processor adds fast
    one, other = array.chunk(2)  # two streams: up to a third faster than the sum of one

    def work() -> None:
        if writes:
            array.add_(1.0)
        else:
            torch.dot(one, other)

    array.fill_(1.0)  # zeros may all be one page, until they are written
    common.seconds_of(work, device)
    return (1 + writes) * BYTES / statistics.median(common.seconds_of(work, device) for _ in range(ROUNDS))
