"""Training: a run's options, data and model -> a trained run.

To be read in this order:

    train.py       from options to a model; a run's parts put together: `train`, `Outcome`, `Trainer`
    loop.py        for each step: batches, forward and backward, update, line, save, evaluate
    steps.py       a step: its batches, forward and backward, its update, its line
    evaluation.py  when the loop evaluates: the validation loss, the best weights, samples
    saving.py      when a run saves, where a resumed one goes on from, and what a finished one exports
    checkpoint.py  what a run leaves on the disk, also when it is killed: checkpoints that are whole or passed over:
                   `Progress`, `load_tensors`
    meeting.py     where the ranks agree to stop or to save
    skips.py       how many steps without an update a run takes
    lines.py       metrics and ledger, written line by line
    callbacks.py   what a program of one's own hears: `Callbacks`
    trackers/      what TensorBoard, wandb, MLflow and Trackio hear
    job.py         the run, options, data and engine that all parts above look at
    preparing.py   before anything is written: options settled, folder checked: `settled`
    models.py      the model to begin with, to go on with, and that is left: `initial_model`
    given_records.py  records that are given as objects, in the run's folder
    prepared.py    the data as training reads them: examples, what makes batches, the plan, what is evaluated
    token_mean.py  the validation loss, weighted by tokens
    book.py        the book's order of examples, and its means
    ahead.py       batches made in a thread
    dry_run.py     what a run would do and take
    verify.py      the proof that a resumed run is the same: `verify_resume`, `VerifyOptions`
"""
