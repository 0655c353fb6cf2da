"""Reports: a run's files -> `report.html`, all its numbers, and plots.

To be read in this order:

    numbers.py      numbers of files that anything may have written: `finite`
    answers.py      the answers, and what is wrong with each: `Answer`, `PROBLEMS`
    talks.py        the conversations, those of several runs side by side: `Talk`, `talks_of`, `side_by_side`
    figures.py      what the files say in numbers: `read_run`, `RunFigures`, `headlines`
    answer_data.py  the answers as the page's script takes them: `answer_data`
    plots.py        the figures as SVG, PNG and PDF: `plots`, `Plot`
    report.py       the page: `report`, `ReportOptions`
"""
