"""The model: a `Batch` -> losses; weights in and out.

To be read in this order:

    names.py          what devices, dtypes and the file of weights are called: `Device`, `DType`, `WEIGHTS`,
                      `STATE`
    gpt2.py           GPT-2 from scratch: `GPT2`, `GPT2Config`, `Block`, `SIZES`, `config_for`, `number_of_parameters`
    ops.py            the choice of kernels, the one file that runs them
    lora_spec.py      which matrices have adapters: `LoRA`, `TARGETS`, `layers_named`
    lora.py           adapters, and their end: `LoRALinear`, `adapters`, `attach`, `settle`, `merge`
    new_rows.py       rows of new tokens, trained while the embedding stays: `NewRows`
    part.py           what is trained, held by a checkpoint, and from the base: `Part`, `trained`, `saved`, `of_base`,
                      `numbers_of`, `train_only`, `sha256_of`
    loss.py           cross-entropy behind a head, for a loop of one's own: `linear_cross_entropy`
    tied.py           one gradient for the two uses of a tied embedding
    packed_linear.py  weights laid out once for a CPU's products: `PackedLinear`, `can_pack`
    precision.py      the arithmetic of a device, and narrow copies of weights: `choose_device`, `choose_dtype`,
                      `autocast`, `NARROW`, `BF16Copies`, `narrow_base`, `is_narrowed`, `with_weights`,
                      `total_norm`
    vocabulary.py     rows for the tokens of a template: `with_tokenizer`
    weights.py        folders, hub ids, the book's files: `load`, `config_of`, `files_of`, `is_checkpoint`,
                      `save_hf`, `save_book`, `check_range`, `write_tokenizer`, `load_weights`,
                      `save_weights`
"""
