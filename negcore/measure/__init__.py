"""Measurements of a model: NeurGrad, sweeps, interventions, estimators, and the votes they add up to."""
