"""Measuring a machine's backends, and writing the tables by which ``attnreg.tables`` chooses; above everything that runs a call.

Read ``tune`` for the measuring, ``writing`` for the files.
"""
