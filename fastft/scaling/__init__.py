"""Scaling: a configuration -> what training would cost, PREDICTED before it runs: memory by rank and traffic by
optimizer step, with plain data parallelism (stage 0) and with each stage of ZeRO; time on a card at its peak rates.

    setup.py        what a prediction is asked for: `Setup`, `Sizes`, `Buckets`, `VARIANTS`
    states.py       weights, gradients and moments: what stays, how it comes and goes
    activations.py  what the forward pass saves
    fetches.py      what stage 3 gathers, and when it gives it back
    memory.py       a rank's fullest moments, put together: `memory`, `Memory`
    traffic.py      what travels between ranks: `traffic`, `Traffic`
    advice.py       which stage to take: `recommend`, `table`, `MARGIN`
    measured.py     bytes that real ranks measured, beside these
    page.py         docs/scaling.md: `python -m fastft.scaling --markdown`
    predict.py      a step's kernels counted, and their time at peak rates: `step_costs`, `packed_batch`,
                    `training_set`, `EFFICIENCY`

With Ψ parameters on N ranks, Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter
Models" (arXiv:1910.02054, sections 5 and 7), count 16 Ψ bytes of weights, gradients, masters and moments in mixed
precision, of which stage 1 parts 12 Ψ among the ranks (masters and moments), stage 2 the gradients' 2 Ψ too, and stage
3 the weights' 2 Ψ; and 2 Ψ elements that a rank sends in a step, 3 Ψ in stage 3. What is counted here is what
DeepSpeed 0.19.8 does with fastft's settings, which is something else; docs/scaling.md lists the differences, and shows
the bytes that real ranks measured beside these.

Letters: T tokens, R loss rows, C width, V vocab, L layers, H heads, N ranks. Sizes are bytes unless said otherwise.
"""

from fastft.scaling.advice import MARGIN, recommend, table
from fastft.scaling.memory import Memory, memory
from fastft.scaling.setup import VARIANTS, Buckets, Setup, Sizes
from fastft.scaling.traffic import Traffic, traffic

__all__ = [
    "MARGIN",
    "VARIANTS",
    "Buckets",
    "Memory",
    "Setup",
    "Sizes",
    "Traffic",
    "memory",
    "recommend",
    "table",
    "traffic",
]
