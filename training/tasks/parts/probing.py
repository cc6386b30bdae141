"""Does a model use time? Numbers with the frames in any order, and minimal pairs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from svitt_ops.training.data.sampling import ORDERS
from svitt_ops.training.tasks.parts.encoding import encode_gallery_texts, encode_gallery_videos
from svitt_ops.training.tasks.parts.gallery import Gallery, GalleryClips


def probe_orders(
    evaluate: Callable[[str, Mapping[str, str]], dict[str, Any]], score: str
) -> dict[str, Any]:
    """Numbers under every frame order, and what shuffling costs (normal - shuffled).

    A video that cannot be read in one order is left out of all, so that the numbers differ by the
    order alone; `skipped` of every order names it.

    Args:
        evaluate: the numbers of a frame order, without some videos, and what was `skipped`.
        score: the number that `delta` is of.
    """
    found: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    orders = list(ORDERS)
    while orders:
        order = orders.pop(0)
        result = evaluate(order, skipped)
        if new := result["skipped"]:
            skipped |= new
            orders += found  # again, without these
            found = {}
        found[order] = result
    found = {order: found[order] | {"skipped": skipped} for order in ORDERS}
    found["delta"] = found["normal"][score] - found["shuffled"][score]
    return found


def under_options(
    evaluate: Callable[[str, Mapping[str, str]], dict[str, Any]],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """The accuracies that `evaluate` finds, under `--probe` in every frame order."""
    return probe_orders(evaluate, "accuracy") if options.probe else evaluate("normal", {})


def by_order(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The numbers of every frame order of `probe_orders`; under "all" where it was one."""
    return {order: facts[order] for order in ORDERS if order in facts} or {"all": facts}


def delta_lines(facts: Mapping[str, Any]) -> list[str]:
    """What shuffling costs, where that was asked."""
    return [f"normal - shuffled: {facts['delta']:.1f}"] if "delta" in facts else []


@torch.inference_mode()
def pair_accuracy(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    gallery: Gallery,
    pairs: Tensor,
    *,
    order: str = "normal",
    draws: int = 1,
    text_length: int = 32,
    short_side: int | None = None,
    resize: str = "antialias",
) -> float:
    """Share of right choices between a video's own text and its minimal pair's, in percent.

    Each pair gives four choices: either video between both texts, either text between both videos.

    Args:
        model: to probe; put into eval mode.
        tokenizer: the model's.
        gallery: with one text per video, in the same order.
        pairs: int64 (pairs, 2): numbers of the videos that differ by the order alone.
        order: of the frames, see `sampling.reorder`.
        draws: how often to draw a "shuffled" order; the mean is returned.
        text_length: longest text, in tokens.
        short_side: as in `ClipSpec`.
        resize: as in `to_pixel_values`.
    """
    model.eval()
    texts = encode_gallery_texts(model, tokenizer, gallery.texts, text_length=text_length).embeds
    right = []
    for draw in range(draws):
        clips = GalleryClips(
            gallery, model.config.num_frames, order=order, seed=draw, short_side=short_side
        )
        encoded, unusable, _ = encode_gallery_videos(model, clips, keep_states=False, resize=resize)
        if unusable:
            raise ValueError(f"pairs: video {gallery.videos[unusable[0]]} cannot be read")
        right.append(pair_choices(texts @ encoded.embeds.T, pairs.to(texts.device)))
    return torch.stack(right).double().mean().item() * 100


def pair_choices(scores: Tensor, pairs: Tensor) -> Tensor:
    """Which of the four choices of each pair are right, bool (4, pairs).

    A tie is wrong, as is any choice with a score that is not finite.
    """
    scores = scores.masked_fill(~torch.isfinite(scores), torch.nan)  # which compares as nothing
    first, second = pairs.unbind(1)
    rows = []
    for own, other in ((first, second), (second, first)):
        rows.append(scores[own, own] > scores[other, own])  # this video: which text
        rows.append(scores[own, own] > scores[own, other])  # this text: which video
    return torch.stack(rows)
