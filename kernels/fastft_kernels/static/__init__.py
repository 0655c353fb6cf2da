"""The static gate: every kernel at every shipped configuration, compiled for GPUs that are not there -> its faults.

    python -m fastft_kernels.static [--arch sm_80 sm_90] [--update] [--markdown] [--liger]

The public functions run forward and backward on CPU tensors of real widths, and each launch is compiled instead. A
kernel fails that spills registers, does not fit into shared memory, multiplies without tensor cores, adds atomically,
or reads and writes single 16-bit elements; and one that needs more registers, or of which fewer blocks fit at a time,
than the golden figures say. No GPU is asked for or touched.

    offline.py    compiles launches for an absent GPU, and reads from the machine code what they need
    cases.py      what is compiled
    gate.py       what is wrong with it, by itself and beside golden.json, Triton's version by version
    peers.py      Liger-Kernel's kernels, compiled the same way
    shown.py      the figures as a table
    __main__.py   the command
"""
