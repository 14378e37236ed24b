"""How does the loss bend? Products of a vector with the Hessian or the Gauss-Newton matrix of a mean loss.

The mean is over batches of examples; the matrix itself is only written out for small networks.
"""
