"""SCL: what attends to what, sizes, what starts from what, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    RobertaConfig,
    RobertaModel,
)

import svitt_ops as so
from svitt_ops.models import (
    SCLConfig,
    SCLForPreTraining,
    SCLForQuestionAnswering,
    SCLForRetrieval,
    SCLForVisualReasoning,
    change_image_size,
    expand_frames,
)
from svitt_ops.models.scl.convert import load_clip, load_official, load_roberta
from svitt_ops.models.scl.losses import completion_loss, draw_pairs, text_contrast
from svitt_ops.models.scl.vision import frame_attention

TINY: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 50,
    "text_hidden_size": 24,
    "text_num_hidden_layers": 4,
    "fusion_layer": 2,
    "text_num_attention_heads": 3,
    "text_intermediate_size": 40,
    "fusion_intermediate_size": 56,
    "max_position_embeddings": 16,
    "projection_dim": 12,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
Make = Callable[..., SCLConfig]


@pytest.fixture
def make() -> Make:
    return lambda **changes: SCLConfig(**{**TINY, **changes})


@pytest.fixture
def learned(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pairs with what completion needs."""
    masked = batch["input_ids"].clone()
    masked[:, 1:3] = 3
    return {**batch, "masked_input_ids": masked, "patch_noise": torch.rand(3, 16)}


def allowed(frames: int, size: int) -> Tensor:
    """Which pairs of tokens attend, written out."""
    mask = torch.zeros(frames * size, frames * size, dtype=torch.bool)
    for frame in range(frames):
        own = slice(frame * size, (frame + 1) * size)
        mask[own, own] = True
        mask[frame * size] = True
    return mask


def layout_of(patches: int) -> so.BlockLayout:
    blocks = -(-patches // 8)
    every = torch.ones(blocks, blocks, dtype=torch.bool)
    return so.BlockLayout.from_mask(every, num_tokens=patches, block_size=8)


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("patches", [3, 16, 29])
def test_frames_attend_as_under_a_dense_mask(frames: int, patches: int) -> None:
    generator = torch.Generator().manual_seed(frames * patches)
    size = 1 + patches
    packed = torch.randn(2, frames * size, 3, 2, 8, generator=generator)
    upstream = torch.randn(2, 2, frames * size, 8, generator=generator)
    found, wanted = [], []
    for results, attend in (
        (found, lambda q, k, v: frame_attention(q, k, v, layout_of(patches))),
        (
            wanted,
            lambda q, k, v: F.scaled_dot_product_attention(
                q.double(), k.double(), v.double(), attn_mask=allowed(frames, size)
            ),
        ),
    ):
        leaf = packed.clone().requires_grad_()
        out = attend(*leaf.permute(2, 0, 3, 1, 4).unbind())
        (gradient,) = torch.autograd.grad(out, leaf, upstream.to(out.dtype))
        results += [out.detach().double(), gradient.double()]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_merging_the_heads_is_free() -> None:
    q = torch.randn(2, 2, 3 * 17, 8)
    assert frame_attention(q, q, q, layout_of(16)).transpose(1, 2).is_contiguous()
    with pytest.raises(ValueError, match="frame_attention: query must have tokens of frames, a mu"):
        frame_attention(q[:, :, 1:], q, q, layout_of(16))


def test_the_base_models_sizes() -> None:
    with torch.device("meta"):
        model = SCLForPreTraining(SCLConfig())
        clips = SCLForPreTraining(SCLConfig(image_size=224, num_frames=4))
    vision, text, width = 11, 12, 768
    block = 12 * width**2 + 13 * width
    counts = {name: sum(p.numel() for p in x.parameters()) for name, x in model.named_children()}
    assert counts["video"] == vision * block + 3 * 256 * width + (2 + 324 + 2) * width
    assert counts["text"] == text * block + (50265 + 512 + 1 + 2) * width
    layer = 16 * width**2 + 19 * width  # two attentions, feed-forward, three norms
    assert counts["fusion"] == 12 * layer + 4 * (width**2 + width)
    more = sum(p.numel() for p in clips.video.parameters()) - counts["video"]
    assert more == 8 * width - (324 - 196) * width


@pytest.mark.parametrize("frames", [1, 4])
def test_every_parameter_learns(make: Make, learned: dict[str, Tensor], frames: int) -> None:
    torch.manual_seed(0)
    model = SCLForPreTraining(make(num_frames=frames))
    given = {**learned, "pixel_values": learned["pixel_values"][:, :frames]}
    output = model(**given)
    parts = [output[f"loss_{name}"] for name in ("vtc", "vtm", "mlm", "scl")]
    torch.testing.assert_close(output.loss, sum(parts))
    output.loss.backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in unused if not name.endswith("key.bias")] == []
    assert not model.leaves_parameters_unused
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(8):
        model.before_step()
        optimizer.zero_grad()
        torch.manual_seed(0)
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < output.loss.item()


def test_completion_has_no_gradient_to_what_is_complete(
    make: Make, learned: dict[str, Tensor]
) -> None:
    torch.manual_seed(0)
    model = SCLForPreTraining(make(loss_weights={"vtc": 0, "vtm": 0, "mlm": 0}))
    one, other = (torch.randn(3, 24, requires_grad=True) for _ in range(2))
    completion_loss(one, other, 0.03).backward()
    assert one.grad is not None and one.grad.any() and other.grad is None
    given = {**learned, "pixel_values": learned["pixel_values"][:, :1]}
    output = model(**given)
    assert output.loss_vtc is None and torch.equal(output.loss, output.loss_scl)
    with pytest.raises(ValueError, match="masked_input_ids and patch_noise must be given unless"):
        model(**{**given, "patch_noise": None})
    with pytest.raises(ValueError, match=r"patch_noise must have shape \(batch, 16\), got"):
        model(**{**given, "patch_noise": torch.rand(3, 9)})


@pytest.mark.parametrize("compat", [None, "scl-official"])
def test_kept_patches(make: Make, compat: str | None) -> None:
    """Theirs loses a patch to rounding where a fifth of them is a whole number."""
    counts = {4: 3, 5: 5 if compat is None else 4, 10: 20 if compat is None else 19, 14: 39, 18: 64}
    for side, count in counts.items():
        model = SCLForPreTraining(make(image_size=8 * side, compat=compat))
        noise = torch.rand(2, side * side)
        kept = model.kept_patches(noise)
        assert kept.shape == (2, count)
        assert (noise.gather(1, kept) <= noise.sort(1).values[:, count - 1 : count]).all()


def test_masked_frames_keep_the_same_places(make: Make, batch: dict[str, Tensor]) -> None:
    model = SCLForPreTraining(make(num_frames=4, num_hidden_layers=1)).eval()
    kept = torch.tensor([[3, 1], [0, 15], [7, 8]])
    states = model.encode_video(batch["pixel_values"], kept)
    assert states.states.shape == (3, 4 * 3, 24) and states.embeds is None
    hidden = batch["pixel_values"].clone()  # patch 5 is removed from all frames
    hidden[..., 8:16, 8:16] = 100
    assert torch.equal(model.encode_video(hidden, kept).states, states.states)
    seen = batch["pixel_values"].clone()
    seen[:, 3, :, 0:8, 8:16] = 100  # patch 1, of the last frame
    found = model.encode_video(seen, kept).states.unflatten(1, (4, 3))
    before = states.states.unflatten(1, (4, 3))
    same = torch.isclose(found, before, atol=1e-6).all(-1)
    assert not same[0, :, 0].any() and not same[0, 3].any()  # every [CLS], and its own frame
    assert same[0, :3, 1:].all() and same[1:].all()


def test_one_frame_is_an_image(make: Make, batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model = SCLForRetrieval(make()).eval()
    images = batch["pixel_values"][:, 0]
    wanted = model.encode_video(images)
    assert torch.equal(model.encode_video(images[:, None]).states, wanted.states)
    assert wanted.states.shape == (3, 17, 24)
    with pytest.raises(ValueError, match="FrameTower: pixel_values must have 1 to 1 frames, got 2"):
        model.encode_video(batch["pixel_values"][:, :2])
    expand_frames(model, 3)
    assert model.video.frame_positions.shape == (8, 32) and model.config.num_frames == 3
    same = images[:, None].expand(-1, 3, -1, -1, -1)
    frames = model.encode_video(same).states.unflatten(1, (3, 17))
    torch.testing.assert_close(frames[:, 0], frames[:, 2])  # positions of frames begin at 0
    torch.testing.assert_close(frames[:, 0], wanted.states)  # and all frames say the same
    torch.nn.init.normal_(model.video.frame_positions)
    alone = model.encode_video(images).states
    assert not torch.allclose(alone, wanted.states)
    expand_frames(model, 1)
    assert model.video.frame_positions is None
    torch.testing.assert_close(model.encode_video(images).states, alone)
    change_image_size(model, 48)
    assert model.encode_video(torch.zeros(3, 3, 48, 48)).states.shape == (3, 37, 24)
    with pytest.raises(ValueError, match=r"num_frames must be at most max_frames \(8\), got 9"):
        expand_frames(model, 9)


def test_clips_from_a_model_of_images(make: Make, tmp_path: Path) -> None:
    start = SCLForPreTraining(make())
    start.save_pretrained(tmp_path / "images")
    model = SCLForPreTraining.from_pretrained(tmp_path / "images", num_frames=4, image_size=48)
    assert not model.video.frame_positions.any() and model.config.image_size == 48
    torch.nn.init.normal_(model.video.frame_positions)
    model.save_pretrained(tmp_path / "clips")
    again = SCLForPreTraining.from_pretrained(tmp_path / "clips").eval()
    pixels = torch.randn(2, 4, 3, 48, 48)
    assert torch.equal(again.encode_video(pixels).states, model.eval().encode_video(pixels).states)
    with pytest.raises(ValueError, match="max_frames must be 8, that of the weights in"):
        SCLForPreTraining.from_pretrained(tmp_path / "clips", max_frames=9)


def test_tasks_start_from_pretraining(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = SCLForPreTraining(make())
    start.save_pretrained(tmp_path)
    found = SCLForRetrieval.from_pretrained(tmp_path)
    assert torch.equal(found.rank_head.weight, start.match_head.weight[1:])
    assert torch.equal(found.rank_head.bias, start.match_head.bias[1:])
    assert not caplog.records and not found.match_head.weight.requires_grad
    reasoning = SCLForVisualReasoning.from_pretrained(tmp_path)
    assert torch.equal(reasoning.second_type, start.types.weight[1:])
    (record,) = caplog.messages
    assert "class_head" in record and "second_type" not in record
    answers = ["red", "green", "blue"]
    answering = SCLForQuestionAnswering.from_pretrained(tmp_path, answers=answers)
    assert answering.config.answers == answers and answering.class_head.out.out_features == 3
    answering.save_pretrained(tmp_path / "answers")
    again = SCLForQuestionAnswering.from_pretrained(tmp_path / "answers")
    assert torch.equal(again.class_head.out.weight, answering.class_head.out.weight)
    with pytest.raises(ValueError, match=r"answers must be .*, that of the weights in"):
        SCLForQuestionAnswering.from_pretrained(tmp_path / "answers", answers=["no", "yes"])


def test_wrong_pairs_are_half_of_a_batch_and_never_true() -> None:
    torch.manual_seed(0)
    ids = torch.tensor([4, 4, 7, 8, 9])
    counts = torch.zeros(5, 5)
    for _ in range(600):
        rows, labels = draw_pairs(5, ids, torch.device("cpu"))
        assert (labels == 1).sum() == 2 and (labels == 0).sum() == 3
        assert torch.equal(rows[labels == 1], torch.arange(5)[labels == 1])
        assert (ids[rows] != ids)[labels == 0].all()
        wrong = labels == 0
        counts[torch.arange(5)[wrong], rows[wrong]] += 1
    share = counts / counts.sum(1, keepdim=True)
    assert (share[2][[0, 1, 3, 4]] - 1 / 4).abs().max() < 0.08
    assert (share[0][[2, 3, 4]] - 1 / 3).abs().max() < 0.08
    rows, labels = draw_pairs(3, torch.zeros(3, dtype=torch.int64), torch.device("cpu"))
    assert torch.equal(rows, torch.arange(3)) and sorted(labels.tolist()) == [-100, -100, 1]


def test_false_texts_are_needed(make: Make, batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model = SCLForRetrieval(make())
    given = {n: batch[n] for n in ("pixel_values", "input_ids", "attention_mask")}
    given["pixel_values"] = given["pixel_values"][:, 0]
    with pytest.raises(ValueError, match="false_input_ids and false_attention_mask must be given"):
        model(**given)
    false = given["input_ids"][:, None].flip(0).expand(-1, 2, -1)
    mask = given["attention_mask"][:, None].flip(0).expand(-1, 2, -1)
    with pytest.raises(ValueError, match=r"must have shape \(3, texts, 6\), got \(3, 2, 5\)"):
        model(**given, false_input_ids=false[..., 1:], false_attention_mask=mask)
    output = model(**given, false_input_ids=false, false_attention_mask=mask)
    output.loss.backward()
    assert output.loss_vtm.isfinite() and model.rank_head.weight.grad.any()
    assert model.match_head.weight.grad is None
    scores = model.prior_scores(torch.ones(2))
    assert torch.equal(scores, torch.zeros(2))


def test_texts_of_a_clip_are_no_negatives_of_it() -> None:
    """Of rows 0 and 2, which have one clip, the first texts are left out of each other's."""
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(3, 8, generator=generator)
    text = torch.randn(3, 4, 8, generator=generator).requires_grad_()
    found = text_contrast(video, text, torch.tensor([0.5]), torch.tensor([5, 6, 5]))
    logits = video @ text.flatten(0, 1).T / 0.5
    kept = [[k for k in range(12) if k != left] for left in (8, None, 0)]
    wanted = [logits[i, c].logsumexp(0) - logits[i, 4 * i] for i, c in enumerate(kept)]
    torch.testing.assert_close(found, sum(wanted) / 3)
    (gradient,) = torch.autograd.grad(found, text)
    assert gradient.isfinite().all()


def test_class_attention(make: Make, batch: dict[str, Tensor]) -> None:
    model = SCLForRetrieval(make(num_frames=4)).eval()
    mask = batch["attention_mask"]
    video = model.encode_video(batch["pixel_values"]).states
    text = model.encode_text(batch["input_ids"], mask).states
    with pytest.raises(ValueError, match="video must have frames of 17 tokens, got 67 tokens"):
        model.fuse(text, mask, video[:, 1:])
    maps = model.class_attention(text, mask, video)
    assert maps.shape == (3, 2, 4 * 17)
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 2))
    layer = model.fusion.layers[0]
    states = layer.attention_norm(
        (x := text + model.types.weight[0]) + layer.attention(x, x, key_padding_mask=mask == 0)
    )
    cross, seen = layer.cross_attention, video + model.types.weight[1]
    q, k = cross.query(states[:, :1]).unflatten(-1, (3, 8)), cross.key(seen).unflatten(-1, (3, 8))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5
    torch.testing.assert_close(maps[:, 0], logits.softmax(-1)[:, :, 0].mean(1))


def test_answers_of_several_clips(make: Make, batch: dict[str, Tensor]) -> None:
    model = SCLForQuestionAnswering(make(answers=["a", "b", "c"], num_frames=2)).eval()
    states = model.encode_video(batch["pixel_values"].unflatten(1, (2, 2)).flatten(0, 1)).states
    text = (batch["input_ids"], batch["attention_mask"])
    scores = model.answer_scores(*text, states.unflatten(0, (3, 2)), merge="mean")
    alone = [model.answer_logits(*text, x) for x in states.unflatten(0, (3, 2)).unbind(1)]
    torch.testing.assert_close(scores, torch.stack(alone).mean(0))
    output = model(batch["pixel_values"][:2, :2], *text, clip_numbers=torch.tensor([1, 0, 1]))
    whole = model(batch["pixel_values"][[1, 0, 1], :2], *text)
    torch.testing.assert_close(output.logits, whole.logits)
    with pytest.raises(ValueError, match=r"targets must have shape \(3, 3\), got \(3, 2\)"):
        model(batch["pixel_values"][:, :2], *text, targets=torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"config\.answers must be a list, got None"):
        SCLForQuestionAnswering(make())


def test_towers_of_clip_and_roberta(make: Make, batch: dict[str, Tensor], tmp_path: Path) -> None:
    """What transformers' own models compute, from a module and from a folder."""
    torch.manual_seed(0)
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"intermediate_size": 48, "image_size": 32, "patch_size": 8},
        )
    ).eval()
    roberta = RobertaModel(
        RobertaConfig(
            **{"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3},
            **{"intermediate_size": 40, "vocab_size": 50, "max_position_embeddings": 18},
            **{"type_vocab_size": 1, "layer_norm_eps": 1e-5},
        ),
        add_pooling_layer=False,
    ).eval()
    pixels = batch["pixel_values"][:, 0]
    ids, mask = batch["input_ids"].clamp(min=2), batch["attention_mask"]
    ids = ids.masked_fill(mask == 0, 1)  # RoBERTa's positions follow its padding
    for folder in (None, tmp_path):
        model = SCLForPreTraining(make(image_mean=[0.5] * 3, image_std=[0.5] * 3)).eval()
        sources = (clip, roberta)
        if folder is not None:
            for name, source in zip(("clip", "roberta"), sources, strict=True):
                source.save_pretrained(folder / name)
            sources = (folder / "clip", folder / "roberta")
        for load, source in zip((load_clip, load_roberta), sources, strict=True):
            report = load(model, source)
            assert not report.unknown and not report.missing
        wanted = clip.post_layernorm(clip(pixels).last_hidden_state)
        torch.testing.assert_close(model.video_norm(model.video(pixels[:, None]).tokens), wanted)
        found, real = model.text(ids, mask), mask != 0
        wanted = roberta(ids, mask).last_hidden_state
        torch.testing.assert_close(found[real], wanted[real])
    with pytest.raises(ValueError, match="load_clip: num_hidden_layers must be 2, that of"):
        load_clip(SCLForPreTraining(make(num_hidden_layers=3)), clip)
    with pytest.raises(ValueError, match="load_roberta: fusion_layer must be 2, that of"):
        load_roberta(SCLForPreTraining(make(fusion_layer=3)), roberta)
    with pytest.raises(ValueError, match="load_clip: source must be the folder of a clip_vision"):
        load_clip(model, tmp_path / "none")
    with pytest.raises(ValueError, match="load_roberta: CLIPVisionModel must hold a RoBERTa, got"):
        load_roberta(model, clip)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"a": torch.zeros(2)},
            "must have vision_transformer.visual.positional_embedding, got 1 other tensors",
        ),
        (
            {"vision_transformer.visual.positional_embedding": torch.zeros(17, 32)},
            "must hold the weights of such a model",
        ),
    ],
)
def test_files_of_others_are_refused(make: Make, source: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_official(source, make())
    with pytest.raises(ValueError, match=r"task must be one of pretraining, .*, got 'grounding'"):
        load_official(source, make(), task="grounding")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edge_sparsity": True}, "edge_sparsity must be False: SCL has no other, got True"),
        ({"hard_negatives": True}, "hard_negatives must be False: .*, got True"),
        ({"num_frames": 9}, r"num_frames must be at most max_frames \(8\), got 9"),
        ({"fusion_layer": 4}, "fusion_layer must be 0 to 3, got 4"),
        ({"patch_mask_share": 1}, "patch_mask_share must be more than 0 and less than 1, got 1"),
        ({"completion_temperature": 0}, "completion_temperature must be positive, got 0"),
        ({"false_texts": 0}, "false_texts must be an integer of at least 1, got 0"),
        ({"answers": []}, r"answers must be None, or distinct texts, one at least, got \[\]"),
        ({"answers": ["a", "a"]}, "answers must be None, or distinct texts, one at least"),
        ({"answers": "ab"}, "answers must be None, or distinct texts, one at least, got 'ab'"),
        ({"answers": [["a"]]}, "answers must be None, or distinct texts, one at least"),
        (
            {"loss_weights": {"psl": 1}},
            r"loss_weights must be keyed by \('vtc', 'vtm', 'mlm', 'scl'",
        ),
        ({"compat": "svitt-official"}, "compat must be one of .*, got 'svitt-official'"),
    ],
)
def test_configurations_that_cannot_be(make: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^SCLConfig: {message}"):
        make(**changes)
