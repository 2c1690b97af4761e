"""Checkpoints of a run: writing, choosing, reading, exporting."""
