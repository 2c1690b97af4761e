"""The end of a run: a sample, the picture of the losses, and how to go on."""

from pathlib import Path

import deepspeed.comm as dist

from celo2_pretrain.common.errors import one_line
from celo2_pretrain.config import Config
from celo2_pretrain.data.mixture import Mixture
from celo2_pretrain.data.tokenizer import load_tokenizer
from celo2_pretrain.model.sample import sample
from celo2_pretrain.train.record.metrics import Metrics
from celo2_pretrain.train.record.plot import plot_loss
from celo2_pretrain.train.start.resume_command import resume_command


def finish(engine, config: Config, mixture: Mixture, metrics: Metrics) -> None:
    """A sample, the picture of the losses, and how to go on. The run is saved: what fails here is told and no more."""

    def sampled() -> None:
        index, tokenizer = mixture.index, load_tokenizer(mixture.paths[0])
        ids = tokenizer.encode([config.eval.prompt])[0]
        new = sample(
            engine.module,
            ids,
            config.eval.sample_tokens,
            context=config.model.context,
            eos_id=index["eos_id"],
            vocab_size=index["vocab_size"],
            seed=config.train.seed,
        )
        text = tokenizer.decode(ids + new)
        metrics.print_line("a sample of the model's text:\n" + "\n".join(f"    | {line}" for line in text.splitlines()))

    def drawn() -> None:
        picture = Path(config.run_dir, "loss.png")
        plot_loss(config.run_dir, str(picture))
        metrics.print_line(f"loss curve: {picture}")

    for what, work, wanted in (("sample", sampled, config.eval.prompt), ("loss curve", drawn, metrics.active)):
        try:
            if wanted:
                work()
        except Exception as error:
            if work is sampled and config.train.zero_stage == 3 and dist.get_world_size() > 1:
                raise  # the ranks gather the weights together: the others wait for this one
            metrics.print_line(f"warning: no {what}: {one_line(error)}")
    if metrics.active:
        metrics.print_line(f"to train further: {resume_command(config, 2 * config.train.max_steps)}")
