"""Decoding: a model and prompts -> answers, token by token.

To be read in this order:

    decode.py     many prompts at once over one cache: `decode`, `greedy`, `NO_STOP`, `common_beginning`
    answers.py    what is asked for, and what is given: `Request`, `Answer`
    ragged.py     exactly the rows that go on: the way of a CPU
    slots.py      a fixed number of rows, captured: the way of a GPU
    prefix.py     what all prompts begin with, computed once
    kv_cache.py   keys and values of sequences that come and go: `KVCache`, `BlockCache`
    sampling.py   how the next token is chosen: `Sampling`, `GREEDY`, `Sampler`, `Choice`, `Chosen`, `NO_OTHER`,
                  `ids_without_text`
    inference.py  a model made ready for answering: `prepared`
"""
