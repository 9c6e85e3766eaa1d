"""Tables of measured times, as a call goes by them: found, read, and asked for the entries that serve a call.

Read ``lookup`` for the rule by which an entry serves a call, ``call`` for what an entry's call is, ``table`` for what a file
holds, ``store`` for where files are looked for. Nothing here measures or writes: that is ``attnreg.tuning``.
"""
