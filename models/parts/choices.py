"""Choosing among texts: the match head of a retrieval model scores every option."""

from __future__ import annotations

from torch import Tensor

from svitt_ops.models.parts.clips import Merge, join_clips, merge_clips
from svitt_ops.models.parts.outputs import MultipleChoiceOutput
from svitt_ops.models.parts.pairs import MatchesPairs


class ChoosesTexts(MatchesPairs):
    """The retrieval model with `choose`; it is trained as that is, on pairs."""

    def choose(
        self,
        video_states: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        merge: Merge = "logsumexp",
    ) -> MultipleChoiceOutput:
        """The option that matches its video best.

        Args:
            video_states: ``(batch, 1 + n, hidden_size)`` of `encode_video`, or
                ``(batch, clips, 1 + n, hidden_size)`` for several clips of each video.
            input_ids: ``(batch, options, tokens)``.
            attention_mask: ``(batch, options, tokens)``, 0 at padding.
            merge: how several clips become one score, by their match scores or "concat".
        """
        if input_ids.dim() != 3 or attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"{type(self).__name__}: input_ids and attention_mask must have one shape (batch, "
                f"options, tokens), got {tuple(input_ids.shape)}, {tuple(attention_mask.shape)}"
            )
        clips = video_states if video_states.dim() == 4 else video_states[:, None]
        clips = join_clips(clips, merge)
        options, count = input_ids.shape[1], clips.shape[1]
        mask = attention_mask.flatten(0, 1)
        text = self.encode_text(input_ids.flatten(0, 1), mask).states
        found = self.match_scores(
            text.repeat_interleave(count, 0),
            mask.repeat_interleave(count, 0),
            clips[:, None].expand(-1, options, -1, -1, -1).flatten(0, 2),
        )
        scores = merge_clips(found.view(-1, options, count), merge, 2)
        return MultipleChoiceOutput(choices=scores.argmax(1), scores=scores)
