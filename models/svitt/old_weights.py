"""Weights as earlier versions of this library wrote them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter


class AsVector(ConversionOps):
    """A scalar becomes a vector of one element, which stays one when it is written again."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: Any, target_patterns: Any, **_: Any
    ) -> dict[str, Any]:
        """Reshape every tensor: one, or a list of them, for each name."""
        return {name: _vectors(value) for name, value in input_dict.items()}

    @property
    def reverse_op(self) -> ConversionOps:
        """What `save_pretrained` applies."""
        return self


def register() -> None:
    """Let `from_pretrained` read a temperature that is a scalar."""
    converter = WeightConverter("temperature", "temperature", operations=[AsVector()])
    register_checkpoint_conversion_mapping("svitt", [converter], overwrite=True)


def _vectors(value: Tensor | list[Tensor]) -> Any:
    return [x.reshape(-1) for x in value] if isinstance(value, list) else value.reshape(-1)
