"""What came of runs: read, compared, and shown in a terminal, on a page and on a model card.

`read` reads run folders, `compare` computes differences, `table` shows them, `findings` says in
sentences which model is better, `looks` shows what a model makes of example pairs, `checkpoints`
how it groups pairs over a run, `figures` draws, and `page` puts all of it into `report.html.j2`.
"""

MARK = '<meta name="generator" content="protoclip report">'  # of a page that may be replaced
