"""What would the paper's own code predict? Its prediction from the same weights, with its roundings.

The limits do not use it; it stands beside them for comparison.
"""
