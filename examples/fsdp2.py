"""FSDP2 (`fully_shard`) without DeepSpeed: a small GPT-2 on the bytes of the installed torch's optimizers.

torchrun --nproc_per_node 2 examples/fsdp2.py
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import GPT2Config, GPT2LMHeadModel, get_cosine_schedule_with_warmup

STEPS, BATCH, LENGTH = 80, 8, 64

text = b"".join(path.read_bytes() for path in sorted(Path(torch.__file__).parent.glob("optim/*.py")))
windows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().unfold(0, LENGTH, LENGTH)  # (windows, LENGTH)

device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
if device.type == "cuda":
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
torch.manual_seed(0)
config = GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config).to(device)
for block in model.transformer.h:
    fully_shard(block)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
schedule = get_cosine_schedule_with_warmup(optimizer, 8, STEPS)
generator = torch.Generator().manual_seed(dist.get_rank())  # each rank has batches of its own

for step in range(1, STEPS + 1):
    batch = windows[torch.randint(len(windows), (BATCH,), generator=generator)].to(device)
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if step % 10 == 0 and dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.3f}", flush=True)

dist.destroy_process_group()
