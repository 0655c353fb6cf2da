"""The door to other projects' training code: their models, batches and trainers -> the same numbers, faster.

Nothing here is imported by the rest of fastft, and none of it needs the library that it speaks to until it is used.

To be read in this order:

    optional.py    what is installed beside fastft, or a line that says how: `need`
    transformers/  attention, activation and loss of any causal model of transformers, and its Trainer's batches
    trl.py         the same within TRL's SFTTrainer: `FastftSFTTrainer`, `use_fused_head`
"""
