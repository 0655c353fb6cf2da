"""Training: a run's options, data and model -> a trained run.

To be read in this order:

    train.py       from options to a model; a run's parts put together: `train`, `Outcome`, `Trainer`
    loop.py        for each step: batches, forward and backward, update, line, save, evaluate
    steps.py       a step: its batches, its gradients, its update and rate, its line
    evaluation.py  when the loop evaluates: the validation loss, the best weights, samples
    saving.py      when it saves and what, where a run goes on from, what it leaves at its end
    checkpoint.py  how: checkpoints that are whole or passed over: `Progress`, `load_tensors`
    meeting.py     where the ranks agree to stop or to save
    skips.py       how many steps without an update a run takes
    lines.py       the files that are written line by line
    job.py         what all of these look at
    preparing.py   before anything is written: options, folder, model: `initial_model`
    prepared.py    the data in the forms that training reads: examples, batches, the plan, what is evaluated
    token_mean.py  the validation loss, weighted by tokens
    book.py        the book's order of examples, and its means
    ahead.py       batches made in a thread
    dry_run.py     what a run would do and take
    verify.py      the proof that a resumed run is the same: `verify_resume`, `VerifyOptions`
"""
