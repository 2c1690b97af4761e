"""The language-model loss, and its mean over the validation windows."""
import deepspeed.comm as dist
import torch
import torch.nn.functional as F

from celo2_pretrain.data.loader import ValLoader


def sequence_losses(model, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of each window's next tokens, float32 (B,). `windows` is int64 (B, context + 1)."""
    logits = model(input_ids=windows[:, :-1]).logits  # (B, T, V)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten(), reduction="none")
    return losses.view(len(windows), -1).mean(1)


@torch.no_grad()
def validation_loss(model, loader: ValLoader, device: torch.device) -> float:
    """Mean loss per token in nats over all ranks' windows. Every rank of the loader's world must call it."""
    was_training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=device)  # sum of losses, number of windows
    for windows, weights in loader:
        losses = sequence_losses(model, windows.to(device)).double()
        weights = weights.to(device).double()
        total += torch.stack([(losses * weights).sum(), weights.sum()])
    if loader.world_size > 1:
        dist.all_reduce(total)
    model.train(was_training)
    return float(total[0] / total[1])
