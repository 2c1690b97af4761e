"""What a run will need and how long it will take, before paying for a node: `celo2-pretrain plan`.

devices      GPUs: memory, peaks, bandwidths, with their sources
shards       who holds and owns what on N ranks, and what a rank sends in an optimizer step
activations  bytes that a micro-batch takes, traced on the real model without allocating it
memory       bytes by part, as DeepSpeed and Celo2 hold them
step_time    seconds of a step, from stated assumptions
estimate     all of it for one config on one kind of GPU
report       as text and as JSON
"""
