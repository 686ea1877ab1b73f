"""The HTML report of runs: one file that is read top to bottom, and sent to a colleague.

`runs` reads run folders, `findings` says which model is better on what, `looks` shows what a model
makes of example pairs, `figures` draws, and `page` puts all of it into `report.html.j2`.
`main_figure` draws what goes beside a model card.
"""
