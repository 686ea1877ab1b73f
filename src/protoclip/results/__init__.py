"""What came of runs: read, compared, and shown in a terminal, on a page and on a model card.

`read` reads run folders, `compare` computes differences, `table` shows them and says which model is
better, `examples` are pairs to measure a run's checkpoints on, `figures` draws, and `page` puts all
of it into `report.html.j2`.
"""

MARK = '<meta name="generator" content="protoclip report">'  # of a page that may be replaced
