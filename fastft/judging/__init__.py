"""What `fastft/judging/judge.py` asks with: questions, the wire, two protocols, the reading of replies, and the
journal.

    questions.py  an entry -> what is asked about it (prompt, JSON schema, room for the reply), and one num_ctx for all
    wire.py       a request -> its body, within time and size; what counts as no answer, and when to try again
    refusals.py   a request -> the same without the parameters that its server does not take
    ollama.py     Ollama's own protocol: version, models, pull, chat
    openai.py     the protocol of OpenAI-compatible servers: models, chat completions
    ladder.py     the text of a reply -> a score from 0 to 100, or why there is none
    journal.py    every answer that was read, on disk before the next question is asked

`questions`, `wire`, `thoughts` and `journal` know nothing of each other; the protocols know questions, the
wire and refusals, the ladder knows thoughts.
"""
