"""Data: a file -> records, prompts, token ids, and which of them are learned.

To be read in this order:

    json_rows.py         the rows of a file, whatever its name: `BadRecord`
    records.py           rows as records, checked and split: `Record`, `ReadingRules`, `EndOfTextInData`,
                         `load_records`, `check_usable`, `describe_bad`, `data_path`, `digest_of`, `Split`, `split`;
                         what an entry holds: `category_of`, `fault_of_category`, `choices_of`, `fault_of_choices`,
                         `right_choice`, `answers_of`, `left_out`
    splits.py            which of them are for what, by shares: `Shares`, `shares_of`, `split_by`
    sample.py            the embedded data
    audit.py             what in them is odd, left out or not read: `audit`, `Findings`
    prompts.py           a template: training text, mask, prompt and extraction: `Template`, `TEMPLATES`, `ALPACA`
    tokenizer.py         text to ids and back, and GPT-2's own: `Tokenizer`, `gpt2_tokenizer`, `carried_files`,
                         `END_OF_TEXT`, `VOCAB_SIZE`
    folder_tokenizer.py  the one that lies beside weights: `tokenizer_of`, `NAMES`, `UNREAD`
    encode.py            records to ids, and the supervised spans of each example: `encode`, `EncodedSet`, `Text`,
                         `EncodingRules`, `TooLong`, `encoded_set`, `texts_of`, `name_rows`
    token_cache.py       the same for large files, memory-mapped: `RecordFile`, `TokenCache`, `joined`
    sources.py           the files of a run, each split, and what a row is called: `Source`, `read_source`,
                         `check_different`, `Places`, `joined_parts`, `first_of_each`
"""
