"""Measurements as jobs: examples are asked of a model, and what is measured becomes shards with receipts."""
