"""The model: a `Batch` -> losses; weights in and out.

To be read in this order:

    names.py          what devices, dtypes and the files of weights are called: `Device`, `DType`, `WEIGHTS`,
                      `STATE`, `ADAPTER`, `ADAPTER_CONFIG`
    gpt2.py           GPT-2 from scratch: `GPT2`, `GPT2Config`, `Block`, `SIZES`, `config_for`, `number_of_parameters`,
                      `Attend`
    ops.py            the choice of kernels, the one file of a model that runs them: `why_no_compiled`
    lora_spec.py      which matrices have adapters: `LoRA`, `TARGETS`, `layers_named`
    lora.py           adapters, and their end: `LoRALinear`, `adapters`, `attach`, `settle`, `merge`
    new_rows.py       rows of new tokens, trained while the embedding stays: `NewRows`
    part.py           what is trained, held by a checkpoint, and from the base: `Part`, `trained`, `saved`, `of_base`,
                      `numbers_of`, `train_only`, `sha256_of`
    loss.py           cross-entropy behind a head, for a loop of one's own: `linear_cross_entropy`
    tied.py           one gradient for the two uses of a tied embedding
    packed_linear.py  weights laid out once for a CPU's products: `PackedLinear`, `can_pack`
    fixed_norm.py     layer norms of weights that stay: `FixedNorm`, `can_fix`
    precision.py      the arithmetic of a device, and narrow copies of weights: `choose_device`, `choose_dtype`,
                      `autocast`, `NARROW`, `BF16Copies`, `narrow_base`, `is_narrowed`, `with_weights`,
                      `total_norm`
    vocabulary.py     rows for the tokens of a template: `with_tokenizer`
    tensor_files.py   safetensors files, read lazily, checked, written: `opened_safetensors`, `write_safetensors`
    peft_config.py    which layers an adapter of PEFT's is of: `AdapterConfig`, `config_beside`
    peft_reading.py   an adapter of PEFT's, read: `read_adapter`, `is_adapter`, `Adapter`
    based.py          what names a base, made whole: `load_adapted`, `load_part`, `base_named`
    weights.py        folders, hub ids, the book's files: `load`, `config_of`, `files_of`, `base_of_adapter`,
                      `is_same_source`, `folder_of`, `is_checkpoint`,
                      `save_hf`, `save_book`, `check_range`, `write_tokenizer`, `load_weights`,
                      `save_weights`
    peft_layout.py    an adapter in PEFT's layout, written: `save_adapter`
"""
