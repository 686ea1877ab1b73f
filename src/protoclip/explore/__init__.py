"""The explorer of a model over pairs: what `protoclip explore` shows.

`pairs.py` says what is shown, `atlas.py` how a model groups it, `explorer.py` answers questions,
`pages.py` makes pages, and `serve.py` serves them or writes them to files.
"""
