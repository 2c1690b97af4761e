"""The equivalence matrix: is the sharded step the unsharded step, in every way of sharding? See docs/equivalence.md."""
