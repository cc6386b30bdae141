"""COOKIE's parts against what the public code of each computes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from svitt_ops.models.cookie.hashing import (
    SHARPNESS,
    HashLayer,
    centre_loss,
    hadamard,
    hash_centres,
    hash_targets,
    pairwise_loss,
    quantisation_loss,
)
from svitt_ops.models.cookie.losses import triplet_loss
from svitt_ops.models.cookie.pooling import TEMPERATURE, GeneralizedPooling, positions

FOLDER = Path(__file__).parents[2] / "golden" / "cookie"
CASE = json.loads((FOLDER / "case.json").read_text())


def load(name: str) -> dict[str, Tensor]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file}


def close(found: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_gpo() -> None:
    case, facts = load("gpo"), CASE["gpo"]
    assert facts["temperature"] == TEMPERATURE
    pool = GeneralizedPooling(facts["d_pe"])
    state = {k.removeprefix("state/"): x for k, x in case.items() if k.startswith("state/")}
    pool.load_state_dict(state)
    features, lengths = case["features"].requires_grad_(), case["lengths"]
    close(positions(len(case["pe"]), facts["d_pe"]), case["pe"])
    close(pool.weights(lengths)[..., None], case["pool_weights"])
    assert (pool.weights(lengths)[case["pool_weights"][..., 0] == 0] == 0).all()
    pooled = pool(features, lengths)
    close(pooled, case["pooled"])
    close(torch.nn.functional.normalize(pooled), case["pooled_l2norm"])
    (pooled * case["grad_weight"]).sum().backward()
    for name, parameter in pool.named_parameters():
        assert parameter.grad is not None
        close(parameter.grad, case[f"grad/{name}"], 1e-4)
    assert features.grad is not None
    found, wanted = features.grad.clone(), case["grad/features"]
    tie = found[0, 1:3, 0].sum(), wanted[0, 1:3, 0].sum()
    torch.testing.assert_close(*tie)
    found[0, 1:3, 0] = wanted[0, 1:3, 0]
    close(found, wanted, 1e-4)
    close(pool(features), case["pooled_full_length"])
    full = pool.weights(torch.tensor([features.shape[1]]))[0][:, None]
    close(full, case["pool_weights_full_length"])


@pytest.mark.parametrize(("key", "negatives"), [("hardest", "hardest"), ("sum", "all")])
def test_vsepp(key: str, negatives: str) -> None:
    case = load("vsepp")
    images, captions = (case[name].clone().requires_grad_() for name in ("images", "captions"))
    loss = triplet_loss(images, captions, CASE["margin"], negatives=negatives)  # type: ignore[arg-type]
    close(loss, case[f"{key}/loss"])
    loss.backward()
    for found, name in ((images, "images"), (captions, "captions")):
        assert found.grad is not None
        close(found.grad, case[f"{key}/grad_{name}"], 1e-4)


def test_centres() -> None:
    case = load("csq_centres")
    for bits, classes in ((16, 21), (32, 20), (64, 80)):
        wanted = case[f"hadamard_{bits}bit_{classes}class"].float()
        assert torch.equal(hash_centres(bits, classes), wanted)
        apart = (bits - wanted @ wanted.T) / 2
        assert (apart[~torch.eye(classes, dtype=torch.bool)] >= bits / 2).all()
    # More classes than rows: there the tutorial silently gives fewer, here others are drawn.
    rows = int(case["released_rows_16bit_80class"])
    assert rows == 32 and torch.equal(hash_centres(16, rows)[:16], hadamard(16))
    found = hash_centres(16, 80)
    drawn = case["bernoulli_16bit_12class"].float()
    assert found.shape == (80, 16) and (found.abs() == 1).all()
    assert (found.sum(1) == 0).all() and (drawn.sum(1) == 0).all()
    mine = hash_centres(16, len(drawn), "random")
    above = torch.ones(len(drawn), len(drawn)).triu(1) > 0
    apart = ((16 - mine @ mine.T) / 2)[above]
    assert sorted(((16 - drawn @ drawn.T) / 2)[above].tolist()) == sorted(
        case["bernoulli_pairwise_hamming"].tolist()
    )
    assert apart.min() >= case["bernoulli_pairwise_hamming"].min()
    assert torch.equal(mine, hash_centres(16, len(drawn), "random"))


def test_csq_losses() -> None:
    case, facts = load("csq_loss"), CASE["csq"]
    centres, labels = case["centres"].float(), case["labels"]
    random_centre = 2 * case["random_centre_01"].float() - 1
    targets = hash_targets(centres, labels, random_centre)
    assert torch.equal(targets, case["targets"].float())
    other = hash_targets(centres, labels, -random_centre)
    assert torch.equal(targets != other, case["ties"])
    assert SHARPNESS / facts["bits"] == pytest.approx(float(case["pairwise_sigmoid_param"]))
    codes = case["codes"]
    close(centre_loss(codes, targets), case["center_loss"])
    close(pairwise_loss(codes, labels), case["pairwise_loss"])
    close(quantisation_loss(codes), case["quantisation_loss"])
    for name, with_pairs, key in (
        ("three_part", True, "loss_three_part"),
        ("two_part", False, "loss_two_part"),
        ("incomplete_batch", False, "loss_incomplete_batch"),
    ):
        given = codes.clone().requires_grad_()
        loss = facts["lambda0"] * centre_loss(given, targets)
        loss = loss + facts["lambda2"] * quantisation_loss(given)
        if with_pairs:
            loss = loss + facts["lambda1"] * pairwise_loss(given, labels)
        close(loss, case[key].float())
        loss.backward()
        assert given.grad is not None
        close(given.grad, case[f"grad_{name}"], 1e-4)


def test_hash_layer() -> None:
    case = load("csq_loss")
    state = {k.removeprefix("hash_layer/"): x for k, x in case.items() if "hash_layer/" in k}
    layer = HashLayer(10, 16, dropout=0.5).eval()
    layer.load_state_dict(state)
    close(layer(case["hash_layer_input"]), case["hash_layer_output"])
