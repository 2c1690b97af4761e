"""A training loop by Accelerate with DeepSpeed, ZeRO-2: a small GPT-2 on the bytes of the installed torch's optimizers.

accelerate launch --multi_gpu examples/accelerate_loop.py        on all GPUs of the machine
DS_ACCELERATOR=cpu deepspeed --num_gpus 1 examples/accelerate_loop.py    without a GPU (Accelerate has one process there)
"""

from pathlib import Path

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from transformers import GPT2Config, GPT2LMHeadModel, get_cosine_schedule_with_warmup

STEPS, BATCH, LENGTH = 80, 8, 64

text = b"".join(path.read_bytes() for path in sorted(Path(torch.__file__).parent.glob("optim/*.py")))
windows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().unfold(0, LENGTH, LENGTH)  # (windows, LENGTH)

accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=2, gradient_clipping=1.0))
torch.manual_seed(0)
config = GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
schedule = get_cosine_schedule_with_warmup(optimizer, 8 * accelerator.num_processes, STEPS * accelerator.num_processes)
batches = torch.utils.data.DataLoader(windows, batch_size=BATCH, shuffle=True, drop_last=True)
model, optimizer, schedule, batches = accelerator.prepare(model, optimizer, schedule, batches)

step = 0
while step < STEPS:
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        step += 1
        if step % 10 == 0:
            accelerator.print(f"step {step}: loss {loss.item():.3f}", flush=True)
        if step == STEPS:
            break
