"""What everything else stands on: trees of weights, batches, devices, memory, files.

It knows nothing of curvature, of limits, or of networks.
"""
