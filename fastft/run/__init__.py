"""A run: its options, its folder, its data.

To be read in this order:

    config.py        everything that determines a run, as options: `TrainOptions`, `DataOptions`, `LearningOptions`,
                     `RECIPES`, `recipe_options`, `defaults_of`, `changed_settings`, `settings_of`, `to_yaml`,
                     `from_yaml`, `Schedule`
    needs.py         what its options need to have an effect
    decodings.py     how answers were decoded, and what sets of them are called: `decoding_of`, `settings_in`,
                     `differing`, `all_said`, `check_name`, `called`, `made_from`, `Names`, `names_of_two`,
                     `names_joined`, `page_called`, `SPLIT_NAMES`, `UNNAMED`
    folder.py        the names of its files, and where each lies: `Run`, `names_of`, `CONFIG`, `METRICS`, `RESPONSES`,
                     `SCORES`, `JUDGE_REPLIES`, `REPORT`, `REPORT_NUMBERS`, `PLOTS`, `AB_PAGE`, `AB_NUMBERS`,
                     `COMPARISON`, `COMPARISON_ELSEWHERE`, `DEMO`, `EXPORT_MADE`, `EXPORTED`, `CONVERSATIONS`
    data.py          its files' records, split, with their template: `load_data`, `read_sources`, `Data`,
                     `warn_of_data`
    trained.py       what it was trained on, held against what is there now: `data_of`, `check_same_data`,
                     `check_same_tokenizer`, `trained_model`
    given.py         a model by what holds it, and its template: `run_of`, `weights_of`,
                     `template_for`, `template_name_for`
    metrics_file.py  its lines, kept over a kill: `MetricsFile`, `read_metrics`
    ledger.py        which examples stay hard: `read_ledger`
"""
