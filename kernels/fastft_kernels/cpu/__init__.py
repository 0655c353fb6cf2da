"""Operations in C, for CPUs: tensors -> tensors, for what torch's own operators take many calls or several passes over
memory for.

To be read in this order:

    library.py        the C files compiled, kept and called: `why_not`, `run`
    common.h          what they share
    threads.c         a function's parts in torch's threads
    vector.h          floats by the vector: conversions from and to bf16, the exponential
    given.py          what is looked at before a tensor is given away
    function.py       operations with a graph of gradients, and without: `applied`
    attention.py      interval attention and its gradients, with `attention.c`
    activations.py    GELU with its bias, and SwiGLU, with `activations.c`
    norms.py          layer norm and RMS norm with the addition before them, with `norms.c`
    cross_entropy.py  losses and gradients of rows of logits, with `cross_entropy.c`
    update.py         AdamW's update and the norm of gradients, with `update.c`
    decode.py         attention of one new token a sequence over cached keys and values, with `decode.c`
    best.py           the numbers of each row that come close to its largest, with `best.c`
"""
