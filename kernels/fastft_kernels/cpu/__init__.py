"""Operations in C, for CPUs: what torch's own operators take many calls or several passes over memory for.

To be read in this order:

    library.py   the C files compiled, kept and called: `why_not`, `run`
    common.h     what they share
    threads.c    a function's parts in torch's threads
    update.py    AdamW's update and the norm of gradients, with `update.c`
    decode.py    attention of one new token a sequence over cached keys and values, with `decode.c`
    best.py      the numbers of each row that come close to its largest, with `best.c`
"""
