"""Which tensors of a model get the learned rule, and as which matrices."""
