"""Documents packed into one window that don't see each other: positions and attention begin anew at each of them."""

import torch

from celo2_pretrain.common.errors import UserError


def document_inputs(ids: torch.Tensor, eos_id: int) -> dict[str, torch.Tensor]:
    """What a model needs besides `ids`, int64 (B, T), to attend within documents only.

    A document begins at the end-of-text token before it, which is what its first token is predicted from, and what text
    is generated from without a prompt. So no prediction crosses a boundary, and the loss counts every token as before.

    Returns: position_ids, int64 (B, T), counted from each document's beginning; attention_mask, bool (B, 1, T, T), True
    where the query (row) sees the key.
    """
    positions = torch.arange(ids.shape[1], device=ids.device)
    first = torch.where(ids == eos_id, positions, 0).cummax(1).values  # (B, T): where the token's document begins
    causal = positions[:, None] >= positions  # (T, T)
    return {"position_ids": positions - first, "attention_mask": (causal & (first[:, :, None] == first[:, None, :]))[:, None]}


def mask_documents(model: torch.nn.Module, eos_id: int) -> None:
    """Have every forward pass of a transformers model, training or not, keep documents apart.

    Raises UserError for models whose own attention mask is not the causal one.
    """
    if getattr(model.config, "sliding_window", None):
        raise UserError(f"data.mask_documents=true does not work with the sliding window of {model.config.model_type} models")

    def add_inputs(module, arguments: tuple, inputs: dict) -> tuple[tuple, dict]:
        added = document_inputs(inputs["input_ids"], eos_id)
        if module.config._attn_implementation == "eager":  # it adds the mask to the scores
            dtype = next(module.parameters()).dtype
            allowed = added["attention_mask"]
            added["attention_mask"] = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
                ~allowed, torch.finfo(dtype).min
            )
        return arguments, inputs | added

    model.register_forward_pre_hook(add_inputs, with_kwargs=True)
