"""The HTML report of runs: one file that is read top to bottom, and sent to a colleague.

`runs` reads run folders, `findings` says which model is better on what, `looks` shows what a model
makes of example pairs, `repeat` how to train the runs again, `figures` draws, and `page` puts all
of it into `report.html.j2`.
`main_figure` draws what goes beside a model card.
"""

MARK = '<meta name="generator" content="protoclip report">'  # of a page that may be replaced
