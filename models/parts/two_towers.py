"""What models of two towers share: the towers, projections into one space, reading of folders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

import svitt_ops as so
from svitt_ops.models.parts.configuration import TwoTowersConfig
from svitt_ops.models.parts.heads import MaskedTokenHead
from svitt_ops.models.parts.layers import Residual
from svitt_ops.models.parts.loading import load_folder
from svitt_ops.models.parts.text import TextTower
from svitt_ops.models.parts.video import VideoTower
from svitt_ops.nn import RelativePositionBias3D


class TwoTowers(PreTrainedModel):
    """What every model here has: a video tower, a text tower, and projections into one space."""

    projects: ClassVar[bool] = True
    """Whether clips and texts have embeddings; False: there are no projections."""

    training_only: ClassVar[tuple[str, ...]] = ()
    """Beginnings of the names of tensors that only training needs: `save_pretrained` leaves them
    out, `training_state` holds them."""

    derived: ClassVar[tuple[str, ...]] = ()
    """Beginnings of the names of tensors that `start_missing` makes of trained ones, so that
    weights without them lack nothing."""

    frozen: ClassVar[tuple[str, ...]] = ()
    """Beginnings of the names of parameters that do not learn."""

    video_class: ClassVar[type[VideoTower]] = VideoTower
    config_class = TwoTowersConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["VideoLayer", "TextLayer", "DecoderLayer"]  # noqa: RUF012 (as the base's)
    config: TwoTowersConfig

    def __init__(self, config: TwoTowersConfig) -> None:
        config.check()
        super().__init__(config)
        self.build(config)
        self.post_init()
        self.freeze()
        self._keys_to_ignore_on_save = set(self.training_state())

    def freeze(self) -> None:
        """Take what does not learn out of training; to be called when weights were loaded."""
        for name, parameter in self.named_parameters():
            if name.startswith((*self.training_only, *self.frozen)):
                parameter.requires_grad_(False)

    def training_state(self) -> dict[str, Tensor]:
        """What training goes on from, besides the weights: tensors by name, none for most models.

        They go back with ``load_state_dict(..., strict=False)``.
        """
        state = self.state_dict()
        return {name: x for name, x in state.items() if name.startswith(self.training_only)}

    def build(self, config: Any) -> None:
        """Make the parts, whose weights are drawn once all are made; a system adds its own."""
        self.video = self.video_class(config)
        self.text = TextTower(config)
        if self.projects:
            self.video_projection = self.build_projection(config, config.hidden_size)
            self.text_projection = self.build_projection(config, config.text_hidden_size)

    def build_projection(self, config: Any, dim: int) -> nn.Module:
        """From vectors of a tower of this width to embeddings."""
        return nn.Linear(dim, config.projection_dim)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """As transformers', where weights of another resolution or of other frames are resized.

        So ``from_pretrained(folder, image_size=384, num_frames=8)`` works from any of them; see
        `change_image_size` and `expand_frames`.

        Raises:
            ValueError: another field of the configuration is not that of the weights, or the
                weights are damaged, not finite, or of another model.
        """
        load = super().from_pretrained
        if pretrained_model_name_or_path is None or args:
            return load(pretrained_model_name_or_path, *args, config=config, **kwargs)
        return load_folder(load, cls, pretrained_model_name_or_path, config, **kwargs)

    def fit_frames(self, num_frames: int) -> None:
        """Resize what depends on the frames of a clip, besides the video tower's positions."""

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings of the text's tokens."""
        return self.text.embeddings.word

    def start_missing(self, missing: Sequence[str]) -> list[str]:
        """Give what weights had nothing for its start from other parts, where the papers say so.

        Args:
            missing: names of the model's tensors that no weights were found for.

        Returns:
            Those of them that keep their random or initial values.
        """
        return list(missing)

    def pool(self, tokens: Tensor) -> Tensor:
        """The vector of each clip."""
        return tokens[:, 0] if self.config.video_pooling == "cls" else tokens[:, 1:].mean(1)

    @property
    def leaves_parameters_unused(self) -> bool:
        """Whether a loss in training may depend on some parameters only."""
        return False

    def fit_epoch(self, steps: int) -> None:
        """To be called before training, with the steps of an epoch."""

    def before_step(self) -> None:
        """To be called before each step of training, once for all batches that it accumulates."""

    def group(self) -> dist.ProcessGroup | None:
        """The processes that negatives come from: all that share a batch while training."""
        return None if self.config.official else self.sharing()

    def sharing(self) -> dist.ProcessGroup | None:
        """The processes that share a batch; None outside of training, and for a single one."""
        shared = dist.is_available() and dist.is_initialized() and self.training
        return dist.group.WORLD if shared else None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # Guarded by transformers: what was loaded from a checkpoint stays.
        if isinstance(module, RelativePositionBias3D):
            if not getattr(module.table, "_is_hf_initialized", False):
                module.reset_parameters()
            module.codes = so.position_codes(module.grid, device=module.codes.device)
        elif isinstance(module, Residual) and module.scale is not None:
            nn.init.constant_(module.scale, module.initial_scale)
        elif isinstance(module, VideoTower):
            module.reset_positions(module.cls_token.device)
            nn.init.zeros_(module.cls_token)
            std = self.config.initializer_range
            for positions in (module.cls_position, module.patch_positions, module.mask_token):
                if positions is not None:
                    nn.init.normal_(positions, std=std)
        elif isinstance(module, MaskedTokenHead):
            nn.init.zeros_(module.bias)
