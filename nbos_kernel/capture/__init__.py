"""Which part of the namespace a cell changed, as bytes; and the way back on a standby.

`changes.py` finds what changed, `groups.py` which variables travel together, `pickling.py` and `arrays.py` turn
them into bytes and back, `names.py` says which names are the user's. Nothing here knows of sockets, Jupyter or
the log.
"""
