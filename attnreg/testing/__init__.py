"""What is true of a call, and how far a result may be from it.

``oracle`` writes the ops down densely; ``budget`` says which error passes; ``inputs`` makes the tensors of a call; ``checking``
compares a contender's results; ``stage`` is what contenders for one call share. Tuning, the benchmarks and the tests all judge
by these.
"""
