"""Neuron empirical gradients: the science, as a plain library."""
