"""The passes of the update in plain torch, compiled for the CPU, and in Triton."""
