"""Inputs, weights and results of the authors' own code, and models with these weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import svitt_ops as so
from svitt_ops.models.parts import pairs
from svitt_ops.models.parts.key_maps import placed, rename
from svitt_ops.models.parts.released import OFFICIAL_CHECKPOINT
from svitt_ops.models.parts.released_images import IMAGE_CHECKPOINT
from svitt_ops.models.simla.convert import RULES as OF_SIMLA
from svitt_ops.models.singularity.convert import RULES
from svitt_ops.models.systems import load_system

FOLDER = Path(__file__).parents[1] / "golden"
OFFICIAL = "svitt-official"
MERGES = {"mean": "mean", "max": "max", "lse": "logsumexp"}
MASKED = {"mlm_input_ids": "choice/mlm_input_ids", "mlm_labels": "choice/mlm_labels"}
QUESTIONS = {"input_ids": "in/question_ids", "attention_mask": "in/question_mask"}
ANSWERS = {
    "answer_ids": "in/answer_ids",
    "answer_mask": "in/answer_mask",
    "answers_per_question": "in/answers_per_question",
    "answer_weights": "in/weights",
}
LIST = {"answer_ids": "in/rank/answer_ids", "answer_mask": "in/rank/answer_mask"}
NAMES = {
    "svitt": OFFICIAL_CHECKPOINT,
    "singularity": RULES,
    "albef": IMAGE_CHECKPOINT,
    "simla": OF_SIMLA,
}


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

    @property
    def system(self) -> str:
        return str(self.meta["system"])

    def target(self, name: str, config: Any) -> str | None:
        """Our name of one of the authors' tensors; None or "" where there is none."""
        return placed(rename(name, NAMES[self.system]), config)

    def config(self, **changes: Any) -> Any:
        return load_system(self.system).config(**{**self.fields(), **changes})

    def fields(self) -> dict[str, Any]:
        """Of the configuration."""
        given = self.meta["config"]
        vision, text, sparse = given["vision"], given["text"], given.get("sparse")
        if "num_frames" not in given:
            return self._image_fields(given, vision, text)
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
        return values

    def _image_fields(self, given: Any, vision: Any, text: Any) -> dict[str, Any]:
        """Of the configuration of a system with a momentum twin."""
        of_simla: dict[str, Any] = {}
        if self.system == "simla":
            of_simla["unpaired_layers"] = given.get("unshared_layers", 0)
            of_simla["type_vocab_size"] = 2 if text.get("token_type_embeddings") is True else 0
            of_simla["masked_patches"] = 16
            if "mim_vocab" in given:
                of_simla["image_vocab_size"] = given["mim_vocab"]
        return of_simla | {
            "image_size": given["image_size"],
            "patch_size": given["patch_size"],
            "hidden_size": vision["width"],
            "num_attention_heads": vision["heads"],
            "num_hidden_layers": vision["layers"],
            "intermediate_size": vision["width"] * vision["mlp_ratio"],
            "text_hidden_size": text["width"],
            "text_num_attention_heads": text["heads"],
            "text_num_hidden_layers": text["layers"],
            "fusion_layer": text.get("fusion_layer", 0),
            "text_intermediate_size": text["intermediate"],
            "vocab_size": text["vocab"],
            "max_position_embeddings": text["max_positions"],
            "projection_dim": given["embed_dim"],
            "decoder_layers": given.get("decoder_layers", 6),
            "image_mean": [0.5] * 3,  # the cases hold what the tower gets
            "image_std": [0.5] * 3,
            "momentum": given["momentum"],
            "queue_size": given["queue"],
            "alpha": given["alpha"],
        }

    def model(self, task: str = "pretraining", **changes: Any) -> Any:
        """Loaded as the authors' file is, with the case's patterns if it has any."""
        load = load_system(self.system).load_official
        assert load is not None
        found = load({"model": self.state()}, self.config(**changes), task=task)
        if "choice/blocks/0" in self.arrays:
            hand_over_patterns(found, self)
        return found

    def close(self, found: Tensor, key: str, tolerance: float = 2e-5) -> None:
        wanted = self[key].to(found.dtype)
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max(), key

    def gradients_close(self, found: Any, prefix: str = "grad/", tolerance: float = 1e-4) -> int:
        """Compare the gradients that the case has, by the authors' names; returns how many."""
        count = 0
        for key in self.arrays:
            name = key.removeprefix(prefix)
            target = self.target(name, found.config)
            if key.startswith(prefix) and target:
                grad = found.get_parameter(target).grad
                self.close(grad[0] if target == "temperature" else grad, key, tolerance)
                count += 1
        return count


def hand_over_patterns(found: Any, case: Case) -> None:
    """Make the video tower take the case's blocks."""
    tower, layer = found.video, [0]

    def layout(count: int, device: Any, generator: Any) -> so.BlockLayout:
        mask = case[f"choice/blocks/{layer[0] % len(tower.layers)}"].bool()
        layer[0] += 1
        size = found.config.block_size
        whole = mask.shape[0] * size
        tokens = whole if found.config.compat else count
        return so.BlockLayout.from_mask(mask, num_tokens=tokens, block_size=size)

    tower._layout = layout


def hand_over_negatives(patch: pytest.MonkeyPatch, case: Case, *names: str) -> None:
    """Make the matching loss take the case's wrong clips and texts."""
    wrong = tuple(case[f"choice/{name}"] for name in names)
    patch.setattr(pairs, "draw_negatives", lambda *_, **__: wrong)


def inputs(case: Case, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Arguments of a model: which array each is."""
    return {name: case[key] for name, key in names.items()}


def same_best(case: Case, similarity: Tensor, scores: Tensor, key: str) -> None:
    """The authors re-rank the best by similarity; the others have -100."""
    best = similarity.topk(int(case["in/eval/k_test"]), 1).indices
    ranked = torch.full_like(scores, -100).scatter(1, best, scores.gather(1, best))
    wanted, scored = case[key], case[key] != -100
    assert torch.equal(ranked != -100, scored)
    assert (ranked - wanted).abs().max() <= 2e-5 * wanted[scored].abs().max()


def check_answers(model: Any, case: Case, states: Tensor) -> None:
    """The logits of the decoder, up to padding."""
    rows = torch.arange(len(states)).repeat_interleave(case["in/answers_per_question"])
    ids, real = case["in/answer_ids"], case["in/answer_mask"] != 0
    ignored = case["in/question_mask"][rows] == 0
    decoded = model.decoder(ids, states[rows], ignored)
    logits = model.token_head(decoded, model.decoder.embeddings.word.weight)
    case.arrays["real logits"] = case["out/train/answer_logits"][real]
    case.close(logits[real], "real logits")


def check_ranking(case: Case, found: Any, where: str) -> None:
    assert torch.equal(found.answers, case[f"{where}topk_ids"])
    case.close(found.scores.softmax(-1), f"{where}topk_probs", 1e-4)


def check_corrected(case: Case, found: Any, which: str) -> None:
    """Likelihoods of the answers whose first tokens are likeliest, best first."""
    where = f"out/rank/{which}"
    assert torch.equal(found.answers, case[f"{where}corrected_ids"])
    ids, order = case[f"{where}preselected_ids"].sort(1)
    places = found.answers.sort(1)
    assert torch.equal(places.values, ids)
    case.arrays["ordered"] = case[f"{where}preselected_loglik"].gather(1, order)
    case.close(found.scores.gather(1, places.indices), "ordered")
