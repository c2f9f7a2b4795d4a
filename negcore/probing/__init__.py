"""Skill-neuron probes: rankings of neurons, fitted probes, accuracy."""
