"""SCL: models with the authors' weights compute the authors' numbers."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden_cases import FOLDER
from scl_cases import FIELDS, arrays, close, gradients_close, model, state, texts
from torch import Tensor

from svitt_ops.models.scl import model as scl
from svitt_ops.models.scl.configuration import OFFICIAL, SCLConfig
from svitt_ops.models.scl.convert import load_clip, load_official
from svitt_ops.models.scl.losses import completion_loss

CLIPS = pytest.mark.parametrize("clips", [False, True], ids=["image", "video"])


def case_of(name: str, clips: bool) -> dict[str, Tensor]:
    return arrays(f"{name}_{'video' if clips else 'image'}")


def losses(clips: bool) -> dict[str, Tensor]:
    return case_of("losses", clips)


def classes_first(tokens: Tensor, clips: bool) -> Tensor:
    """Frames' tokens in the authors' order: all [CLS], then all patches."""
    frames = tokens.unflatten(1, (3 if clips else 1, -1))
    return torch.cat([frames[:, :, 0], frames[:, :, 1:].flatten(1, 2)], 1)


def pixels(clips: bool) -> Tensor:
    found = case_of("vision", clips)["input"]
    return found if clips else found[:, None]


def pairs(clips: bool, ids: str = "text_ids", case: str = "text") -> dict[str, Tensor]:
    """Arguments of the models; there are fewer clips than texts."""
    count = len(pixels(clips))
    return {
        "pixel_values": pixels(clips),
        "input_ids": texts(ids, case)[:count],
        "attention_mask": arrays("text")["text_masks"][:count],
    }


@CLIPS
def test_tower(clips: bool) -> None:
    found, case = model(clips=clips), case_of("vision", clips)
    seen: list[Tensor] = []
    found.video.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for layer in found.video.layers:
        layer.register_forward_hook(lambda _m, _i, output: seen.append(output[0]))
    output = found.video_norm(found.video(pixels(clips)).tokens)
    for name, tokens in zip(["embed", *(f"block{k}" for k in range(3))], seen, strict=True):
        if name in case:
            close(tokens, case[name], name)
    output = classes_first(output, clips)
    close(output, case["output"])
    (output * case["grad_weight"]).sum().backward()
    assert gradients_close(found, "vision_video" if clips else "vision_image") >= 6


@CLIPS
def test_masked_tower(clips: bool) -> None:
    found, case = model(clips=clips), case_of("vision", clips)
    kept = found.kept_patches(case["masked_noise"])
    assert torch.equal(kept, case["masked_keep"])
    seen: list[Tensor] = []
    found.video.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    output = found.video_norm(found.video(pixels(clips), kept).tokens)
    close(seen[0], case["masked_embed"])
    close(classes_first(output, clips), case["masked_output"])


def test_text_tower() -> None:
    found, case = model(), arrays("text")
    mask = case["text_masks"]
    output = found.text(texts(), mask)
    real = mask != 0
    close(output[real], case["text_hidden"][real])
    masked = found.text(texts("text_ids_mlm"), mask)
    close(masked[real], case["text_hidden_mlm"][real])
    (output * case["grad_weight"]).sum().backward()
    assert gradients_close(found, "text") == 3


@CLIPS
def test_fusion(clips: bool) -> None:
    found, case = model(clips=clips), case_of("fusion", clips)
    mask = case["text_masks"]
    real = mask != 0
    given = pairs(clips)
    video = found.encode_video(given["pixel_values"]).states
    text = found.encode_text(given["input_ids"], mask).states
    of_text, of_video = found.types.weight
    close((text + of_text)[real], case["text_in"][real])
    close(classes_first(video + of_video, clips), case["image_in"])
    seen: dict[str, Tensor] = {}
    for kind, layers in (("text", found.fusion.layers), ("image", found.fusion.video_layers)):
        for number, layer in enumerate(layers):
            layer.register_forward_hook(
                lambda _m, _i, output, name=f"{kind}_out{number}": seen.update({name: output[0]})
            )
    output = found.fuse(text, mask, video)
    for name, states in seen.items():
        if name.startswith("text"):
            close(states[real], case[name][real], name)
        else:
            close(classes_first(states, clips), case[name], name)
    close(output.states[real], case["text_feats"][real])
    close(classes_first(output.video_states, clips), case["image_feats"])
    close(output.pooled, case["cls_feats"])
    (output.pooled * case["grad_weight"]).sum().backward()
    assert gradients_close(found, "fusion_video" if clips else "fusion_image") >= 3


@CLIPS
def test_contrastive_loss(clips: bool) -> None:
    found, case = (
        model(clips=clips, loss_weights={"vtm": 0, "mlm": 0, "scl": 0}),
        case_of("losses", clips),
    )
    given = pairs(clips)
    video = found.encode_video(given["pixel_values"])
    text = found.encode_text(given["input_ids"], given["attention_mask"])
    close(found.pool(video.states), case["cl/image_uni"])
    close(text.states[:, 0], case["cl/text_uni"])
    if not clips:
        close(video.embeds, F.normalize(case["cl/image_proj"], dim=1))
        close(text.embeds, F.normalize(case["cl/text_proj"], dim=1))
        close(text.embeds @ video.embeds.T, case["cl/sim"])
    output = found(**given)
    close(output.loss_vtc, case["cl/loss"])
    assert torch.equal(output.loss, output.loss_vtc)
    output.loss.backward()
    assert gradients_close(found, f"losses_{'video' if clips else 'image'}", "cl/grad/") >= 3


@CLIPS
def test_matching_loss(clips: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrong clips are the case's, which are none of the batch's."""
    found, case = (
        model(clips=clips, loss_weights={"vtc": 0, "mlm": 0, "scl": 0}),
        case_of("losses", clips),
    )
    given, labels = pairs(clips), case["vtm/labels"]
    shown = (labels == 1).view(-1, *[1] * (pixels(clips).dim() - 1))
    false = case["vtm/false_image"] if clips else case["vtm/false_image"][:, None]
    given["pixel_values"] = torch.where(shown, pixels(clips), false)
    video = found.encode_video(given["pixel_values"]).states
    text = found.encode_text(given["input_ids"], given["attention_mask"]).states
    close(found.match_logits(text, given["attention_mask"], video), case["vtm/logits"])
    monkeypatch.setattr(scl, "draw_pairs", lambda *_: (torch.arange(len(labels)), labels))
    output = found(**given)
    close(output.loss_vtm, case["vtm/loss"])
    output.loss.backward()
    assert gradients_close(found, f"losses_{'video' if clips else 'image'}", "vtm/grad/") >= 5


@CLIPS
def test_masked_words(clips: bool) -> None:
    found, case = (
        model(clips=clips, loss_weights={"vtc": 0, "vtm": 0, "scl": 0}),
        case_of("losses", clips),
    )
    given = pairs(clips)
    count, mask = len(given["input_ids"]), given["attention_mask"]
    masked = texts("text_ids_mlm")[:count]
    video = found.encode_video(given["pixel_values"]).states
    logits = found.word_logits(masked, mask, video)
    close(logits[mask != 0], case["mlm/logits"][mask != 0])
    labels = arrays("text")["text_labels_mlm"][:count]
    output = found(**given, mlm_input_ids=masked, mlm_labels=labels)
    close(output.loss_mlm, case["mlm/loss"])
    output.loss.backward()
    assert gradients_close(found, f"losses_{'video' if clips else 'image'}", "mlm/grad/") >= 5


@pytest.mark.parametrize(
    ("clips", "compat", "loss"),
    [
        (False, None, "scl/"),
        (False, OFFICIAL, "scl/"),
        (True, None, "scl_corrected/"),
        (True, OFFICIAL, "scl_released/"),
    ],
)
def test_semantic_completion(clips: bool, compat: str | None, loss: str) -> None:
    weights = {"vtc": 0, "vtm": 0, "mlm": 0}
    found = model(clips=clips, loss_weights=weights, compat=compat)
    name = f"losses_{'video' if clips else 'image'}"
    case, given = arrays(name), pairs(clips)
    assert torch.equal(found.kept_patches(case["scl/noise"]), case["scl/keep"])
    output = found(
        **given,
        masked_input_ids=texts("scl/text_ids_masked", name),
        patch_noise=case["scl/noise"],
    )
    close(output.loss_scl, case[f"{loss}loss"])
    output.loss.backward()
    assert gradients_close(found, name, f"{loss}grad/") >= 5


@CLIPS
def test_completed_features(clips: bool) -> None:
    found, name = model(clips=clips), f"losses_{'video' if clips else 'image'}"
    case, given = arrays(name), pairs(clips)
    mask = given["attention_mask"]
    video = found.encode_video(given["pixel_values"]).states
    text = found.encode_text(given["input_ids"], mask).states
    masked = found.encode_video(given["pixel_values"], case["scl/keep"]).states
    recovered = found.fuse(text, mask, masked, frame_size=4)
    ids, real = texts("scl/text_ids_masked", name), mask != 0
    close(found.text(ids, mask)[real], case["scl/text_hidden_masked"][real])
    masked_text = found.encode_text(ids, mask).states
    complete = found.fuse(masked_text, mask, video)
    videos = recovered.video_states[:, ::4], complete.video_states[:, ::17]
    frames = videos if clips else [x[:, 0] for x in videos]
    for key, states in zip(("I_Re", "I_Co"), frames, strict=True):
        close(states, case[f"scl/{key}"])
    close(recovered.states[:, 0], case["scl/T_Co"])
    close(complete.states[:, 0], case["scl/T_Re"])
    where = "scl_corrected" if clips else "scl"
    close(completion_loss(*videos, 0.03), case[f"{where}/image_term"])
    terms = case["scl/T_Re"], case["scl/T_Co"]
    close(completion_loss(*terms, 0.03), case[f"{where}/text_term"])
    if not clips:
        one_way = (completion_loss(*x, 0.03, symmetric=False) for x in (videos, terms))
        for loss, side in zip(one_way, ("image", "text"), strict=True):
            close(loss, case[f"scl/one_directional_{side}"])


def test_answers() -> None:
    answers = [str(k) for k in range(13)]
    found, case = model("question_answering", answers=answers), arrays("losses_image")
    output = found(**pairs(False), targets=case["vqa/targets"])
    close(output.logits, case["vqa/logits"])
    close(output.loss, case["vqa/loss"])
    best = output.logits.argmax(1, keepdim=True)
    close(case["vqa/targets"].gather(1, best).mean(), case["vqa/score"])
    output.loss.backward()
    assert gradients_close(found, "losses_image", "vqa/grad/", "question_answering") >= 5


def test_reasoning() -> None:
    found, case = model("visual_reasoning"), arrays("losses_image")
    given = pairs(False)
    given["pixel_values"] = torch.stack([given["pixel_values"][:, 0], case["nlvr2/image_1"]], 1)
    output = found(**given, labels=case["nlvr2/answers"])
    close(output.logits, case["nlvr2/logits"])
    close(output.loss, case["nlvr2/loss"])
    output.loss.backward()
    assert gradients_close(found, "losses_image", "nlvr2/grad/", "visual_reasoning") >= 5


def choices(clips: bool) -> dict[str, Tensor]:
    """A batch of retrieval: the case's images, or the first clips."""
    case = arrays("retrieval_image")
    return {
        "pixel_values": pixels(True)[:2] if clips else case["image"][:, None],
        "input_ids": texts("text_ids", "retrieval_image"),
        "attention_mask": case["text_masks"],
        "false_input_ids": texts("false_text_ids", "retrieval_image"),
        "false_attention_mask": case["false_text_masks"],
    }


@CLIPS
def test_rank_loss(clips: bool) -> None:
    found = model("retrieval", clips=clips, loss_weights={"vtc": 0})
    name = f"retrieval_{'video' if clips else 'image'}"
    case, where = arrays(name), "irtr_bN_released" if clips else "rank_meter"
    seen: list[Tensor] = []
    found.rank_head.register_forward_hook(lambda _m, _i, output: seen.append(output))
    output = found(**choices(clips))
    close(seen[0].view(2, 4), case[f"{where}/scores"])
    wanted = case[f"{where}/{'irtr_loss' if clips else 'loss'}"]
    close(output.loss_vtm, wanted)
    output.loss.backward()
    if not clips:
        assert gradients_close(found, name, "rank_meter/grad/") >= 5


@pytest.mark.parametrize(
    ("clips", "compat", "batch", "where"),
    [
        (False, None, 2, "irtr_corrected_con_loss"),
        (True, None, 2, "irtr_corrected_con_loss"),
        (False, OFFICIAL, 1, "irtr_scl_b1"),
        (False, None, 1, "irtr_scl_b1"),
        (False, OFFICIAL, 2, "irtr_scl_bN_released"),
        (True, OFFICIAL, 2, "irtr_bN_released"),
    ],
)
def test_contrast_of_retrieval(clips: bool, compat: str | None, batch: int, where: str) -> None:
    found = model("retrieval", clips=clips, compat=compat, loss_weights={"vtc": 0.5})
    name = f"retrieval_{'video' if clips else 'image'}"
    case = arrays(name)
    output = found(**{key: x[:batch] for key, x in choices(clips).items()})
    contrast = 0.5 * output.loss_vtc
    close(contrast, case[where if where in case else f"{where}/con_loss"])
    if where not in case:
        close(output.loss_vtm, case[f"{where}/irtr_loss"])
        close(output.loss, contrast + output.loss_vtm)
        contrast.backward()  # what the case's gradients are of
        assert gradients_close(found, name, f"{where}/grad/") == 2


RANKS = """
import numpy, torch.nn.functional as F
import svitt_ops as so
case = {name: torch.from_numpy(x) for name, x in numpy.load(sys.argv[1]).items()}
part = slice(3 * rank, 3 * rank + 3)
text, image = (case[name][part].clone().requires_grad_() for name in ("text", "image"))
temperature = case["temperature"].reshape(1).requires_grad_()
sides = (F.normalize(text, dim=1), F.normalize(image, dim=1))
loss = 2 * so.info_nce(*sides, temperature, group=dist.group.WORLD)
loss.backward()
found = (loss, text.grad / 2, image.grad / 2, temperature.grad[0])  # DDP's mean over two ranks
wanted = (case["loss"][rank], case["grad_text_local"][part], case["grad_image_local"][part])
for one, other in zip(found, (*wanted, case["grad_temperature"][rank])):
    assert (one - other).abs().max() <= 1e-4 * other.abs().max(), (one, other)
"""


def test_gathered_contrast(tmp_path: Path, on_two_ranks: Callable[..., None]) -> None:
    """Of two ranks that gather each other's rows: the loss, and gradients as DDP averages them."""
    on_two_ranks(RANKS, tmp_path, str(FOLDER / "scl" / "gather_ranks.npz"))


def test_the_rank_head_starts_as_the_match_head() -> None:
    head = state()
    weights = {k: x for k, x in head.items() if not k.startswith("rank_output")}
    found = load_official(weights, SCLConfig(**FIELDS), task="retrieval")
    assert torch.equal(found.rank_head.weight, head["rank_output.weight"])
    assert torch.equal(found.rank_head.bias, head["rank_output.bias"])


def test_clip(caplog: pytest.LogCaptureFixture) -> None:
    """The tower of the first three of OpenAI's four blocks, at a larger resolution."""
    case = arrays("clip_openai")
    prefix = "vision_transformer."
    tensors = {k.removeprefix(prefix): x for k, x in state().items() if k.startswith(prefix)}
    tensors |= {k.removeprefix("state/"): x for k, x in case.items() if k.startswith("state/")}
    found = model()
    wanted = {name: x.clone() for name, x in found.state_dict().items() if "video" in name}
    close(
        torch.cat([wanted["video.cls_position"], wanted["video.patch_positions"]], 1)[0],
        case["positional_embedding_adapted"],
    )
    for name, parameter in found.named_parameters():
        if name.startswith(("video.", "video_norm.")):
            torch.nn.init.zeros_(parameter)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        report = load_clip(found, tensors)
    assert not caplog.records and not report.unknown and not report.missing
    assert len(report.dropped) == 2 + 16  # the projection, the mask token, and the last block
    for name in wanted:
        if name.startswith(("video.", "video_norm.")):
            close(found.state_dict()[name], wanted[name], name)
    whole = scl.SCLForPreTraining(SCLConfig(**FIELDS | {"image_size": 18, "num_hidden_layers": 4}))
    load_clip(whole, tensors)
    tokens = whole.video_norm(whole.video(case["image_small"][:, None]).tokens)
    close(tokens[:, 0] @ case["state/visual.proj"], case["openai_output"])
