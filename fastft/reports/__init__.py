"""Reports: a run's files -> `report.html`, and all its numbers.

To be read in this order:

    figures.py  what the files say in numbers: `read_run`, `RunFigures`
    report.py   the page: `report`, `ReportOptions`
"""
