"""A GPU that nothing waits for: a `Batch` -> the same on the device; work -> graphs of it.

To be read in this order:

    transfers.py    copies that neither side waits for: `pinned`, `on_the_way`, `Reading`
    staging.py      a batch in one copy, at one place: `Staging`, `Staged`
    cuda_graphs.py  work that is asked for by one call: `Graphs`
    clock.py        how long the GPU takes, without the host's time
"""
