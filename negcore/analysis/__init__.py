"""Analyses of stored numbers: linearity, skill neurons, causal checks."""
