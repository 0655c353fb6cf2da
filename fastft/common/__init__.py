"""What every room may use: nothing of fastft -> errors, files, the terminal, options.

To be read in this order:

    errors.py    the errors that a user meets, and their exit statuses: `FastftError`, `UserError`, `TrainingError`,
                 `LostRank`, `JudgeUnavailable`, `EXIT_DONE`, `EXIT_FAILED`, `EXIT_USER_ERROR`
    kinds.py     what kind of thing a value is, in words: `kind_of`
    nearest.py   the name that was meant: `nearest`, `did_you_mean`, `did_you_mean_path`
    ranges.py    ranges of whole numbers as options write them: `range_named`
    files.py     whole files or none: `write_text`, `write_json`, `replacing`, `read_json`, `object_or_empty`,
                 `make_folder`, `identity`, `cache_folder`, `LFS_POINTER`
    jsonl.py     JSON lines that outlive a kill: `JsonLines`, `objects`
    lock.py      one writer of a folder at a time: `writing`, `refuse_if_held`
    console.py   what a person sees while something runs: `say`, `warn`, `show`, `meter`, `Meter`, `silenced`,
                 `console`, `SafeConsole`, `printable`, `discard`
    options.py   a dataclass of options as a table, and what is made of it: `option`, `Condition`, `Facts`, `table`,
                 `check_values`, `check_config`, `names_checked`, `options_parser`, `spelt_out`, `help_of`,
                 `plain_error`
    effects.py   options that can have no effect: `check_effects`
    keywords.py  words that an option takes as themselves: `is_keyword`, `hidden_path`, `Option`
    optional.py  what is installed beside fastft, or a line that says how: `need`
    shell.py     commands as they can be pasted into a shell: `command`
    memory.py    memory taken, and kept on a CPU: `peak_memory`, `keep_freed_memory`
    version.py   `__version__`
"""
