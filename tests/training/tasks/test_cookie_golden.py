"""MAP, recalls and correlations against what the public code of each computes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from svitt_ops.training.tasks.parts.average_precision import average_precisions, signs
from svitt_ops.training.tasks.parts.correlation import mean_ranks, pearson, spearman
from svitt_ops.training.tasks.parts.folds import fold_gallery, mean_of_folds
from svitt_ops.training.tasks.parts.gallery import Gallery
from svitt_ops.training.tasks.parts.ranks import best_ranks, recalls
from svitt_ops.training.tasks.text_similarity import similarity_scores

FOLDER = Path(__file__).parents[2] / "golden" / "cookie"
CAPTIONS = 5


def load(name: str) -> dict[str, Tensor]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file}


def gallery(texts: list[int]) -> Gallery:
    """Videos, and texts by the numbers of theirs."""
    count = max(texts) + 1
    return Gallery(
        videos=[str(k) for k in range(count)],
        kinds=["image"] * count,
        video_groups=list(range(count)),
        texts=[str(k) for k in range(len(texts))],
        text_groups=texts,
    )


def five(images: int) -> Gallery:
    return gallery([k // CAPTIONS for k in range(CAPTIONS * images)])


def metrics(scores: Tensor, of: Gallery, *, whole: bool = True) -> list[float]:
    """Of scores (images, texts), in the order of the case; medians are whole ranks or not."""
    found = recalls(scores.T, of)
    groups = torch.tensor(of.video_groups)[:, None] == torch.tensor(of.text_groups)
    row: list[float] = []
    for key, ranks in (
        ("video_to_text", best_ranks(scores, groups)),
        ("text_to_video", best_ranks(scores.T, groups.T)),
    ):
        table = found[key]
        row += [table["R1"], table["R5"], table["R10"]]
        median = float(np.median(ranks))
        row += [(median // 1 if whole else median) + 1, ranks.double().mean().item() + 1]
    return [*row, found["video_to_text"]["mean"], found["text_to_video"]["mean"], found["rsum"]]


def test_recalls_of_five_captions() -> None:
    case = load("recall_5captions")
    sims, whole = case["sims"], five(60)
    groups = torch.tensor(whole.video_groups)[:, None] == torch.tensor(whole.text_groups)
    assert torch.equal(best_ranks(sims, groups), case["i2t_ranks"])
    assert torch.equal(best_ranks(sims.T, groups.T), case["t2i_ranks"])
    assert metrics(sims, whole) == pytest.approx(case["full_metrics"].tolist())
    parts = fold_gallery(whole, 5)
    found = []
    for number, part in enumerate(parts):
        rows = [int(k) for k in part.videos]
        columns = [int(k) for k in part.texts]
        assert rows == list(range(12 * number, 12 * (number + 1)))
        block = sims[rows][:, columns]
        assert metrics(block, part) == pytest.approx(case["fold_metrics"][number].tolist())
        counts = {"videos": 12, "texts": 60, "texts_cut": 0, "skipped": {}}
        found.append(recalls(block.T, part) | counts)
    mean, wanted = mean_of_folds(found), case["fold_mean"].tolist()
    assert mean["rsum"] == pytest.approx(wanted[-1])
    assert mean["video_to_text"]["R1"] == pytest.approx(wanted[0])
    assert mean["text_to_video"]["R10"] == pytest.approx(wanted[7])


def test_recalls_of_an_ensemble() -> None:
    case = load("recall_5captions")
    both = (case["sims"][:20, :100] + case["sims_second"]) / 2
    assert metrics(both, five(20)) == pytest.approx(case["ensemble_metrics"].tolist())


def test_recalls_of_videos() -> None:
    case = load("recall_video")
    found = metrics(case["scores"], gallery(case["text_video_ids"].tolist()), whole=False)
    assert found[:5] == pytest.approx(case["v2t"].tolist())
    assert found[5:10] == pytest.approx(case["t2v"].tolist())
    assert found[-1] == pytest.approx(float(case["rsum"]))


def test_average_precision() -> None:
    case = load("csq_map")
    codes = case["query_codes"], case["query_labels"]
    base = case["database_codes"], case["database_labels"]
    top_k = int(case["R"])
    found, counted = average_precisions(*codes, *base, top_k)
    torch.testing.assert_close(found, case["ap"])
    assert found.mean().item() == pytest.approx(float(case["map"]))
    assert 0 in found
    skipped = sorted(set(range(len(codes[0]))) - set(counted.tolist()))
    assert skipped == case["skipped_queries"].tolist()
    all_queries = found.sum().item() / len(codes[0])
    assert all_queries == pytest.approx(float(case["map_over_all_queries"]))
    order = (signs(codes[0]) @ signs(base[0]).T).argsort(dim=1, descending=True, stable=True)
    assert torch.equal(order.T, case["order_stable"])
    for wrong in (0, len(base[0]) + 1):
        with pytest.raises(ValueError, match=rf"top_k must be 1 to 60, .* got {wrong}"):
            average_precisions(*codes, *base, wrong)
    none = torch.zeros_like(codes[1])
    assert average_precisions(codes[0], none, *base, top_k)[0].numel() == 0


def test_correlations() -> None:
    case = load("sts")
    sets = []
    for number in range(3):
        key = f"set{number}/"
        a, b, gold = (case[key + name] for name in ("a", "b", "gold"))
        cosine = torch.cosine_similarity(a.double(), b.double())
        rounded = 0.05 if number == 2 else 1e-12  # the last one's, so that some tie
        torch.testing.assert_close(cosine, case[key + "cosine"], atol=rounded, rtol=0)
        cosine = case[key + "cosine"]
        found = similarity_scores(cosine, gold)
        assert found["pearson"] == pytest.approx(100 * float(case[key + "pearson"]))
        assert found["spearman"] == pytest.approx(100 * float(case[key + "spearman"]))
        assert found["score"] == pytest.approx(float(case[key + "score"]))
        sets.append((cosine, gold, found))
    cosine, gold = (torch.cat([one[k] for one in sets]) for k in (0, 1))
    for name, correlation in (("pearson", pearson), ("spearman", spearman)):
        assert correlation(cosine, gold) == pytest.approx(float(case[f"concatenated/{name}"]))
        mean = sum(one[2][name] for one in sets) / 300
        assert mean == pytest.approx(float(case[f"mean_of_sets/{name}"]))


def test_what_has_no_correlation() -> None:
    assert mean_ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]
    x = torch.arange(3.0)
    for y in (torch.ones(3), torch.tensor([1.0, 1.0, 1.0])):
        with pytest.raises(ValueError, match="there is none, all 3 numbers of a vector are equal"):
            pearson(x, y)
    for scale in (1e300, 1e-300):  # whose squares are no numbers
        y = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64) * scale
        assert pearson(x, y) == pytest.approx(0.5)
    for y in (torch.arange(2.0), torch.ones(1, 3)):
        with pytest.raises(ValueError, match="must be of two vectors of one length, at least 2"):
            spearman(x, y)
    with pytest.raises(ValueError, match="at least 2"):
        pearson(x[:1], x[:1])
