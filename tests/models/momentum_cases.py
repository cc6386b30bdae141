"""What tests of systems with a momentum twin have in common: a small model, and golden cases."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden_cases import Case, inputs
from torch import Tensor

from svitt_ops.models.parts import distillation
from svitt_ops.models.parts.key_maps import placed, rename
from svitt_ops.models.parts.paired_images import ReadsTwoImages
from svitt_ops.models.parts.released_images import _in_pairs
from svitt_ops.models.simla.convert import RULES

TINY: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 50,
    "text_hidden_size": 32,
    "text_num_hidden_layers": 4,
    "fusion_layer": 2,
    "text_num_attention_heads": 2,
    "text_intermediate_size": 40,
    "max_position_embeddings": 16,
    "projection_dim": 12,
    "decoder_layers": 2,
    "queue_size": 6,
    "initializer_range": 0.2,
}
"""Of a small model of ALBEF, for the `batch` of `conftest`."""
PAIRS = {
    "pixel_values": "in/image",
    "input_ids": "in/input_ids",
    "attention_mask": "in/attention_mask",
}
LOSSES = {"vtc": "itc", "vtm": "itm"}
TOLERANCE = 2e-5


def in_training(case: Case, task: str, **changes: Any) -> Any:
    """The case's model after the twin's update."""
    model = case.model(task, **changes).train()
    model.before_step()
    return model


def hand_over_negatives(patch: pytest.MonkeyPatch, case: Case) -> None:
    wrong = tuple(case[f"choice/{name}"] for name in ("neg_image_of_text", "neg_text_of_image"))
    patch.setattr(distillation, "draw_negatives", lambda *_, **__: wrong)


def check_losses(case: Case, output: Any, where: str, *, mlm: bool = False) -> None:
    for ours, theirs in {**LOSSES, **({"mlm": "mlm"} if mlm else {})}.items():
        case.close(output[f"loss_{ours}"].detach(), f"{where}loss_{theirs}", TOLERANCE)


def official(name: str, model: Any, get: Callable[[str], Tensor]) -> Tensor:
    """What a model has under one of the authors' names."""
    if ".qkv." in name:
        parts = ("query", "key", "value")
        return torch.cat([official(name.replace("qkv", x), model, get) for x in parts])
    if name.endswith("pos_embed"):
        halves = (name.replace("pos_embed", x) for x in ("cls_position", "patch_positions"))
        return torch.cat([official(x, model, get) for x in halves], 1)
    target = placed(rename(name, RULES), model.config)
    assert target, name
    return get(target)


def names_here(case: Case, model: Any) -> dict[str, str]:
    """The authors' names, and what they are where doubled layers are pairs."""
    names = [name for name in case.meta["state"] if name not in case.meta["state_int64"]]
    if not isinstance(model, ReadsTwoImages):
        return dict(zip(names, names, strict=True))
    found: Any = _in_pairs({name: name for name in names}, model.config)  # type: ignore[misc]
    known = {old: new for new, old in found.items()}
    offsets = {name: case.meta["state"][name][0] for name in names}
    at = {(offsets[old], "_m." in old): new for old, new in known.items()}  # shared: of one name
    return {name: known.get(name) or at[offsets[name], "_m." in name] for name in names}


def check_gradients(case: Case, model: Any, prefix: str = "grad/") -> int:
    """Compare every gradient that the case has; returns how many."""
    names, count = names_here(case, model), 0

    def grad(target: str) -> Tensor:
        found = model.get_parameter(target).grad
        assert found is not None, target
        return found[0] if target == "temperature" else found  # type: ignore[no-any-return]

    for key in case.arrays:
        if key.startswith(prefix):
            found = official(names.get(key.removeprefix(prefix), ""), model, grad)
            case.close(found, key, TOLERANCE)
            count += 1
    return count


def check_teacher(case: Case, model: Any) -> None:
    """Every weight of the twin after the step, by three sums of each, and some of them whole."""
    names, seen, rows = names_here(case, model), set(), []
    state = {name: x.detach() for name, x in model.state_dict().items()}
    for name, (offset, _) in case.meta["state"].items():
        if "_m." in name and name not in case.meta["state_int64"] and offset not in seen:
            seen.add(offset)
            flat = official(names[name], model, state.__getitem__).double().flatten()
            wave = torch.arange(flat.numel(), dtype=torch.float64).cos()
            rows.append(torch.stack([flat.sum(), flat.abs().sum(), (flat * wave).sum()]))
    wanted = case["after/momentum_checksums"]
    assert len(rows) == len(wanted)
    scale = wanted[:, 1:2].clamp(min=1)  # the sum of the absolute values
    assert ((torch.stack(rows) - wanted).abs() / scale).max() < 1e-6
    for key in case.arrays:
        if key.startswith("after/") and "_m." in key:
            found = official(names[key.removeprefix("after/")], model, state.__getitem__)
            case.close(found, key)


def check_queues(case: Case, model: Any) -> None:
    case.close(model.queue.video.T, "after/image_queue")
    case.close(model.queue.text.T, "after/text_queue")
    assert torch.equal(model.queue.next, case["after/queue_ptr"])


def check_targets(case: Case, model: Any, where: str, ids: Tensor | None = None) -> Any:
    """Embeddings by the model and its twin, and what the contrastive loss aims at."""
    arguments = inputs(case, PAIRS)
    video = model.encode_video(arguments["pixel_values"])
    text = model.encode_text(arguments["input_ids"], arguments["attention_mask"])
    taught = model.teach(**arguments)
    pairs = {"image_feat": video, "text_feat": text, "image_feat_m": taught[0]}
    for name, found in {**pairs, "text_feat_m": taught[1]}.items():
        case.close(found.embeds.detach(), f"{where}{name}")
    logits = taught[0].embeds @ text.embeds.detach().T  # only for its shape
    assert logits.shape == (len(text.embeds),) * 2
    for name, queries, keys in (
        ("weights_i2t", video, taught[1]),
        ("weights_t2i", text, taught[0]),
    ):
        weights = (queries.embeds @ keys.embeds.T / model.temperature).detach()
        same = torch.eye(len(weights), dtype=torch.bool) if ids is None else ids[:, None] == ids
        wanted = case[f"{where}{name}"]
        # The authors leave zeros in place of positives, and divide by their share too.
        drawn = weights.masked_fill(same, -torch.inf).softmax(1)
        assert torch.equal(wanted == 0, same)
        torch.testing.assert_close(
            drawn, wanted / wanted.sum(1, keepdim=True), rtol=1e-4, atol=1e-6
        )
    return video, text, taught
