"""A trained model as an encoder of texts, pictures and videos for sentence-transformers.

    from sentence_transformers import SentenceTransformer
    from svitt_ops.integrations.sentence_transformers import VideoTextEncoder

    encoder = SentenceTransformer(modules=[VideoTextEncoder.from_pretrained("runs/small/final")])
    similar = encoder.similarity(encoder.encode(["clip.mp4"]), encoder.encode(["a dog jumps"]))

A text that names a file, by how it ends, is a path, as that library has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentence_transformers.base.modality import infer_modality
from sentence_transformers.base.modules.input_module import InputModule
from torch import Tensor
from transformers import AutoConfig, AutoProcessor

from svitt_ops.models.systems import load_system, system_of

_NAME = "VideoTextEncoder"


class VideoTextEncoder(InputModule):
    """The first and only module of a `SentenceTransformer`: its embeddings have length 1.

    Args:
        model: a model of `svitt_ops.models` with `encode_video` and `encode_text`.
        processor: that was saved beside it.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__()
        if not hasattr(model, "encode_text") or not hasattr(model, "encode_video"):
            raise ValueError(
                f"{_NAME}: model must embed videos and texts, as those for pretraining and"
                f" retrieval do, got {type(model).__name__}"
            )
        self.model = model
        self.processor = processor
        self.tokenizer = processor.tokenizer

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> VideoTextEncoder:
        """From the folder that a run leaves.

        Raises:
            ValueError: it holds no model of `svitt_ops.models`, or one that embeds nothing.
        """
        config = AutoConfig.from_pretrained(folder)
        name = system_of(config.model_type)
        if name is None:
            raise ValueError(f"{_NAME}: folder must hold a model of svitt_ops.models, got {config}")
        models = load_system(name).models
        (own, *_) = getattr(config, "architectures", None) or [""]
        kinds = {kind.__name__: kind for kind in models.values()}
        kind: Any = kinds.get(own, models["pretraining"])
        return cls(kind.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder))

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        init_defaults: dict[str, Any] | None = None,
        **_: Any,
    ) -> VideoTextEncoder:
        """What `SentenceTransformer(folder)` calls."""
        folder = cls.load_dir_path(
            model_name_or_path, subfolder, token, cache_folder, revision, local_files_only
        )
        if folder is None:
            raise ValueError(f"{_NAME}: must be saved in {model_name_or_path}, which has none")
        return cls.from_pretrained(folder)

    def save(self, output_path: str, *_: Any, **options: Any) -> None:
        """What `SentenceTransformer.save_pretrained` calls."""
        self.model.save_pretrained(output_path)
        self.processor.save_pretrained(output_path)

    @property
    def modalities(self) -> list[Any]:
        """What can be encoded."""
        return ["text", "image", "video"]

    def get_embedding_dimension(self) -> int:
        """Width of an embedding."""
        width: int = self.model.config.projection_dim
        return width

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, **_: Any
    ) -> dict[str, Tensor]:
        """Inputs of the model; the library has seen to it that all are of one modality.

        Raises:
            ValueError: a file cannot be read, or a picture or video not understood.
        """
        kind = infer_modality(inputs[0])
        values = [x[kind] if isinstance(x, dict) and kind in x else x for x in inputs]
        if kind == "text":
            return dict(self.processor(text=[(prompt or "") + text for text in values]))
        arrays = [x["array"] if isinstance(x, dict) else x for x in values]
        return dict(self.processor(**{f"{kind}s": arrays}))

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Add ``sentence_embedding``, fp32 ``(inputs, dim)``."""
        if "pixel_values" in features:
            found = self.model.encode_video(features["pixel_values"])
        else:
            found = self.model.encode_text(features["input_ids"], features["attention_mask"])
        return {**features, "sentence_embedding": found.embeds}
