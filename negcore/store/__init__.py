"""What is kept of measurements: shards with receipts on disk or in a bucket, and how they are read back."""
