"""FLOPs of a model for each token that it is trained on."""

from torch import nn


def flops_per_token(model: nn.Module, context: int) -> float:
    """6 a parameter that is multiplied with, and 12 × layers × width × context of attention, its causal half not deducted
    (PaLM, arXiv 2204.02311, appendix B)."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * head_dim * context
    return 6.0 * matmul_parameters(model) + attention


def matmul_parameters(model: nn.Module) -> int:
    """Elements of the weights that activations are multiplied with: all but embeddings that are only looked up."""
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings()
    if head is not None:
        looked_up.discard(id(head.weight))
    return sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in looked_up)
