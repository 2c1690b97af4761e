"""What a run records: metrics, norms, timings, pictures."""
