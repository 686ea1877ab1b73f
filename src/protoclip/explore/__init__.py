"""The explorer of a model over pairs: what `protoclip explore` shows.

`pairs.py` says what is shown, `atlas.py` how a model groups it, `neighbours.py` what is near to
what, `explorer.py` answers questions, `render.py` makes pages of the answers, `server.py` serves
them at an `address.py`, and `static.py` writes them to a folder.
"""
