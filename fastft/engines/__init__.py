"""Engines: a `Batch` and a rate -> an update, with the arithmetic that `--dtype` names.

To be read in this order:

    engine.py       what training asks of an engine, and the plain one: `AnyEngine`, `Engine`, `Update`
    optim.py        AdamW, its groups, and which learning rate a step has: `adamw`, `parameter_groups`,
                    `learning_rate`
    moments.py      AdamW's moments: names, sizes, how checkpoints lay them out: `MOMENTS`, `BYTES_OF_A_WEIGHT`,
                    `Moments`
    flat.py         weights, gradients, moments and narrow copies, each in one piece
    gpu_engine.py   at a GPU's pace: steps captured and replayed: `GpuEngine`
    zero.py         ZeRO: moments, gradients and weights parted among the ranks: `ZeroEngine`
    zero_config.py  DeepSpeed's file, held against the options: `read_zero_config`
    zero_setup.py   what DeepSpeed is told, and where fastft stands in for it
    zero_state.py   what it has parted, made whole
    shards.py       its checkpoints, written in the background
    choose.py       which engine a run trains with: `make_engine`
"""
