"""What does the loss really do? Its mean and spread over batches, and its sweep over sparsities.

This is what predictions are compared with. What is certified on data that nobody has seen, stands here, too.
"""
