"""`python -m tools.gpu_day.collect FOLDER`: a GPU day's results into benchmarks/results, beside what was predicted.

It writes `CARD.json` (`h100.json`): the machine, every figure, and for those that the roofline predicts
(`fastft.scaling.predict`, at its part of the peak rates) the prediction. Each that is off by more than a factor of
`FAR` is listed and printed: there either the kernel or the prediction is to be looked at.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from fastft.common import files
from fastft.common.errors import EXIT_DONE, UserError
from fastft.scaling.predict import EFFICIENCY
from tools.gpu_day import summary
from tools.gpu_day.summary import Result

FAR = 1.3


def collected(results: list[Result]) -> dict[str, Any]:
    """What is written, from the results of a day.

    Raises:
        UserError: they do not say of which card they are, or are of a pretended one.
    """
    card = next((result for result in results if (result["phase"], result["task"]) == ("env", "card")), None)
    if card is None or "name" not in card:
        raise UserError("got results without the card that they are of, expected those of a run with the phase env")
    if card["pretended"]:
        raise UserError("got the results of a pretended GPU, expected those of a real one: nothing there was measured")
    figures = {f"{result['phase']}: {result['task']}": _without(result, "phase", "task") for result in results}
    compared = {name: found for name, result in figures.items() if (found := comparison(result)) is not None}
    far = {name: found for name, found in compared.items() if max(found["factor"], 1 / found["factor"]) > FAR}
    machine = _without(card, "phase", "task", "at", "pretended")
    return {"machine": machine, "predicted_at": EFFICIENCY, "compared": compared, "far": far, "figures": figures}


def comparison(result: Result) -> dict[str, float] | None:
    """What was measured, what was predicted, and the first by the second; None where nothing was predicted.

    Milliseconds; of the ceilings, TB/s and TFLOP/s, predicted to be the same part of the peak as all else.
    """
    predicted = {
        "gpu_ms": result.get("predicted_ms"),
        "milliseconds": _over(result.get("floor_milliseconds"), EFFICIENCY),
        "tb_per_s": _over(result.get("peak"), 1 / EFFICIENCY),
        "tflops": _over(result.get("peak"), 1 / EFFICIENCY),
    }
    for key, expected in predicted.items():
        if expected and result.get(key):
            return {"measured": result[key], "predicted": expected, "factor": result[key] / expected}
    return None


def file_name(card: str) -> str:
    """`h100.json` of an `NVIDIA H100 80GB HBM3`: the first word of its name with a digit."""
    words = card.replace("-", " ").split()
    return next(word for word in words if any(letter.isdigit() for letter in word)).lower() + ".json"


def _without(result: Result, *keys: str) -> Result:
    return {key: value for key, value in result.items() if key not in keys}


def _over(value: float | None, by: float) -> float | None:
    return None if value is None else value / by


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_day.collect")
    parser.add_argument("folder", type=Path, help="what the day wrote")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the collected ones go")
    options = parser.parse_args(argv)
    try:
        found = collected(summary.read(options.folder / "results.jsonl"))
        files.make_folder(options.results, remedy="choose another with --results")
        path = options.results / file_name(found["machine"]["name"])
        files.write_json(path, found)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    print(f"{path}: {len(found['figures'])} figures, {len(found['compared'])} of them predicted")
    for name, each in found["far"].items():
        print(f"  {each['factor']:6.2f} x the prediction: {name}, {each['measured']:.3g} for {each['predicted']:.3g}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
