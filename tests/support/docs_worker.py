"""Runs a page's code blocks as they are printed, in reading order, with what the page takes for given at hand.

Arguments: the page. It works in the current folder, which must be empty. At the end the optimizer of every page that makes one
has taken a step inside DeepSpeed.
"""

import json
import logging
import os
import re
import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from celo2_pretrain.train.start.ranks import free_port

DEEPSPEED = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0, "zero_optimization": {"stage": 2}}
ADAMW = {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True}}


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, body) of each fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.S | re.M)


def new_side(diff: str) -> str:
    """What a diff's lines are after it."""
    return "".join(line[1:] + "\n" for line in diff.splitlines() if not line.startswith("-"))


def tiny_model(*_) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    )


class Downloads:
    """In place of the hub's classes: whatever is asked for is the tiny model."""

    from_pretrained = staticmethod(tiny_model)


def engine_of(model, optimizer=None, config=DEEPSPEED):
    import deepspeed

    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def step(engine) -> None:
    ids = torch.arange(16).view(2, 8)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()


def trains_with_celo2(engine) -> None:
    from celo2_pretrain import Celo2

    assert type(engine.optimizer.optimizer) is Celo2, type(engine.optimizer.optimizer)
    before = [param.detach().clone() for param in engine.module.parameters()]
    step(engine)
    assert not any(torch.equal(a, b) for a, b in zip(before, engine.module.parameters()))


def readme(text: str) -> dict:
    """The page changes a script that reads ds_config.json, and that file."""
    [config] = [new_side(body) for language, body in blocks(text) if language == "diff" and '"optimizer"' in body]
    Path("ds_config.json").write_text(json.dumps(DEEPSPEED | json.loads("{" + config + "}")))
    import deepspeed

    return {"deepspeed": deepspeed, "AutoModelForCausalLM": Downloads}


def checkpoints(text: str) -> dict:
    """A DeepSpeed engine with Celo2, one with AdamW, and what each has saved."""
    from celo2_pretrain import Celo2, param_groups, save_state

    adamw_engine = engine_of(tiny_model(), config=DEEPSPEED | {"optimizer": ADAMW})
    step(adamw_engine)
    adamw_engine.save_checkpoint("checkpoints")
    model = tiny_model()
    engine = engine_of(model, Celo2(param_groups(model)))
    step(engine)
    save_state(engine, "states/step_2000")
    return {"engine": engine, "adamw_engine": adamw_engine, "config": DEEPSPEED}


def evaluation(text: str) -> dict:
    """An exported model."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tiny_model().save_pretrained("exported")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))).save_pretrained("exported")
    return {}


def after_readme(names: dict) -> None:
    trains_with_celo2(names["engine"])
    trains_with_celo2(engine_of(names["model"], names["optimizer"]))  # the page's client optimizer


def after_swap(names: dict) -> None:
    trains_with_celo2(engine_of(tiny_model(), config=names["config"]))
    assert len(names["schedule"].get_last_lr()) == len(names["optimizer"].param_groups)


BEFORE = {"README.md": readme, "checkpoints.md": checkpoints, "evaluation.md": evaluation}
AFTER = {"README.md": after_readme, "swap.md": after_swap, "checkpoints.md": lambda names: trains_with_celo2(names["engine"])}


def run(text: str, names: dict) -> None:
    """Execute the blocks of Python, and what diffs of Python make, one after the other."""
    for language, body in blocks(text):
        code = body if language == "python" else new_side(body) if language == "diff" and '"optimizer"' not in body else ""
        exec(compile(code, repr(code.strip()[:60]), "exec"), names)


def main(page: Path) -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    text = page.read_text(encoding="utf-8")
    names = {"__name__": "__main__", "model": tiny_model(), "config": dict(DEEPSPEED)}
    names |= BEFORE.get(page.name, lambda _: {})(text)
    run(text, names)
    AFTER.get(page.name, lambda _: None)(names)
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort the interpreter's exit


if __name__ == "__main__":
    main(Path(sys.argv[1]))
