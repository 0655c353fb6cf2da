"""Batches: token ids -> steps, packs, and the `Batch` that a model is given.

To be read in this order:

    plan.py   which examples form which step, and how it is cut into packs of equal cost: `make_plan`, `Plan`, `Step`,
              `Mix`, `Packing`, `Cost`, `Indices`
    asked.py  token ids with labels of any source, checked: what is asked of each example: `Asked`, `asked_rows`
    batch.py  `Batch`: a prefix tree of packed examples, which share the tokens they begin with alike, or padded rows:
              `pack`, `pack_asked`, `padded_batch`, `from_padded`, `Batcher`, `Planner`, `RowPlanner`, `with_tensors`,
              `visible_until_of`,
              `Rounding`, `few_sizes`, `near_sizes`
"""
