"""A plain DeepSpeed training loop, ZeRO-2: a small GPT-2 on the bytes of the installed torch's optimizers.

deepspeed examples/deepspeed_loop.py        on all GPUs of the machine
DS_ACCELERATOR=cpu deepspeed --num_gpus 2 examples/deepspeed_loop.py        without a GPU
"""

from pathlib import Path

import deepspeed
import torch
from transformers import GPT2Config, GPT2LMHeadModel

STEPS, BATCH, LENGTH = 80, 8, 64
CONFIG = {
    "train_micro_batch_size_per_gpu": BATCH,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.1, "torch_adam": True}},
    "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": STEPS, "warmup_num_steps": 8}},
}

text = b"".join(path.read_bytes() for path in sorted(Path(torch.__file__).parent.glob("optim/*.py")))
windows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().unfold(0, LENGTH, LENGTH)  # (windows, LENGTH)

torch.manual_seed(0)
config = GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config)
engine, *_ = deepspeed.initialize(model=model, config=CONFIG)
generator = torch.Generator().manual_seed(engine.global_rank)  # each rank has batches of its own

for step in range(1, STEPS + 1):
    batch = windows[torch.randint(len(windows), (BATCH,), generator=generator)].to(engine.device)
    loss = engine(input_ids=batch, labels=batch).loss
    engine.backward(loss)
    engine.step()
    if step % 10 == 0 and engine.global_rank == 0:
        print(f"step {step}: loss {loss.item():.3f}", flush=True)
