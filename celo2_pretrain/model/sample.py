"""Continue a text with a model: plain temperature and top-k sampling, the same on every rank."""

import torch


@torch.no_grad()
def sample(
    model,
    ids: list[int],
    tokens: int,
    *,
    context: int,
    eos_id: int,
    vocab_size: int,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> list[int]:
    """The `tokens` ids that follow `ids`.

    Runs the whole window for each token instead of keeping a key/value cache: under ZeRO-3 each forward pass is a
    collective, so that every rank must do the same ones. `vocab_size` keeps a padded embedding's unused rows out.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    out = list(ids) or [eos_id]
    was_training = model.training
    model.eval()
    for _ in range(tokens):
        window = torch.tensor([out[-context:]], device=device)  # (1, T)
        logits = model(input_ids=window).logits[0, -1, :vocab_size].float().cpu()
        if temperature == 0:
            out.append(int(logits.argmax()))
            continue
        best = torch.topk(logits, min(top_k, vocab_size))
        choice = torch.multinomial(torch.softmax(best.values / temperature, -1), 1, generator=generator)
        out.append(int(best.indices[choice]))
    model.train(was_training)
    return out[len(ids) :] if ids else out[1:]
