"""Metrics: texts and numbers -> figures with their uncertainty.

To be read in this order:

    statistics.py    error bars, tests and agreement: `bootstrap`, `bootstrap_all`, `bootstrap_mean`, `wilson`,
                     `paired_permutation`, `sign_flip`, `holm`, `win_tie_loss`, `pearson`, `pearson_interval`,
                     `spearman`, `cohen_kappa`, `krippendorff_alpha`, `Interval`, `Permutation`, `Statistic`,
                     `WinTieLoss`, `Floats`, `LEVEL`, `RESAMPLES`, `SEED`
    text_metrics.py  responses held against references: `measures`, `Measure`, `exact_match`, `is_exact`,
                     `loops`, `names_it`, `accuracy`, `mean_interval`, `multiple_choice_measure`, `rouge_scores`,
                     `words_of`, `bounds`, `NAMES`
    perplexity.py    what the model finds likely: `response_perplexities`, `choice_accuracy`
"""
