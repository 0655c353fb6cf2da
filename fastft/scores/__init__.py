"""Scores: responses and judgements -> `scores.json`, comparisons, ratings.

To be read in this order:

    conversations.py          conversations as a judge takes them, and their figures: `read_talks`, `Talks`,
                              `talk_notes`, `talks_in_words`
    scores_file.py            a scores.json that can be relied on: `read_scores`
    score.py                  text metrics of every response, and a judge's score of each: `score`, `ScoreOptions`,
                              `summary_line`, `read_responses`, `responses_of`, `responses_sha256`, `answer_notes`,
                              `judge_identity`, `judges_differ`, `other_judges`, `rungs_in_words`, `OTHER_JUDGES`
    compare_conversations.py  what differs between two runs' conversations: `compare_conversations`, `rows_of`
    compare.py                what differs between two runs: `compare`, `CompareOptions`, `show`, `raise_for_all`
    ab.py                     the page on which people rate two runs: `make_page`, `AbOptions`
    ratings.py                what their ratings say: `import_ratings`, `print_summary`
"""
