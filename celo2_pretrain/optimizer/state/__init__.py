"""The optimizer's state in files that any world can read."""
