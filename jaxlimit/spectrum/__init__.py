"""Which eigenvalues does the curvature have? Lanczos, quadrature rules, spectral measures and their brackets.

Everything here takes a product of a symmetric matrix with a vector, and no network.
"""
