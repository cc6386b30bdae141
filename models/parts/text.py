"""The text tower and the fusion layers: BERT's layers, the latter with attention over the video."""

from __future__ import annotations

from typing import Literal, cast

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

import svitt_ops as so
from svitt_ops.models.parts.configuration import TwoTowersConfig
from svitt_ops.models.parts.layers import FeedForward, eval_generator, random_scores
from svitt_ops.nn import CrossAttention


class TextLayer(GradientCheckpointingLayer):
    """A post-norm layer: attention over the text, maybe over the video, and feed-forward.

    Args:
        config: of the model.
        fuses: whether the layer attends over the video too.
        context_dim: width of what it attends over then; by default the video tower's.
        eps: of its norms; by default `config.text_layer_norm_eps`.
        intermediate_size: inside the feed-forward; by default `config.text_intermediate_size`.
    """

    def __init__(
        self,
        config: TwoTowersConfig,
        *,
        fuses: bool,
        context_dim: int | None = None,
        eps: float | None = None,
        intermediate_size: int | None = None,
    ) -> None:
        super().__init__()
        dim, heads = config.text_hidden_size, config.text_num_attention_heads
        eps = config.text_layer_norm_eps if eps is None else eps
        self.attention = CrossAttention(dim, heads)
        self.attention_norm = nn.LayerNorm(dim, eps)
        self.cross_attention: nn.Module | None = None
        if fuses:
            context_dim = config.hidden_size if context_dim is None else context_dim
            self.cross_attention = CrossAttention(dim, heads, context_dim=context_dim)
            self.cross_norm = nn.LayerNorm(dim, eps)
        self.mlp = FeedForward(dim, intermediate_size or config.text_intermediate_size)
        self.mlp_norm = nn.LayerNorm(dim, eps)
        self.dropout = nn.Dropout(config.text_dropout)

    def forward(
        self,
        states: Tensor,
        ignored: Tensor | None = None,
        video: Tensor | None = None,
        saliency: Literal["cls", "mean"] | None = None,
        video_ignored: Tensor | None = None,
        clips: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the states, and what `saliency` asks for, ``(batch, 1 + n)``.

        Args:
            states: ``(batch, tokens, dim)``.
            ignored: bool ``(batch, tokens)``, True at padding; by default there is none.
            video: ``(batch, 1 + n, hidden_size)``; without one, the layer attends over the text
                alone.
            saliency: which attention over the video to return.
            video_ignored: bool ``(batch, 1 + n)``, True where the video has padding.
            clips: int64 ``(batch,)``, the row of ``video`` of each text; by default its own.
        """
        attended = self.attention(states, states, key_padding_mask=ignored)
        states = self.attention_norm(states + self.dropout(attended))
        scores = None
        if self.cross_attention is not None and video is not None:
            found = self.cross_attention(
                states,
                video,
                context_rows=clips,
                key_padding_mask=video_ignored,
                return_saliency=saliency,
            )
            seen, scores = found if saliency else (found, None)
            states = self.cross_norm(states + self.dropout(seen))
        return self.mlp_norm(states + self.dropout(self.mlp(states))), scores


class TextEmbeddings(nn.Module):
    """Sum of what a token is and where it stands, normalised."""

    def __init__(self, config: TwoTowersConfig) -> None:
        super().__init__()
        dim = config.text_hidden_size
        self.word = nn.Embedding(config.vocab_size, dim, padding_idx=config.pad_token_id)
        self.position = nn.Embedding(config.max_position_embeddings, dim)
        types = config.type_vocab_size
        self.token_type = nn.Embedding(types, dim) if types else None
        self.norm = nn.LayerNorm(dim, config.text_layer_norm_eps)
        self.dropout = nn.Dropout(config.text_dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        length, longest = input_ids.shape[1], self.position.num_embeddings
        if length > longest:
            raise ValueError(
                f"TextTower: input_ids must have at most {longest} tokens, got {length}"
            )
        return self.place(self.word(input_ids))

    def place(self, vectors: Tensor) -> Tensor:
        """What becomes of vectors ``(batch, tokens, dim)`` that stand for tokens."""
        embedded = vectors + self.position.weight[: vectors.shape[1]]
        if self.token_type is not None:
            embedded = embedded + self.token_type.weight[0]
        out: Tensor = self.dropout(self.norm(embedded))
        return out


class TextTower(nn.Module):
    """Token embeddings and the layers below the fusion layers."""

    def __init__(self, config: TwoTowersConfig) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.layers = nn.ModuleList(
            TextLayer(config, fuses=False) for _ in range(config.fusion_layer)
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode texts; both arguments ``(batch, tokens)``, the mask 0 at padding."""
        check_mask(attention_mask, input_ids)
        states, ignored = self.embeddings(input_ids), attention_mask == 0
        for layer in self.layers:
            states, _ = layer(states, ignored)
        return cast(Tensor, states)


class FusionEncoder(nn.Module):
    """Layers in which the text attends over the clip, and the clip's tokens get fewer.

    Multimodal node sparsity: after the layers in `multimodal_prune_layers`, the patches that the
    text's [CLS] attends least leave; the next layer sees the others.
    """

    def __init__(self, config: TwoTowersConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(
            TextLayer(config, fuses=True) for _ in range(config.num_fusion_layers)
        )

    def forward(
        self,
        states: Tensor,
        attention_mask: Tensor,
        video: Tensor,
        indices: Tensor | None = None,
        clips: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Fuse texts ``(batch, tokens, dim)`` with clips ``(batch, 1 + n, hidden_size)``.

        With ``clips``, int64 ``(batch,)``, texts share clips, each the row of ``video`` that it
        says: what a layer makes of a clip it makes once.

        Returns:
            The states, and the numbers of the patches that are left: those of ``indices``, else
            places in ``video`` (None where nothing was pruned).
        """
        config, ignored = self.config, attention_mask == 0
        check_mask(attention_mask, states)
        if clips is not None and indices is not None:
            indices = indices.index_select(0, clips)
        generator = None if self.training else eval_generator(config)
        for number, layer in enumerate(self.layers):
            prunes = config.prunes_multimodally and number in config.multimodal_prune_layers
            by_saliency = prunes and config.multimodal_prune_by != "random"
            which = config.multimodal_prune_by if by_saliency else None
            states, scores = layer(states, ignored, video, which, None, clips)
            if not prunes:
                continue
            if clips is not None:  # from here on, every text has its own patches
                video, clips = video.index_select(0, clips), None
            if scores is None:
                scores = random_scores(video, generator)
            kept = so.prune_tokens(video, scores[:, 1:], keep_rate=config.multimodal_keep_rate)
            video = kept.tokens
            indices = kept.indices if indices is None else indices.gather(1, kept.indices)
        return states, indices


def check_mask(attention_mask: Tensor, like: Tensor) -> None:
    """A mask ``(batch, tokens)`` for what has these leading dimensions."""
    if attention_mask.shape != like.shape[:2]:
        raise ValueError(
            f"attention_mask must have shape {tuple(like.shape[:2])}, "
            f"got {tuple(attention_mask.shape)}"
        )
