"""The inner problems that meta-training optimizes, and their data."""
