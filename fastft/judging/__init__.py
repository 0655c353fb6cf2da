"""Judging: responses -> judgements of a language model.

    options.py    who is asked, and how long it is waited for: `JudgeOptions`, `asking`, `server_of`
    questions.py  an entry -> what is asked about it (prompt, JSON schema, room for the reply): `Style`,
                  `Question`, `PromptOf`, `response_prompt`, `turn_prompt`
    wire.py       a request -> its body, within time and size; what counts as no answer, and when to try again:
                  `NoAnswerError`
    refusals.py   a request -> the same without the parameters that its server does not take
    server.py     what is asked of a server, whatever its protocol
    ollama.py     Ollama's own protocol: version, models, pull, chat: `OllamaServer`, `DEFAULT_URL`
    openai.py     the protocol of OpenAI-compatible servers: models, chat completions: `OpenAIServer`
    thoughts.py   the text of a reply -> its answer, without the trace of a reasoning model
    ladder.py     an answer -> a score from 0 to 100, or why there is none
    journal.py    every answer that was read, on disk before the next question is asked: `Journal`
    rows.py       what is asked about each response, and what the journal says that was answered
    asking.py     asking what is still open, on a few threads
    judgement.py  what came of it, and what a run's judgements add up to: `Judgement`
    judge.py      a score of each response: `Judge`
    pairwise.py   which of two responses is better, asked in both orders: `judge_pairs`, `Pair`
    referee.py    a judge's server between two runs: `ServerReferee`

`questions`, `wire`, `thoughts` and `journal` know nothing of each other; the protocols know questions, the wire and
refusals, the ladder knows thoughts.
"""
