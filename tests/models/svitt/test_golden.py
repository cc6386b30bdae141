"""Models with the authors' weights compute the authors' numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import svitt_ops as so
from svitt_ops.models import SViTTConfig, SViTTForPreTraining, convert
from svitt_ops.models.parts.expansion import resize_bias_table
from svitt_ops.models.parts.resolution import resize_places

FOLDER = Path(__file__).parents[2] / "golden"


class Case:
    """Arrays as tensors, weights by the authors' names, and the description."""

    def __init__(self, name: str) -> None:
        with np.load(FOLDER / f"{name}.npz") as file:
            self.arrays = {key: torch.from_numpy(file[key]) for key in file}
        self.meta: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())

    def __getitem__(self, key: str) -> Tensor:
        return self.arrays[key]

    def state(self) -> dict[str, Tensor]:
        flat, tensors = self.arrays["state"], {}
        for name, (offset, shape) in self.meta["state"].items():
            value = flat[offset : offset + int(np.prod(shape))].reshape(shape)
            tensors[name] = value.long() if name in self.meta["state_int64"] else value
        return tensors

    def config(self, **changes: Any) -> SViTTConfig:
        given = self.meta["config"]
        vision, text, sparse = given["vision"], given["text"], given.get("sparse")
        values = {
            "image_size": given["image_size"],
            "patch_size": given["patch_size"],
            "num_frames": given["num_frames"],
            "hidden_size": vision["width"],
            "num_attention_heads": vision["heads"],
            "num_hidden_layers": vision["layers"],
            "intermediate_size": vision["intermediate"],
            "drop_path_rate": 0.0,
            "text_hidden_size": text["width"],
            "text_num_attention_heads": text["heads"],
            "text_num_hidden_layers": text["layers"],
            "fusion_layer": text["fusion_layer"],
            "text_intermediate_size": text["intermediate"],
            "vocab_size": text["vocab"],
            "max_position_embeddings": text["max_positions"],
            "projection_dim": given["embed_dim"],
            "multimodal_keep_rate": 1.0,
            "multimodal_prune_layers": [],
        }
        if sparse:
            values |= {name: sparse[name] for name in ("block_size", "num_local", "num_random")}
            values |= {name: sparse[name] for name in ("keep_rate", "prune_layers")}
        else:
            values |= {"edge_sparsity": False, "keep_rate": 1.0, "prune_layers": []}
        return SViTTConfig(**values, **changes)

    def model(self, folder: Path, **changes: Any) -> SViTTForPreTraining:
        """Loaded as the authors' file is."""
        torch.save({"model": self.state(), "epoch": 9}, folder / "official.pth")
        return convert.load_official(folder / "official.pth", self.config(**changes))

    def close(self, found: Tensor, key: str, tolerance: float = 2e-5) -> None:
        wanted = self[key].to(found.dtype)
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max(), key


def hand_over_patterns(model: SViTTForPreTraining, case: Case) -> None:
    """Make the video tower take the case's blocks."""
    tower, layer = model.video, [0]

    def layout(count: int, device: Any, generator: Any) -> so.BlockLayout:
        mask = case[f"choice/blocks/{layer[0] % len(tower.layers)}"].bool()
        layer[0] += 1
        size = model.config.block_size
        whole = mask.shape[0] * size
        tokens = whole if model.config.compat else count
        return so.BlockLayout.from_mask(mask, num_tokens=tokens, block_size=size)

    tower._layout = layout


IGNORED = -100


@pytest.mark.parametrize("compat", ["svitt-official", None])
def test_svitt_pretraining(tmp_path: Path, compat: str | None) -> None:
    case = Case("svitt/pretrain")
    model = case.model(tmp_path, compat=compat)
    hand_over_patterns(model, case)
    prefix = "out/" if compat else "out/corrected/"
    mask, ids = case["in/attention_mask"], case["in/input_ids"]
    video, text = model.encode_video(case["in/video"]), model.encode_text(ids, mask)
    for layer, found in zip((3, 6, 9), video.indices_per_stage, strict=True):
        assert torch.equal(found.int(), case[f"{prefix}surviving/{layer}"])
    case.close(video.states, f"{prefix}video_states")
    case.close(video.embeds, f"{prefix}video_feat")
    case.close(text.states, "out/text_states")
    case.close(text.embeds, "out/text_feat")
    clip, other = case["choice/neg_video_of_text"], case["choice/neg_text_of_video"]
    logits = model.match_logits(
        torch.cat([text.states, text.states, text.states[other]]),
        torch.cat([mask, mask, mask[other]]),
        torch.cat([video.states, video.states[clip], video.states]),
    )
    case.close(logits, f"{prefix}itm_logits")
    matches = torch.arange(12) < 4
    vtm = F.cross_entropy(logits, matches.long())
    masked = model.encode_text(case["choice/mlm_input_ids"], mask)
    fused = model.fuse(masked.states, mask, video.states)
    words = model.token_head(fused.states, model.text.embeddings.word.weight)
    labels = case["choice/mlm_labels"].flatten()
    mlm = F.cross_entropy(words.flatten(0, 1), labels, ignore_index=IGNORED)
    if compat:
        case.close(words, "out/mlm_logits")
    model.config.loss_weights = {"vtc": 1, "vtm": 0, "mlm": 0}
    hand_over_patterns(model, case)
    vtc = model(case["in/video"], ids, mask, pair_ids=case["in/ids"]).loss
    for name, loss in (("vtc", vtc), ("vtm", vtm), ("mlm", mlm)):
        case.close(loss.detach(), f"{prefix}loss_{name}")
    (vtc + vtm + mlm).backward()
    grads = {
        "video.cls_token": "vision_encoder.embeddings.cls_token",
        "video.layers.2.attention.key.weight": (
            "vision_encoder.encoder.layer.2.attention.attention.key.weight"
        ),
        "video.layers.9.attention.bias.table": (
            "vision_encoder.encoder.layer.9.attention.attention."
            "relative_position_bias.relative_position_bias_table"
        ),
    }
    if compat:
        grads["temperature"] = "temp"
        grads["fusion.layers.0.cross_attention.key.weight"] = (
            "text_encoder.bert.encoder.layer.2.crossattention.self.key.weight"
        )
        grads["token_head.dense.bias"] = "text_encoder.cls.predictions.transform.dense.bias"
    for ours, theirs in grads.items():
        key = f"grad/{theirs}" if compat else f"grad/corrected/{theirs}"
        grad = model.get_parameter(ours).grad
        assert grad is not None
        case.close(grad[0] if ours == "temperature" else grad, key, 1e-3)  # a scalar there


@pytest.mark.parametrize("strided", [False, True])
def test_svitt_match_scores_of_several_clips(
    tmp_path: Path, strided: bool, caplog: pytest.LogCaptureFixture
) -> None:
    case = Case("svitt/retrieval")
    model = case.model(tmp_path, compat="svitt-official")
    # A retrieval checkpoint has no head for masked tokens.
    assert model.config.loss_weights == {"vtc": 1, "vtm": 1, "mlm": 0}
    assert "nothing for: token_head.bias" in caplog.text
    assert "the head for masked tokens starts from random" in caplog.text
    hand_over_patterns(model, case)
    frames = case["in/eval/video"]
    clips = [frames[:, k::2] if strided else frames[:, 4 * k : 4 * k + 4] for k in range(2)]
    clips = torch.stack(clips, 1).flatten(0, 1)
    mask = case["in/eval/attention_mask"]
    where = "out/eval/strided/" if strided else "out/eval/contiguous/"
    with torch.no_grad():
        video, text = model.encode_video(clips), model.encode_text(case["in/eval/input_ids"], mask)
        case.close(video.embeds.unflatten(0, (5, 2)), f"{where}video_feat")
        similarity = video.embeds.unflatten(0, (5, 2)).mean(1) @ text.embeds.T
        case.close(similarity, f"{where}sim_v2t")
        every = [k for k in range(10) for _ in range(7)]
        texts = list(range(7)) * 10
        logits = model.match_logits(text.states[texts], mask[texts], video.states[every])[:, 1]
    case.close(logits.view(5, 2, 7), f"{where}clip_match_logits")


def test_singularity_pretraining(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of one frame: SViTT without sparsity, over a two-dimensional table."""
    case = Case("singularity/pretrain")
    model = case.model(tmp_path)
    assert "no counterpart for: temporal_embeddings" in caplog.text  # not used there either
    mask = case["in/attention_mask"]
    with torch.no_grad():
        video = model.encode_video(case["in/image"])
        text = model.encode_text(case["in/input_ids"], mask)
        clip, other = case["choice/neg_image_of_text"], case["choice/neg_text_of_image"]
        logits = model.match_logits(
            torch.cat([text.states, text.states, text.states[other]]),
            torch.cat([mask, mask, mask[other]]),
            torch.cat([video.states, video.states[clip], video.states]),
        )
    case.close(video.states, "out/image_embeds")
    case.close(video.embeds[:, None], "out/image_feat")
    case.close(text.embeds, "out/text_feat")
    case.close(logits, "out/itm_logits")


@pytest.mark.parametrize(
    ("name", "old", "new"), [("4to6", 4, 6), ("6to4", 6, 4), ("14to24", 14, 24)]
)
def test_bias_of_another_resolution_is_the_authors(name: str, old: int, new: int) -> None:
    case = Case("singularity/resize")
    table = case[f"in/table_{name}"]
    found = resize_bias_table(table, new, 1, source_grid=old)
    case.close(found, f"out/table_{name}", 1e-6)
    # Frame by frame: of a table of three frames each slice is resized alone, then they expand.
    slices = [table[:-3] * k for k in range(5)]
    deep = resize_bias_table(torch.cat([*slices, table[-3:]]), new, 6, source_grid=old)
    planes = deep[:-3].unflatten(0, (11, -1))
    wanted = case[f"out/table_{name}"][:-3]
    for plane, k in zip(planes, [0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4], strict=True):
        torch.testing.assert_close(plane, wanted * k, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "new"), [("4to6", 6), ("16to24", 24), ("6to4", 4)])
def test_places_of_another_resolution_are_the_authors(name: str, new: int) -> None:
    case = Case("albef/resize")
    places = case[f"in/pos_{name}"]
    found = torch.cat([places[:, :1], resize_places(places[:, 1:], new)], 1)
    case.close(found, f"out/pos_{name}", 2e-6)
