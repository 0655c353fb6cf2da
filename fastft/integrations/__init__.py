"""Integrations: other projects' models, batches and training code -> the same numbers, on fastft's fast path.

Nothing here is imported by the rest of fastft, and none of it needs the library that it speaks to until it is used.

To be read in this order:

    transformers/  attention, activation and loss of any causal model of transformers, and its Trainer's batches
    book/          the code of "Build a Large Language Model (From Scratch)", chapters 4 to 7
    trl.py         the same within TRL's SFTTrainer: `FastftSFTTrainer`, `use_fused_head`
"""
