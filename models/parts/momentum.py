"""Momentum twins: a slow copy of a model that teaches it, and queues of what the copy embedded.

Source: ALBEF (NeurIPS 2021), sections 3.2 and 3.3; MoCo (CVPR 2020) for both ideas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from svitt_ops.models.parts.losses import IGNORED
from svitt_ops.models.parts.two_towers import TwoTowers

TRAINING_ONLY = ("teacher.", "queue.", "steps")
"""Beginnings of the names of tensors that only training needs."""


class FeatureQueue(nn.Module):
    """The last embeddings that a teacher made of pictures and texts, and the ids of their pairs.

    Fresh queues hold random vectors of length 1, as the authors' do, whose ids are no pair's.

    Args:
        length: rows of each queue; any batch fits, of which no more than so many rows stay.
        dim: width of the embeddings.
    """

    video: Tensor
    text: Tensor
    ids: Tensor
    next: Tensor

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        for name in ("video", "text"):
            self.register_buffer(name, torch.zeros(length, dim))
        self.register_buffer("ids", torch.zeros(length, dtype=torch.int64))
        self.register_buffer("next", torch.zeros(1, dtype=torch.int64))

    @torch.no_grad()
    def reset(self) -> None:
        """Fill the queues anew."""
        for queue in (self.video, self.text):
            nn.init.normal_(queue)
            queue.copy_(F.normalize(queue, dim=1))
        self.ids.fill_(IGNORED)
        self.next.zero_()

    @torch.no_grad()
    def push(self, video: Tensor, text: Tensor, ids: Tensor | None = None) -> None:
        """Put the embeddings of all processes' batches in the place of the oldest ones.

        Args:
            video: ``(batch, dim)``, alike on all processes in its shape.
            text: like ``video``.
            ids: int64 ``(batch,)``, of the pairs; without them they are no pair's.
        """
        if ids is None:
            ids = torch.full(video.shape[:1], IGNORED, device=video.device)
        length = len(self.ids)
        # Of more rows than the queue has, each place takes the last one that falls on it.
        new = [gather_rows(x)[-length:] for x in (video, text, ids)]
        total = len(video) * (dist.get_world_size() if _shared() else 1)
        first = self.next + (total - len(new[0]))
        places = (first + torch.arange(len(new[0]), device=first.device)) % length
        for queue, rows in zip((self.video, self.text, self.ids), new, strict=True):
            queue.index_copy_(0, places, rows.to(queue.dtype))
        self.next.copy_((self.next + total) % length)

    def extra_repr(self) -> str:
        return f"length={len(self.ids)}, dim={self.video.shape[1]}"


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, in their order; alike in number on each, and without gradient."""
    if not _shared():
        return rows.detach()
    rows = rows.detach().contiguous()
    found = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(found, rows)
    return torch.cat(found)


def other_rows(rows: Tensor) -> Tensor:
    """The same without this process's own."""
    found, own = gather_rows(rows), dist.get_rank() if _shared() else 0
    return torch.cat([found[: own * len(rows)], found[(own + 1) * len(rows) :]])


def _shared() -> bool:
    return dist.is_available() and dist.is_initialized()


class HasTeacher(TwoTowers):
    """A model and its momentum twin, which is the mean of its weights over its last steps.

    The twin has no gradient, so no optimizer has it, and `save_pretrained` leaves it out, with the
    queues: weights for use hold the model once. `training_state` is what a run goes on from
    besides. From weights without a twin it starts as a copy.
    """

    teacher_class: ClassVar[type[TwoTowers]]
    """What the twin is: the model without what is its own, such as the match head."""
    training_only = TRAINING_ONLY
    steps: Tensor

    def build(self, config: Any) -> None:
        super().build(config)
        self.teacher: Any = None
        self._steps = 0
        if config.momentum is not None:
            self.teacher = self.teacher_class(config).requires_grad_(False)
            self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))

    def post_init(self) -> None:
        super().post_init()
        self.start_missing([name for name in self.state_dict() if name.startswith("teacher.")])

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FeatureQueue):
            module.reset()
        elif module is self and self.teacher is not None:
            nn.init.zeros_(self.steps)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        steps = state_dict.get(f"{prefix}steps")
        if steps is not None and not steps.is_meta:
            self._steps = int(steps)  # read once: `alpha` is a number of the host

    @torch.no_grad()
    def start_missing(self, missing: Sequence[str]) -> list[str]:
        """Start a twin's tensors without weights as copies; else as the model's own class does."""
        left = super().start_missing([x for x in missing if not x.startswith(self.training_only)])
        tensors = self.state_dict()
        own = [x.removeprefix("teacher.") for x in missing if x.startswith("teacher.")]
        for name in self.teacher.start_missing(own) if own else ():
            tensors[f"teacher.{name}"].copy_(tensors[name])
        return left

    @property
    def alpha(self) -> float:
        """The teacher's share in the targets of the next step."""
        config = self.config
        if self.teacher is None:
            return 0.0
        done, warmup = max(self._steps - 1, 0), config.alpha_warmup_steps
        if warmup is None:
            raise ValueError(
                f"{type(self).__name__}: alpha_warmup_steps must be a number to train with, which"
                " fit_epoch makes it, got None"
            )
        return float(config.alpha) * min(1.0, done / warmup if warmup else 1.0)

    def fit_epoch(self, steps: int) -> None:
        """Let the twin's share grow for an epoch, if the configuration has no number of steps."""
        super().fit_epoch(steps)
        if self.config.alpha_warmup_steps is None:
            self.config.alpha_warmup_steps = steps

    def before_step(self) -> None:
        """Let the twin follow the weights, and count the step that is about to be."""
        super().before_step()
        if self.teacher is not None:
            self.update_teacher()
            self.steps += 1
            self._steps += 1

    @torch.no_grad()
    def update_teacher(self) -> None:
        """``m teacher + (1 - m) weights``, with the configuration's momentum m."""
        own = dict(self.named_parameters())
        for name, parameter in self.teacher.named_parameters():
            parameter.lerp_(own[name].to(parameter.dtype), 1 - self.config.momentum)

    def share_of_teacher(self, alpha: float | None) -> float:
        """The share that was asked for, or the one of this step; refused without a teacher."""
        found = self.alpha if alpha is None else alpha
        if not 0 <= found <= 1:
            raise ValueError(f"{type(self).__name__}: alpha must be in [0, 1], got {found}")
        if found and self.teacher is None:
            raise ValueError(
                f"{type(self).__name__}: alpha must be 0 without a teacher (momentum=None), "
                f"got {found}"
            )
        return found
