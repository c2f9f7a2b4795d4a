"""Prefect tasks and plain worker classes."""
