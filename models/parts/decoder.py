"""The answer decoder: BERT's layers, causal over the answer, that attend over question states.

Source: ALBEF (NeurIPS 2021), section 4.4; SViTT's has as many layers as its fusion encoder.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from svitt_ops.models.parts.configuration import TwoTowersConfig
from svitt_ops.models.parts.layers import FeedForward
from svitt_ops.models.parts.text import TextEmbeddings
from svitt_ops.nn import CrossAttention, merge_heads, split_heads


class DecoderLayer(GradientCheckpointingLayer):
    """A post-norm layer: causal attention, attention over the question, and feed-forward.

    Its parts have the names of a fusion layer's, whose weights it starts from.
    """

    def __init__(self, config: TwoTowersConfig) -> None:
        super().__init__()
        dim, heads = config.text_hidden_size, config.text_num_attention_heads
        eps = config.text_layer_norm_eps
        self.attention = CrossAttention(dim, heads)
        self.attention_norm = nn.LayerNorm(dim, eps)
        self.cross_attention = CrossAttention(dim, heads)
        self.cross_norm = nn.LayerNorm(dim, eps)
        self.mlp = FeedForward(dim, config.text_intermediate_size)
        self.mlp_norm = nn.LayerNorm(dim, eps)
        self.dropout = nn.Dropout(config.text_dropout)

    def forward(self, states: Tensor, question: Tensor, ignored: Tensor) -> Tensor:
        """Decode answers.

        Args:
            states: ``(batch * n, tokens, dim)``, the n answers to a question together.
            question: ``(batch, question tokens, dim)``.
            ignored: bool ``(batch, question tokens)``, True at padding.
        """
        states = self.attention_norm(states + self.dropout(self._attend_before(states)))
        # Answers to a question are more queries over the same keys.
        queries = states.reshape(question.shape[0], -1, states.shape[2])
        seen = self.cross_attention(queries, question, key_padding_mask=ignored)
        states = self.cross_norm(states + self.dropout(seen.reshape(states.shape)))
        return cast(Tensor, self.mlp_norm(states + self.dropout(self.mlp(states))))

    def _attend_before(self, states: Tensor) -> Tensor:
        """Attention of every token over those before it and itself, so over no padding."""
        parts = self.attention
        query, key, value = (
            split_heads(project(states), parts.num_heads)
            for project in (parts.query, parts.key, parts.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return cast(Tensor, parts.out(merge_heads(attended)))


class AnswerDecoder(nn.Module):
    """Embeddings of the answer's tokens, and layers over them and the question.

    Padding stands at the end of an answer, where no other token attends it.
    """

    def __init__(self, config: TwoTowersConfig) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))

    def forward(self, answer_ids: Tensor, question: Tensor, ignored: Tensor) -> Tensor:
        """States ``(batch * n, tokens, dim)`` of answers, each from the tokens up to its own.

        Args:
            answer_ids: ``(batch * n, tokens)``, the n answers to a question together.
            question: ``(batch, question tokens, dim)``.
            ignored: bool ``(batch, question tokens)``, True at padding.
        """
        states = self.embeddings(answer_ids)
        for layer in self.layers:
            states = layer(states, question, ignored)
        return cast(Tensor, states)
