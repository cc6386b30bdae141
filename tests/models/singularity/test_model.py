"""Singularity: single frames, layers over time, and the way from one stage to the next."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from svitt_ops.models import (
    SingularityConfig,
    SingularityForPreTraining,
    SingularityForQuestionAnswering,
    SingularityForRetrieval,
    SingularityModel,
    SViTTConfig,
    edge_count,
    expand_frames,
)

DENSE: dict[str, Any] = {
    "edge_sparsity": False,
    "keep_rate": 1.0,
    "prune_layers": [],
    "multimodal_keep_rate": 1.0,
    "multimodal_prune_layers": [],
    "text_hidden_size": 32,
    "text_num_attention_heads": 2,
}
Make = Callable[..., SingularityConfig]


@pytest.fixture
def make(make_config: Callable[..., SViTTConfig]) -> Make:
    """The small configuration, with changes."""

    def config(**changes: Any) -> SingularityConfig:
        fields = {**make_config().to_dict(), **DENSE, **changes}
        return SingularityConfig(**{k: v for k, v in fields.items() if k != "model_type"})

    return config


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("layers", [0, 2])
def test_every_parameter_learns(make: Make, batch: dict[str, Tensor], layers: int) -> None:
    model = SingularityForPreTraining(make(temporal_layers=layers))
    output = model(**batch)
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.testing.assert_close(output.loss, output.loss_vtc + output.loss_vtm + output.loss_mlm)
    assert model.leaves_parameters_unused == (layers > 0)
    batch["pixel_values"] = batch["pixel_values"][:, :1]  # pictures
    model.zero_grad()
    model(**batch).loss.backward()
    unused = {n for n, p in model.named_parameters() if p.grad is None}
    assert unused == {n for n, _ in model.named_parameters() if n.startswith("temporal.layers.")}


@torch.no_grad()
def test_frames_are_alone_without_layers_over_time(make: Make, batch: dict[str, Tensor]) -> None:
    model = SingularityForRetrieval(make()).eval()
    clips, mask = batch["pixel_values"], batch["attention_mask"]
    video, text = model.encode_video(clips), model.encode_text(batch["input_ids"], mask)
    assert video.states.shape == (3, 4 * 17, 32)
    for frame in range(4):
        one = model.encode_video(clips[:, [frame]]).states
        torch.testing.assert_close(video.states.unflatten(1, (4, 17))[:, frame], one)
    # Twice the frames, and no limit to them.
    torch.testing.assert_close(model.encode_video(clips.repeat(1, 2, 1, 1, 1)).embeds, video.embeds)
    # Without their order: the mean of embeddings, and keys that know of no place.
    other = model.encode_video(clips[:, [2, 0, 3, 1]])
    torch.testing.assert_close(other.embeds, video.embeds)
    scores = [model.match_logits(text.states, mask, x.states) for x in (video, other)]
    torch.testing.assert_close(*scores)
    for table in (layer.attention.bias.table for layer in model.video.layers):
        assert table.shape == (7 * 7 + 3, 2)


@torch.no_grad()
def test_layers_over_time_see_the_order(make: Make, batch: dict[str, Tensor]) -> None:
    model = SingularityForRetrieval(make(temporal_layers=1)).eval()
    clips = batch["pixel_values"]
    before, after = (model.encode_video(clips[:, k]) for k in ([0, 1, 2, 3], [1, 0, 2, 3]))
    assert not model.temporal.embeddings.any()
    swapped = before.states.unflatten(1, (4, 17))[:, [1, 0, 2, 3]].flatten(1, 2)
    torch.testing.assert_close(after.states, swapped)  # as long as frames have no embeddings
    model.temporal.embeddings.normal_()
    other = model.encode_video(clips[:, [1, 0, 2, 3]])
    assert not torch.allclose(other.states, model.encode_video(clips).states[:, :], atol=1e-2)
    torch.testing.assert_close(other.embeds, before.embeds)  # pooled before these layers
    model.config.pool_over_time = True
    assert not torch.allclose(model.encode_video(clips).embeds, other.embeds, atol=1e-2)


def test_one_stage_after_the_other(
    make: Make, batch: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = SingularityForPreTraining(make(num_frames=1))
    first.save_pretrained(tmp_path / "1")
    config = make(num_frames=4, temporal_layers=2, decoder_layers=2)
    second = SingularityForPreTraining.from_pretrained(tmp_path / "1", config=config)
    assert "the layers over time start from random or initial weights" in caplog.text
    assert second.temporal.embeddings.shape == (1, 4, 1, 32)
    state = second.state_dict()
    assert all(torch.equal(state[name], value) for name, value in first.state_dict().items())
    with torch.no_grad():
        second.temporal.embeddings.normal_()
    second.save_pretrained(tmp_path / "2")
    caplog.clear()
    answers = SingularityForQuestionAnswering.from_pretrained(tmp_path / "2")
    assert "the answer decoder starts from the fusion layers" in caplog.text
    assert len(caplog.records) == 1
    with torch.no_grad():
        wanted = second.eval().encode_video(batch["pixel_values"])
        found = answers.eval().encode_video(batch["pixel_values"])
    assert torch.equal(found.states, wanted.states) and found.embeds is None
    for layers in (0, 1):
        with pytest.raises(ValueError, match=f"temporal_layers must be 2, .*, got {layers}"):
            SingularityForPreTraining.from_pretrained(tmp_path / "2", temporal_layers=layers)
    base = AutoModel.from_pretrained(tmp_path / "2")
    assert type(base) is SingularityModel and type(base.config) is SingularityConfig
    assert AutoConfig.from_pretrained(tmp_path / "2").temporal_layers == 2


def test_more_frames(make: Make, batch: dict[str, Tensor]) -> None:
    """As at run time: interpolated for more frames, the first ones for fewer."""
    model = SingularityForRetrieval(make(num_frames=3, temporal_layers=1)).eval()
    with torch.no_grad():
        model.temporal.embeddings.normal_()
        for frames, count in ((4, 4), (2, 2)):
            clips = batch["pixel_values"][:, :frames]
            before = model.encode_video(clips).states
            assert expand_frames(model, frames) is model
            assert model.temporal.embeddings.shape[1] == model.config.num_frames == count
            torch.testing.assert_close(model.encode_video(clips).states, before)
    assert model.temporal.embeddings.requires_grad


def test_a_clip_is_encoded_in_one_graph(make: Make, batch: dict[str, Tensor]) -> None:
    """And exported for any number of clips; a whole step has its shapes on `meta`."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = SingularityForPreTraining(make(num_frames=3, temporal_layers=1)).eval()

        def forward(self, pixels: Tensor) -> Tensor:
            found = self.model.encode_video(pixels)
            return torch.cat([found.embeds, found.states.flatten(1)], 1)

    encoder, pixels = Encoder(), batch["pixel_values"]
    with torch.no_grad():
        wanted = encoder(pixels)
        torch._dynamo.reset()
        compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(pixels), wanted)
        rows = torch.export.Dim("rows", min=2, max=64)
        program = torch.export.export(encoder, (pixels,), dynamic_shapes=({0: rows},))
        for count in (2, 3):
            found = program.module()(pixels[:count])
            torch.testing.assert_close(found, wanted[:count])
    on_meta = {name: x.to("meta") for name, x in batch.items()}
    encoder.to("meta").model(**on_meta).loss.backward()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_rate": 0.7}, "keep_rate must be 1: Singularity is dense, got 0.7"),
        ({"multimodal_keep_rate": 0.5}, "multimodal_keep_rate must be 1: Sing.*, got 0.5"),
        ({"edge_sparsity": True}, "edge_sparsity must be False: Singularity is dense, got True"),
        ({"temporal_layers": -1}, "temporal_layers must be an integer of at least 0, got -1"),
        ({"pool_over_time": True}, "pool_over_time must be False without temporal_layers"),
        ({"compat": "svitt-official"}, "compat must be one of .*, got 'svitt-official'"),
        (
            {"temporal_layers": 1, "text_hidden_size": 16},
            r"text_hidden_size must be hidden_size \(32\) with temporal_layers, got 16",
        ),
    ],
)
def test_configurations_that_cannot_be(make: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^SingularityConfig: {message}"):
        make(**changes)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 0, 3, 32, 32)])
def test_what_is_no_clip(make: Make, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="SingularityModel: pixel_values must have shape"):
        SingularityModel(make()).encode_video(torch.zeros(shape))


def test_the_base_model_s_size() -> None:
    """By the authors' code; their layers over time are two of BERT's, over embeddings of frames."""
    of_time = 4 * 768 + 2 * 7_087_872
    for changes, more in (({}, 0), ({"num_frames": 4, "temporal_layers": 2}, of_time)):
        with torch.device("meta"):
            model = SingularityForPreTraining(SingularityConfig(**changes))
        assert sum(p.numel() for p in model.parameters()) == 202_764_797 + more


def test_edges_are_within_frames() -> None:
    found = edge_count(SingularityConfig(num_frames=4), text_length=32)
    assert found.video == 12 * 4 * 196**2 and found.dense_video == 4 * found.video
    assert found.multimodal == found.dense_multimodal == 3 * 32 * 784
