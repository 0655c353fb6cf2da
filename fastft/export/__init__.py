"""Exports: a trained run -> files that other programs read.

To be read in this order:

    places.py       where an export lies, and that nobody else's file is written over: `new_files`
    go_template.py  a template of fixed parts as Go's text/template, for Ollama: `as_go`
    vocabulary.py   a tokenizer as GGUF holds it: `Vocabulary`, `vocabulary_of`
    gguf_file.py    a model as a GGUF file, for llama.cpp: `write_gguf`, `Quantize`
    gguf_adapter.py an adapter as a GGUF file by itself: `write_gguf_adapter`, `check_adapter`
    modelfile.py    what Ollama makes a model of: `modelfile`, `model_name`
    prompt_ids.py   whether other programs give a prompt our ids: `warn_of_other_ids`
    base.py         what a run began with, as far as it is known: `Base`, `base_of`
    card.py         the model card: `model_card`
    hub.py          to the Hugging Face hub: `push`
    export.py       the command: `export`, `ExportOptions`
"""
