"""Stored measurements: shards with receipts, on disk or in a bucket, and their readers."""
