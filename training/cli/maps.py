"""Figures: where a model finds the pieces of a text in a picture, and what it makes of that."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from svitt_ops.training.cli.figures import (
    CAPTION_LINE,
    DPI,
    GAP,
    LABEL,
    MIN_WIDTH,
    TITLE,
    text_width,
    wrapped,
)
from svitt_ops.training.data.augment import to_pixel_values
from svitt_ops.training.data.collate import encode_texts
from svitt_ops.training.tasks.parts.checks import check_finite

COLUMNS = 6
PANEL = 1.4  # inches, of a picture's longer side
THINNEST = 0.25  # of that
LONGEST = 320  # pixels, of a picture as it is shown
SALIENT = 5  # words
HEAT = 0.55  # of the colours over a picture
MAPPED = ("word_maps", "class_attention", "salience")
"""What models of pictures have whose maps can be drawn: one of these."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A map over the picture."""

    label: str
    values: Tensor | None  # (rows, columns), at least 0; None: the picture alone


@dataclass(frozen=True, kw_only=True)
class Group:
    """Maps of one kind."""

    name: str
    panels: tuple[Panel, ...]
    keeps: bool = False
    """Maps are what stays of the picture, from 0 to 1; else what is hot in it, in colours."""


@dataclass(frozen=True, kw_only=True)
class PictureMaps:
    """A picture, its text, and the maps of both."""

    picture: Tensor  # uint8 (3, height, width)
    caption: str
    groups: tuple[Group, ...]


@torch.no_grad()
def find_maps(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    picture: Tensor,
    caption: str,
    *,
    text_length: int = 32,
    resize: str = "antialias",
    layer: int | None = None,
) -> PictureMaps:
    """Find where a model sees the pieces of a text in a picture.

    These are Grad-CAM maps of a fusion layer; where the model has them, the soft mask that each
    piece makes; and the pseudo-labels of the picture, with the attention that its patches, as
    queries of the same layer, pay to them. Of a model with two fusion streams it is the attention
    that the text's [CLS] pays to the patches, layer by layer.

    Of a model without fusion layers, such as COOKIE: how similar the picture's regions are to its
    embedding; and of the words that are most similar to the text's, how similar the regions are to
    each. Colours go from the least to the greatest similarity.

    Args:
        model: put into eval mode; has one of `MAPPED`.
        tokenizer: the model's.
        picture: uint8 (3, height, width).
        caption: the text.
        text_length: longest text, in tokens.
        resize: as in `to_pixel_values`.
        layer: as of `GroundsWords.grounding_layer`; that of soft masks is the configuration's.

    Raises:
        ValueError: the text has no words; `layer` is no fusion layer; maps are not finite.

    Source:
        COOKIE (ICCV 2021), figure 3, for the latter.
    """
    model.eval()
    device = next(model.parameters()).device
    encoded = encode_texts(tokenizer, [caption], text_length, "longest").values()
    ids, mask = (tensor.to(device) for tensor in encoded)
    pieces = tokenizer.convert_ids_to_tokens(ids[0].tolist())
    special = {*tokenizer.all_special_tokens} - {tokenizer.unk_token}
    places = [place for place, piece in enumerate(pieces) if piece not in special]
    if not places:
        raise ValueError(f"visualize: a text must have words, got {caption!r}")
    pixels = to_pixel_values(picture[None, None].to(device), model.config.image_size, resize=resize)
    if hasattr(model, "salience"):
        if layer is not None:
            raise ValueError(
                f"--layer: must be absent, {type(model).__name__} has no fusion layers, got {layer}"
            )
        found = _salience(model, pixels, ids, mask, pieces, places)
        return PictureMaps(picture=picture, caption=caption, groups=found)
    video = model.encode_video(pixels)
    words = model.encode_text(ids, mask).states
    if hasattr(model, "class_attention"):
        groups = [_class_attention(model, words, mask, video.states, layer)]
        return PictureMaps(picture=picture, caption=caption, groups=tuple(groups))
    groups = [_grounding(model, words, mask, video.states, layer, pieces, places)]
    if hasattr(model, "word_masks") and model.config.masks_by_words:
        masks, allowed = model.word_masks(words, ids, mask, video.states)
        chosen = [place for place in places if allowed[0, place]]
        kept = masks[0, chosen] if model.config.mask_keeps else 1 - masks[0, chosen]
        name = f"soft masks, layer {model.config.mask_layer}"
        group = _group(model, name, kept, [pieces[place] for place in chosen])
        groups.append(replace(group, keeps=True))
    if hasattr(model, "label_places"):
        groups.append(_labels(model, words, ids, mask, video, layer, pieces))
    return PictureMaps(picture=picture, caption=caption, groups=tuple(groups))


def beside(found: Iterable[PictureMaps]) -> PictureMaps:
    """Maps of several models of one picture, in one figure."""
    first, *others = found
    groups = [*first.groups]
    for maps in others:
        groups += [replace(group, name=f"beside: {group.name}") for group in maps.groups]
    return replace(first, groups=tuple(groups))


def _grounding(
    model: Any,
    words: Tensor,
    mask: Tensor,
    video: Tensor,
    layer: int | None,
    pieces: Sequence[str],
    places: Sequence[int],
) -> Group:
    """Grad-CAM of the whole text and of its pieces."""
    found = model.word_maps(words, mask, video, layer=layer)
    match = float(found.logits.softmax(1)[0, 1])
    labels = ["whole text", *(pieces[place] for place in places)]
    maps = torch.cat([found.texts, found.words[0, places]])
    trained = bool(model.config.weights["vtm"])
    name = f"words, layer {model.grounding_layer(layer)}"
    group = _group(model, name, maps, labels, trained=trained)
    panels = (Panel(label=f"match {match:.0%}", values=None), *group.panels)
    return replace(group, panels=panels)


def _salience(
    model: Any,
    pixels: Tensor,
    ids: Tensor,
    mask: Tensor,
    pieces: Sequence[str],
    places: Sequence[int],
) -> tuple[Group, ...]:
    """Salient regions, and the most salient words with the regions that are like them."""
    regions, words, between = (x[0] for x in model.salience(pixels, ids, mask))
    check_finite(words[places, None], "visualize: words", lambda k: pieces[places[k]])
    order = words[places].argsort(descending=True, stable=True)[:SALIENT].tolist()
    best = [places[k] for k in order]
    labels = [f"{pieces[place]} {float(words[place]):.2f}" for place in best]
    contrasts = [x - x.amin(1, keepdim=True) for x in (regions[None], between[best])]
    return (
        _group(model, "regions, like the picture as a whole", contrasts[0], ["all regions"]),
        _group(
            model, "words, most like the text as a whole; regions like each", contrasts[1], labels
        ),
    )


def _class_attention(
    model: Any, words: Tensor, mask: Tensor, video: Tensor, layer: int | None
) -> Group:
    """Attention of the text's [CLS] over the patches, in one fusion layer or in all."""
    first, last = model.config.fusion_layer, model.config.text_num_hidden_layers - 1
    if layer is not None and not first <= layer <= last:
        raise ValueError(
            f"{type(model).__name__}: layer must be a fusion layer, {first} to {last}, got {layer}"
        )
    shown = range(first, last + 1) if layer is None else [layer]
    maps = model.class_attention(words, mask, video)[0, :, 1:]
    score = float(model.match_scores(words, mask, video)[0])
    group = _group(
        model,
        "[CLS] of the text over the picture",
        maps[[number - first for number in shown]],
        [f"layer {number}" for number in shown],
    )
    picture = Panel(label=f"match score {score:.1f}", values=None)
    return replace(group, panels=(picture, *group.panels))


def _labels(
    model: Any,
    words: Tensor,
    ids: Tensor,
    mask: Tensor,
    video: Any,
    layer: int | None,
    pieces: Sequence[str],
) -> Group:
    """How patches attend to each pseudo-label, and how likely that is; the best comes first."""
    places, chosen = model.label_places(words, ids, mask, video.states)
    names = dict(zip(ids[0].tolist(), pieces, strict=True))
    found = list(dict.fromkeys(ids[0, places[0, chosen[0]]].tolist()))
    likely = model.concept_logits(video)[0].sigmoid()
    labels = [f"{names[piece]} {float(likely[piece]):.0%}" for piece in found]
    best = ids.new_tensor(found)
    layer = model.grounding_layer(layer)
    attention = model.attention_of_patches(video.states, words, mask, layer=layer)
    maps = (best[:, None] == ids[0]).to(attention.dtype) @ attention[0].T
    trained = bool(model.config.weights["psl"])
    return _group(model, f"pseudo-labels, layer {layer}", maps, labels, trained=trained)


def _group(
    model: Any, name: str, maps: Tensor, labels: Sequence[str], *, trained: bool = True
) -> Group:
    """Maps ``(k, n)`` and their labels."""
    check_finite(maps, f"visualize: {name}", labels.__getitem__)
    grids = maps.float().cpu().unflatten(1, (-1, model.config.grid_size))
    panels = tuple(
        Panel(label=label if grid.any() else f"{label} (0)", values=grid)
        for label, grid in zip(labels, grids, strict=True)
    )
    return Group(name=name if trained else f"{name} (not trained)", panels=panels)


def draw_maps(sample: PictureMaps, path: str | Path) -> Path:
    """Draw a picture under its text, and its maps, each over the picture.

    The colours of a map go from 0 to its own maximum; a soft mask fades what it takes away.
    """
    from matplotlib.figure import Figure

    picture = _shown(sample.picture)
    ratio = min(max(picture.shape[1] / picture.shape[0], THINNEST), 1 / THINNEST)
    across, down = PANEL * min(ratio, 1), PANEL * min(1 / ratio, 1)
    columns = min(COLUMNS, max(len(group.panels) for group in sample.groups))
    names = [f"{group.name}{'' if group.panels else ': none'}" for group in sample.groups]
    needed = max(text_width(name, LABEL) for name in names) + 2 * GAP
    width = max(columns * (PANEL + GAP) + GAP, MIN_WIDTH, needed)
    caption = wrapped(f"“{sample.caption}”", width - 2 * GAP)
    lines = caption.count("\n") + 1
    rows = [-(-len(group.panels) // columns) for group in sample.groups]
    row = CAPTION_LINE + down + GAP
    height = CAPTION_LINE * (lines + len(rows)) + GAP * (2 + len(rows)) + row * sum(rows)
    figure = Figure(figsize=(width, height), facecolor="white")

    def write(x: float, top: float, text: str, size: float, side: str) -> None:
        # A text is no formula, whatever dollars it has.
        place: dict[str, Any] = {"ha": side, "va": "top", "fontsize": size, "parse_math": False}
        figure.text(x / width, top / height, text, **place)

    top = height - GAP
    write(width / 2, top, caption, TITLE, "center")
    top -= CAPTION_LINE * lines
    for group, name, count in zip(sample.groups, names, rows, strict=True):
        top -= GAP
        write(GAP, top, name, LABEL, "left")
        top -= CAPTION_LINE
        for number, panel in enumerate(group.panels):
            line, column = divmod(number, columns)
            middle = GAP + column * (PANEL + GAP) + PANEL / 2
            label_top = top - line * row
            write(middle, label_top, _cut(panel.label), LABEL, "center")
            bottom = label_top - CAPTION_LINE - down
            box = (middle - across / 2) / width, bottom / height, across / width, down / height
            axis = figure.add_axes(box)
            axis.imshow(_over(picture, panel.values, group.keeps), aspect="auto")
            axis.set_axis_off()
        top -= row * count
    path = Path(path)
    figure.savefig(path, dpi=DPI)
    return path


def _shown(picture: Tensor) -> Tensor:
    """The picture as fp32 (height, width, 3) from 0 to 1, not larger than needed."""
    pixels = picture[None].float() / 255
    longest = max(pixels.shape[-2:])
    if longest > LONGEST:
        size = [max(1, round(side * LONGEST / longest)) for side in pixels.shape[-2:]]
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    return pixels[0].clamp(0, 1).permute(1, 2, 0)


def _over(picture: Tensor, values: Tensor | None, keeps: bool) -> Any:
    """The picture under a map, as an array."""
    if values is None:
        return picture.numpy()
    full = F.interpolate(values[None, None], picture.shape[:2], mode="nearest-exact")[0, 0]
    if keeps:
        kept = full[..., None]
        return (picture * kept + 1 - kept).numpy()
    from matplotlib import colormaps

    full = full / full.max().clamp(min=torch.finfo(full.dtype).tiny)
    heat = torch.from_numpy(colormaps["turbo"](full.numpy())[..., :3]).float()
    return ((1 - HEAT) * picture + HEAT * heat).numpy()


def _cut(label: str) -> str:
    """A label that is no wider than its panel."""
    if text_width(label, LABEL) <= PANEL:
        return label
    while len(label) > 1 and text_width(f"{label}…", LABEL) > PANEL:
        label = label[:-1]
    return f"{label}…"
