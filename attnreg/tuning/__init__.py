"""Tables of measured times: how they are made, kept, found again and shown.

Read ``lookup`` for the rule by which an entry serves a call, ``table`` for what a file holds, ``tune`` for the measuring.
"""
