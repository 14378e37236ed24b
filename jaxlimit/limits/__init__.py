"""How sparse can the network be pruned? The four limits as roots of scalar functions, and their intervals.

`pruning_limit` is the one entry: it checks, poses the problem, chooses a source of curvature and solves.
"""
