"""Data: a file -> records, prompts, token ids, and which of them are learned.

To be read in this order:

    records.py           what an example is, and how many are split: `Record`, `Turn`, `Tokens`, `ReadingRules`,
                         `EndOfTextInData`, `Format`, `Role`, `ROLES`, `digest_of`, `Split`, `split`; what an entry
                         holds: `category_of`, `fault_of_category`, `choices_of`, `fault_of_choices`, `right_choice`,
                         `answers_of`, `left_out`, `END_OF_TEXT_MARK`
    json_rows.py         rows of JSON text: `BadRecord`, `in_one_line`
    csv_rows.py          rows of CSV and TSV
    arrow_rows.py        rows of Parquet, Arrow and Hugging Face data sets
    containers.py        which of them a file gets, by its content; folders: `rows_of`
    texts.py             the texts of a row, checked: `from_text`, `check_text`, `Malformed`
    pairs.py             rows of an instruction and an output
    conversations.py     rows of turns and of segments
    formats.py           what a row's keys mean: `checked`, `parse_fields`
    documents.py         documents cut into contexts: `contexts`
    splits.py            which of them are for what, by shares: `Shares`, `shares_of`, `split_by`
    sample.py            the embedded data
    reading.py           a source -> its records: `load_records`, `Records`, `Piece`, `piece_of`, `data_path`,
                         `check_usable`, `describe_bad`
    audit.py             what in them is odd, left out or not read: `audit`, `Findings`
    prompts.py           a template: training text, what is learned, prompt and extraction: `Template`, `TEMPLATES`,
                         `ALPACA`, `Learn`, `RESPONSES`, `TrainOn`, `Part`, `Special`, `asked_in`
    chat_template.py     Jinja chat templates, read and written; any template by its name: `AnyTemplate`,
                         `template_named`, `template_beside`, `template_described`,
                         `as_jinja`
    tokenizer.py         text to ids and back, and GPT-2's own: `Tokenizer`, `gpt2_tokenizer`, `carried_files`,
                         `END_OF_TEXT`, `VOCAB_SIZE`
    folder_tokenizer.py  the one that lies beside weights: `tokenizer_of`, `with_special_tokens`, `NAMES`,
                         `UNREAD`
    encode.py            records to ids, and the supervised spans of each example: `encode`, `EncodedSet`, `Text`,
                         `EncodingRules`, `TooLong`, `encoded_set`, `texts_of`, `prompts_of`, `name_rows`
    token_cache.py       the same for large files, memory-mapped: `RecordFile`, `TokenCache`, `joined`
    sources.py           the files of a run, each split, and what a row is called: `Source`, `read_source`,
                         `check_different`, `Places`, `joined_parts`, `first_of_each`
"""
