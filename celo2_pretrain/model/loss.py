"""The language-model loss, and its mean over the validation windows."""

import deepspeed.comm as dist
import torch
import torch.nn.functional as F
from tqdm import tqdm

from celo2_pretrain.data.loader import ValLoader


def sequence_losses(model, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of each window's next tokens, float32 (B,). `windows` is int64 (B, context + 1)."""
    logits = model(input_ids=windows[:, :-1]).logits  # (B, T, V)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten(), reduction="none")
    return losses.view(len(windows), -1).mean(1)


def training_loss(model, windows: torch.Tensor, z_loss: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(what is differentiated, mean cross-entropy in nats), both () float32. `windows` is int64 (B, context + 1).

    The first has `z_loss` × mean(log Z²) added, Z the softmax's normaliser (PaLM, arXiv 2204.02311, section 5): it keeps
    the logits from drifting.
    """
    if not z_loss:
        loss = sequence_losses(model, windows).mean()
        return loss, loss
    logits, targets = model(input_ids=windows[:, :-1]).logits.flatten(0, 1), windows[:, 1:].flatten()
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    # −log p = log Z − logit of the target, so that no second pass over the logits is needed.
    log_z = losses + logits.gather(1, targets[:, None])[:, 0].float()
    cross_entropy = losses.mean()
    return cross_entropy + z_loss * log_z.square().mean(), cross_entropy


@torch.no_grad()
def validation_loss(
    model, loader: ValLoader, device: torch.device, stopping=lambda: False, show: bool = False
) -> float | None:
    """Mean loss per token in nats over all ranks' windows. Every rank of the loader's world must call it.

    `stopping` is called before each batch; None is returned when it says yes (on every rank then). `show` draws a bar on
    a terminal, where it takes longer than two seconds.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=device)  # sum of losses, number of windows
    for windows, weights in tqdm(loader, "validation", len(loader), leave=False, delay=2, disable=None if show else True):
        if stopping():
            model.train(was_training)
            return None
        losses = sequence_losses(model, windows.to(device)).double()
        weights = weights.to(device).double()
        total += torch.stack([(losses * weights).sum(), weights.sum()])
    if loader.world_size > 1:
        dist.all_reduce(total)
    model.train(was_training)
    return float(total[0] / total[1])
