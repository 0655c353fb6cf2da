"""Trackers: the lines of a run's metrics -> its curves in TensorBoard, Weights & Biases, MLflow and Trackio.

To be read in this order:

    figures.py      what a line's figures are called in all of them: `points_of`
    tracker.py      what each adapter is given and gives: `Start`, `Tracker`, `End`
    tracking.py     each in a thread of its own, whatever becomes of it there: `tracked`
    tensorboard.py  event files in the run's folder
    wandb.py        Weights & Biases: its server, or a folder of its own
    mlflow.py       MLflow: its server, or a database
    trackio.py      Trackio: its database, or a Space
"""
