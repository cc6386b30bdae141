"""Text-to-video and video-to-text retrieval: contrastive search, then match re-ranking."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from svitt_ops.models.parts.clips import Merge, join_clips, merge_clips
from svitt_ops.models.parts.configuration import VideoConfig
from svitt_ops.training.data.annotations import Entry
from svitt_ops.training.data.collate import Collator, count_cut
from svitt_ops.training.data.datasets import PairDataset
from svitt_ops.training.engine import recipes
from svitt_ops.training.engine.build import read_corpora
from svitt_ops.training.engine.loading import load_for_use
from svitt_ops.training.engine.settings import RunSettings
from svitt_ops.training.tasks import pretrain
from svitt_ops.training.tasks.parts.checks import check_finite
from svitt_ops.training.tasks.parts.encoding import (
    EncodedTexts,
    EncodedVideos,
    Progress,
    encode_gallery_texts,
    encode_gallery_videos,
)
from svitt_ops.training.tasks.parts.evaluation import Evaluation, Reading, evaluating
from svitt_ops.training.tasks.parts.false_texts import ChoiceCollator, ChoiceDataset
from svitt_ops.training.tasks.parts.folds import fold_gallery, mean_of_folds
from svitt_ops.training.tasks.parts.gallery import Gallery, GalleryClips, build_gallery
from svitt_ops.training.tasks.parts.probing import by_order, delta_lines, probe_orders
from svitt_ops.training.tasks.parts.ranks import recalls
from svitt_ops.training.tasks.parts.table import format_rows, left_out_lines
from svitt_ops.training.tasks.parts.training import clip_spec, collator
from svitt_ops.training.tasks.pretrain import read_examples

__all__ = ["read_examples"]  # and those that are written here
log = logging.getLogger(__name__)
HEAD = "retrieval"
OPTIONS = {
    **{"clips": 1, "strided": False, "merge": "logsumexp", "top_k": 128, "probe": False},
    **{"folds": 1, "ensemble": None},
}
INPUTS = (
    *("input_ids", "attention_mask", "pair_ids"),
    *("false_input_ids", "false_attention_mask"),
)


@dataclass
class Recipe(recipes.Recipe):
    """Fine-tuning for retrieval, by the contrastive and the matching loss."""

    task: str = "retrieval"
    evaluation: Evaluation = field(default_factory=Evaluation)
    """How `data.validation` is searched, and test videos by default."""


def build_dataset(
    recipe: recipes.Recipe, examples: Sequence[Entry], config: VideoConfig
) -> PairDataset:
    """The training pairs, with false texts for a model that chooses among them."""
    count = _false_texts(config)
    if not count:
        return pretrain.build_dataset(recipe, examples, config)
    spec, positives = clip_spec(recipe, config), recipe.data.positives
    return ChoiceDataset(examples, spec, seed=recipe.seed, positives=positives, false_texts=count)


def build_collator(
    recipe: recipes.Recipe, tokenizer: PreTrainedTokenizerBase, config: Any
) -> Collator:
    """The collator; no text is masked."""
    return collator(ChoiceCollator if _false_texts(config) else Collator, recipe, tokenizer)


def model_inputs(
    recipe: recipes.Recipe, config: VideoConfig, batch: dict[str, Any]
) -> dict[str, Any]:
    """Pictures of the model's size, and texts."""
    return pretrain.model_inputs(recipe, config, batch, INPUTS)


def _false_texts(config: Any) -> int:
    return getattr(config, "false_texts", 0)


def read_validation(recipe: recipes.Recipe) -> Gallery:
    """The videos and texts to find each other."""
    return build_gallery(read_corpora(recipe.data.validation, recipe.data, "validation"))


def validate(
    recipe: Recipe, model: Any, tokenizer: PreTrainedTokenizerBase, examples: Gallery
) -> dict[str, float]:
    """Recalls; the score is the mean of all of them."""
    settings, reading = recipe.evaluation, Reading.of_recipe(recipe)
    found = _search(model, tokenizer, examples, settings, reading)
    tables = {key: found[key] for key in ("text_to_video", "video_to_text")}
    numbers = {f"{key}_{k}": x for key, table in tables.items() for k, x in table.items()}
    return {"score": found["mean"], **numbers}


def retrieval(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    clips: GalleryClips,
    *,
    text_length: int = 32,
    settings: Evaluation | None = None,
    rerank: bool | None = None,
    bf16: bool = False,
    workers: int = 0,
    progress: Progress | None = None,
    resize: str = "antialias",
    keep_scores: bool = False,
) -> dict[str, Any]:
    """Evaluate retrieval in both directions.

    Scores are compared in fp32, whatever the towers compute in: rounded scores tie, and ties count
    against the query (see `best_ranks`).

    Args:
        model: in whatever mode; evaluated in eval mode.
        tokenizer: the model's.
        clips: what to search.
        text_length: longest text, in tokens.
        settings: candidates, merging of clips, batch size.
        rerank: whether the match head ranks the best candidates anew; default: if it was trained.
        bf16: run the towers and the fusion layers under autocast.
        workers: processes that decode.
        progress: wraps the loops, such as tqdm; called with the iterable and desc=.
        resize: as in `to_pixel_values`.
        keep_scores: whether to return the similarities, too, as `scores` (texts, videos).

    Returns:
        Percentages `text_to_video` and `video_to_text`, each {"R1", "R5", "R10", "mean"},
        `mean` of both, and `rsum`, the sum of their six recalls; `contrastive`: the same before
        re-ranking; `videos`, `texts`, `skipped`, and `texts_cut`, the texts longer than
        `text_length`.

    Raises:
        ValueError: no video can be read; embeddings or scores are not finite.
    """
    settings = settings or Evaluation()
    if rerank is None:
        rerank = model.config.weights.get("vtm", 0) > 0
    rerank = rerank and settings.top_k > 0
    with evaluating(model, bf16=bf16) as device:
        videos, unusable, skipped = encode_gallery_videos(
            model,
            clips,
            batch_size=settings.batch_size,
            workers=workers,
            keep_states=rerank,
            progress=progress,
            resize=resize,
        )
        gallery = clips.gallery.without(unusable)
        if len(set(gallery.video_groups)) < 2:
            log.warning(
                "retrieval: all %d videos belong together, so that any model gets 100 %%",
                len(gallery.videos),
            )
        texts = encode_gallery_texts(
            model, tokenizer, gallery.texts, text_length=text_length, keep_states=rerank
        )
        with torch.autocast(device.type, enabled=False):
            scores = texts.embeds @ videos.embeds.T
        found: dict[str, Any] = {"contrastive": recalls(scores, gallery)}
        if rerank:
            arguments = (model, scores, gallery, texts, videos, settings)
            ranked = _rerank(*arguments, False, progress)
            # Where all pairs are ranked anew, both ways have the same scores.
            whole = settings.top_k >= max(scores.shape)
            back = ranked if whole else _rerank(*arguments, True, progress)
            found |= recalls(ranked, gallery, back)
        else:
            found |= found["contrastive"]
    counts = {"videos": len(gallery.videos), "texts": len(gallery.texts)}
    cut = {"texts_cut": count_cut(tokenizer, gallery.texts, text_length)}
    kept = {"scores": scores} if keep_scores else {}
    return found | counts | cut | kept | {"skipped": dict(skipped.reasons)}


def probe_retrieval(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    gallery: Gallery,
    *,
    settings: Evaluation | None = None,
    seed: int = 0,
    short_side: int | None = None,
    sampling: str = "middle",
    **options: Any,
) -> dict[str, Any]:
    """Retrieval under every frame order, and what shuffling costs (normal - shuffled).

    A video that cannot be read in one order is left out of all, so that the numbers differ by the
    order alone; `skipped` of every order names it.
    """
    settings = settings or Evaluation()

    def run(order: str, without: Mapping[str, str]) -> dict[str, Any]:
        clips = GalleryClips(
            gallery.without([k for k, v in enumerate(gallery.videos) if v in without]),
            model.config.num_frames,
            num_clips=settings.clips,
            strided=settings.strided,
            short_side=short_side,
            order=order,
            seed=seed,
            features=model.config.given_features,
            sampling=sampling,
        )
        return retrieval(model, tokenizer, clips, settings=settings, **options)

    return probe_orders(run, "mean")


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Entry],
    reading: RunSettings,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """What `retrieval`, or with `--probe` `probe_retrieval`, finds in a corpus."""
    gallery, settings = build_gallery(examples), Evaluation.of(options)
    how = Reading.of(reading, options)
    if options.probe and options.folds > 1:
        raise ValueError("--folds: must be 1 with --probe")
    members = [(model, tokenizer, how)]
    if options.ensemble:
        if options.probe:
            raise ValueError("--probe: must be absent with --ensemble")
        members.append(_second(options, model))
        if settings.top_k and any(x.config.weights.get("vtm", 0) for x, *_ in members):
            log.warning("--ensemble: ranks by similarities alone, no pair by fusion layers")
    if not options.probe:
        parts = fold_gallery(gallery, options.folds)
        return mean_of_folds([search_together(members, part, settings) for part in parts])
    more = {"short_side": how.short_side, "sampling": how.test_sampling, **_options(how)}
    return probe_retrieval(model, tokenizer, gallery, settings=settings, **more)


def search_together(
    members: Sequence[tuple[Any, PreTrainedTokenizerBase, Reading]],
    gallery: Gallery,
    settings: Evaluation,
) -> dict[str, Any]:
    """What `retrieval` finds by the mean of the similarities of several models.

    Args:
        members: each with its tokenizer and how it reads; of more than one, none ranks anew.
        gallery: what to search.
        settings: as of `retrieval`.

    Raises:
        ValueError: as `retrieval`, or the models can read different videos.
    """
    if len(members) == 1:
        return _search(*members[0][:2], gallery, settings, members[0][2])
    total: Tensor | None = None
    skipped: dict[str, str] = {}
    alone = replace(settings, top_k=0)
    for model, tokenizer, reading in members:
        found = _search(model, tokenizer, gallery, alone, reading, keep_scores=True)
        scores = found.pop("scores").cpu()
        if total is not None and found["skipped"].keys() != skipped.keys():
            raise ValueError("retrieval: the models of an ensemble must read the same videos")
        share, skipped = scores / len(members), found["skipped"]
        total = share if total is None else total + share
    assert total is not None
    kept = gallery.without([k for k, v in enumerate(gallery.videos) if v in skipped])
    together = recalls(total, kept)
    return {**found, **together, "contrastive": together}


def _second(
    options: argparse.Namespace, first: Any
) -> tuple[Any, PreTrainedTokenizerBase, Reading]:
    """The other model of an ensemble, on the device of the first."""
    try:
        model, tokenizer, found, _ = load_for_use(
            options.ensemble,
            head=HEAD,
            frames=options.frames,
            text_length=options.text_length,
            resize=options.resize,
        )
    except ValueError as error:
        raise ValueError(f"--ensemble: {error}") from error
    return model.to(next(first.parameters()).device), tokenizer, Reading.of(found, options)


def _search(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    gallery: Gallery,
    settings: Evaluation,
    reading: Reading,
    **more: Any,
) -> dict[str, Any]:
    clips = GalleryClips(
        gallery,
        model.config.num_frames,
        num_clips=settings.clips,
        strided=settings.strided,
        short_side=reading.short_side,
        features=model.config.given_features,
        sampling=reading.test_sampling,
    )
    return retrieval(model, tokenizer, clips, settings=settings, **_options(reading), **more)


def _options(reading: Reading) -> dict[str, Any]:
    names = ("text_length", "resize", "bf16", "workers", "progress")
    return {name: getattr(reading, name) for name in names}


def render(facts: dict[str, Any]) -> str:
    """Recalls of `retrieval`, or of every frame order of `probe_retrieval`, and what was lost."""
    orders = by_order(facts)
    rows: list[tuple[str, ...]] = [("", "R@1", "R@5", "R@10", "mean")]
    for order, found in orders.items():
        for name, key in (("text to video", "text_to_video"), ("video to text", "video_to_text")):
            label = name if found is facts else f"{order}, {name}"
            rows.append((label, *(f"{found[key][k]:.1f}" for k in ("R1", "R5", "R10", "mean"))))
            if found is facts and found["contrastive"][key] != found[key]:
                plain = found["contrastive"][key]
                row = (f"{plain[k]:.1f}" for k in ("R1", "R5", "R10", "mean"))
                rows.append(("  before re-ranking", *row))
    first = next(iter(orders.values()))
    lines = [f"{first['texts']} texts, {first['videos']} videos", *format_rows(rows)]
    if first.get("folds", 1) > 1:
        lines[0] += f", the mean of {first['folds']} parts"
    if "rsum" in first:
        lines.append(f"Rsum {first['rsum']:.1f}")
    lines += delta_lines(facts)
    if cut := first.get("texts_cut"):
        lines.append(f"{cut} of {first['texts']} texts are longer than the text length, and cut")
    return "\n".join([*lines, *left_out_lines(first["skipped"])])


def _rerank(
    model: Any,
    scores: Tensor,
    gallery: Gallery,
    texts: EncodedTexts,
    videos: EncodedVideos,
    settings: Evaluation,
    by_video: bool,
    progress: Progress | None,
) -> Tensor:
    """Scores (texts, videos), of each query's best candidates what `MatchesPairs` ranks by."""
    assert videos.states is not None
    queries = scores.T if by_video else scores
    candidates = queries.topk(min(settings.top_k, queries.shape[1]), dim=1).indices
    chunk = max(1, settings.batch_size // videos.states.shape[1])
    what = "video to text" if by_video else "text to video"
    shown = candidates if progress is None else progress(candidates, desc=f"re-rank {what}")
    rows = []
    for query, chosen in enumerate(shown):
        parts = []
        for part in chosen.split(chunk):
            other = torch.full_like(part, query)
            text, video = (part, other) if by_video else (other, part)
            parts.append(_match(model, texts, videos.states, text, video, settings.merge))
        rows.append(torch.cat(parts))
    match = torch.stack(rows)
    names = gallery.videos if by_video else gallery.texts
    check_finite(match, f"retrieval: match scores, {what}", lambda k: f"those of {names[k]!r}")
    # The others keep their order, below. In fp64: of the 24 bits of an fp32 score of 0.9, 17 are
    # left beside a match score of 100, and scores that differ in the others would tie.
    match = match.double() + model.prior_scores(queries.gather(1, candidates))
    below = queries.amax(1, keepdim=True) - match.amin(1, keepdim=True) + 1
    merged = (queries.double() - below).scatter(1, candidates, match)
    return merged.T if by_video else merged


def _match(
    model: Any,
    texts: EncodedTexts,
    states: Tensor,
    text: Tensor,
    video: Tensor,
    merge: Merge,
) -> Tensor:
    """Match scores of pairs, over all clips of the videos."""
    assert texts.states is not None
    clips = join_clips(states[video.cpu()], merge)
    num_clips = clips.shape[1]
    pairs = clips.flatten(0, 1).to(texts.states.device)
    rows = text.repeat_interleave(num_clips)
    scores = model.match_scores(texts.states[rows], texts.mask[rows], pairs)
    return merge_clips(scores.unflatten(0, (-1, num_clips)), merge, 1)
