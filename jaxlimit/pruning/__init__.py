"""May I have the pruned network? Kept weights are readjusted on the real loss, without a learning rate.

`prune` builds the network of one sparsity, `attained_limit` the sparsest one within a loss tolerance.
"""
