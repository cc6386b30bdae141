"""Hugging Face models on the ops: dense by a name, sparse by a call.

Importing this module registers an attention function and its mask function, so that

    AutoModel.from_pretrained(..., attn_implementation="svitt_ops")

runs dense attention of bidirectional models on the kernels, padding masks included. `sparsify`
makes a vision model sparse in place. What the ops cannot express is refused by name.
"""

from transformers import AttentionInterface, AttentionMaskInterface

from svitt_ops.integrations.transformers.attention import NAME, attention, padding_mask, saliency
from svitt_ops.integrations.transformers.sparsity import desparsify, layouts, sparsify

# One without the other would drop masks silently.
AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, padding_mask)

__all__ = ["attention", "desparsify", "layouts", "padding_mask", "saliency", "sparsify"]
