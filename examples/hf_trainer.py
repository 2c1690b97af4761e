"""Hugging Face's Trainer with DeepSpeed, ZeRO-2: a small GPT-2 on the bytes of the installed torch's optimizers.

deepspeed examples/hf_trainer.py        on all GPUs of the machine
DS_ACCELERATOR=cpu deepspeed --num_gpus 1 examples/hf_trainer.py    without a GPU (Accelerate has one process there)
"""

from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

STEPS, BATCH, LENGTH = 80, 8, 64
DEEPSPEED = {  # "auto": from the arguments below
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto", "torch_adam": True}},
}

text = b"".join(path.read_bytes() for path in sorted(Path(torch.__file__).parent.glob("optim/*.py")))
windows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().unfold(0, LENGTH, LENGTH)  # (windows, LENGTH)

arguments = TrainingArguments(
    output_dir="runs/hf_trainer",
    deepspeed=DEEPSPEED,
    max_steps=STEPS,
    per_device_train_batch_size=BATCH,
    learning_rate=3e-3,
    weight_decay=0.1,
    lr_scheduler_type="cosine",
    warmup_steps=8,
    logging_steps=10,
    save_strategy="no",
    report_to="none",
    seed=0,
)
torch.manual_seed(0)
config = GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config)
trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": w, "labels": w} for w in windows])
trainer.train()
