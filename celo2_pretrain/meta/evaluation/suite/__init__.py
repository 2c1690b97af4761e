"""The tasks of the evaluation suite, none of them in meta-training."""
