"""transformers: a causal model, and examples with labels -> its own outputs, losses and gradients, faster.

To be read in this order:

    ops.py        the kernels that run, and how often: `counted`
    intervals.py  what each token may see, as one integer a key
    attention.py  the attention implementation `fastft`: `register`
    dropout.py    found, set to 0, refused: `zero_dropout`
    loss.py       a loss that never makes the logits of rows without a label
    swap.py       an object given another class and its own back
    replaced.py   a module of one tensor computed another way, where that is right
    trial.py      a copy of it tried out, in each dtype, forward and backward
    norms.py      layer norms and RMS norms, whoever wrote them
    activations.py  GELU, and the SiLU of gated products
    report.py     what was accelerated, and what was left alone: `Report`
    speedup.py    all of it on one model: `accelerate`, `restore`, `accelerated`, `zero_dropout`
    collator.py   batches that hold a shared beginning once: `TreeCollator`, `features_of`

Importing this costs nothing; transformers is imported when one of the names is used.
"""

from fastft.integrations.transformers.attention import register
from fastft.integrations.transformers.collator import TreeCollator, features_of
from fastft.integrations.transformers.dropout import zero_dropout
from fastft.integrations.transformers.ops import counted
from fastft.integrations.transformers.report import Report
from fastft.integrations.transformers.speedup import accelerate, accelerated, restore

__all__ = [
    "Report",
    "TreeCollator",
    "accelerate",
    "accelerated",
    "counted",
    "features_of",
    "register",
    "restore",
    "zero_dropout",
]
