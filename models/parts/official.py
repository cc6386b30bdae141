"""What the authors' released code does where the paper means something else.

`compat="svitt-official"` reproduces numbers of released checkpoints:
- the last block is filled up with zero keys that are not masked: their logit is the bias of
  token -> [CLS], their value 0, so they take weight from the others (`PaddedSelfAttention`);
- random blocks are drawn anew outside training too (`eval_pattern_seed` is not read);
- fusion layers never prune;
- ranking of answers counts their first token twice, and where clips are merged it takes a softmax
  of merged probabilities (`rank_answers`);
- re-ranking in retrieval goes by the match head's logit of "yes", not by its distance from "no";
- negatives of the contrastive loss are those of the own process;
- `expand_frames` takes the nearest offset rounded down;
- Morton and Hilbert orders are those of `token_order(..., compat="svitt-official")`.
Windows of several local blocks mix up two neighbours' keys there, which no published model uses and
the configuration refuses.

`compat="singularity-official"` is what of this concerns a dense model of single frames: the ranking
of answers, re-ranking, and the negatives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import svitt_ops as so
from svitt_ops.nn import BlockSparseSelfAttention


def padded(num_tokens: int, block_size: int) -> int:
    """Tokens of whole blocks."""
    return -(-num_tokens // block_size) * block_size


class PaddedSelfAttention(BlockSparseSelfAttention):
    """Attention with zero keys after the tokens that are attended like tokens.

    Only the patches' rows see the padding. [CLS] attends the true tokens, so its row, and with it
    the saliency, comes from a second call. The layout is over the padded tokens.
    """

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, layout: so.BlockLayout, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        assert options["key_lengths"] is None
        table, codes = options["bias_table"], options["position_codes"]
        count = query.shape[2] - 1
        missing = layout.num_tokens - count
        # Patches see nothing but [CLS] here; only the row of [CLS] is used.
        globals_only = so.BlockLayout.local_random(
            count, block_size=layout.block_size, num_local=0, num_random=0, device=query.device
        )
        of_cls, saliency = super()._attend(query, key, value, globals_only, **options)
        if missing:
            table, codes = _with_padding_code(table, codes, missing)
            query, key, value = (F.pad(x, (0, 0, 0, missing)) for x in (query, key, value))
        out, _ = super()._attend(query, key, value, layout, bias_table=table, position_codes=codes)
        return torch.cat([of_cls[:, :, :1], out[:, :, 1 : count + 1]], 2), saliency


def _with_padding_code(table: Tensor, codes: Tensor, missing: int) -> tuple[Tensor, Tensor]:
    """A wider table, and codes for the padding that lead from every token to token -> [CLS].

    Tokens' codes are 0 to c, so their offsets are -c to c. The padding's code is -1 - c, so a
    token's offset to it is c + 1 to 2 c + 1, where every row of the wider table is that bias.
    """
    reach = (table.shape[0] - 4) // 2
    constant = table[-2].expand(reach + 1, -1)
    wide = torch.cat([constant, table[:-3], constant, table[-3:]])
    codes = F.pad(codes, (0, missing), value=-1 - reach)
    return wide, codes
