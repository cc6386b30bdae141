"""Learning rates and weight decay by parameter, and the rate over the steps."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from svitt_ops.models.parts.key_maps import placed, rename
from svitt_ops.models.scl import SYSTEM, SCLConfig
from svitt_ops.models.scl.convert import rules_of, unpack
from svitt_ops.training.engine.groups import parameter_groups
from svitt_ops.training.engine.recipes import Optimizer
from svitt_ops.training.engine.schedule import learning_rate_factor

CASE = Path(__file__).parents[2] / "golden" / "scl" / "case.json"
SCALES = {"fusion": 5.0, "match_head": 7.0, "token_head": 7.0, "class_head": 7.0}
SMALL = {
    **{"image_size": 24, "patch_size": 6, "hidden_size": 32, "num_hidden_layers": 3},
    **{"num_attention_heads": 2, "intermediate_size": 128, "vocab_size": 97},
    **{"text_hidden_size": 32, "text_num_hidden_layers": 4, "fusion_layer": 2},
    **{"text_num_attention_heads": 2, "text_intermediate_size": 64, "answers": ["a", "b"]},
}


def rates(model: Any, settings: Optimizer) -> dict[str, tuple[float, float]]:
    """Rate and decay of every parameter, in terms of the settings'."""
    found = {}
    for group in parameter_groups(model, settings):
        for parameter in group["params"]:
            rate = group.get("lr", settings.lr) / settings.lr
            found[parameter] = (rate, group.get("weight_decay", settings.weight_decay))
    return {name: found[p] for name, p in model.named_parameters() if p in found}


def ours(theirs: str, task: str, config: SCLConfig) -> list[str]:
    """Our names of one of the authors' parameters."""
    rows = 18 if "in_proj" in theirs else 17  # of queries, keys and values; of [CLS] and 16 places
    names = unpack({theirs: torch.zeros(rows, 1)}, config)
    return [x for name in names if (x := placed(rename(name, rules_of(task)), config))]


def test_rates_of_scl_are_the_authors() -> None:
    """And its decay, but for norms' weights and the temperature, which theirs forgot."""
    wanted = json.loads(CASE.read_text())["param_groups_lr_multiplier_and_weight_decay"]
    left, differing, config = set(wanted), set(), SCLConfig(**SMALL)
    for task, kind in SYSTEM.models.items():
        model = kind(config)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        scales = {key: x for key, x in SCALES.items() if any(n.startswith(key) for n in names)}
        found = rates(model, Optimizer(lr=1e-5, weight_decay=0.01, lr_scales=scales))
        assert found.keys() == set(names)
        for theirs, (rate, decay) in wanted.items():
            for name in ours(theirs, task, config):
                if name in found:
                    assert found[name][0] == pytest.approx(rate), name
                    left.discard(theirs)
                    differing |= {theirs} if found[name][1] != decay else set()
    without = r"text_transformer\.pooler\..+|.+\.visual_mask_token"  # no part of ours
    assert all(re.fullmatch(without, name) for name in left)
    norms = {x for x in wanted if re.search(r"\.ln_\w+\.weight|_(proj|classifier)\.1\.weight", x)}
    assert differing == norms | {"cl_temp"}


def test_the_longest_beginning_counts() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "ab": torch.nn.Linear(2, 2)})
    settings = Optimizer(lr=2.0, lr_scales={"a": 3.0, "ab.w": 5.0}, weight_decay=0.5)
    found = rates(model, settings)
    assert found == {
        "a.weight": (3, 0.5),
        "a.bias": (3, 0),
        "ab.weight": (5, 0.5),
        "ab.bias": (3, 0),
    }
    settings.lr_scales = {"b": 2.0}
    with pytest.raises(
        ValueError, match=r"lr_scales: keys must begin names of .*\(a, ab\), got 'b'"
    ):
        parameter_groups(model, settings)


def test_linear_decay_is_the_authors() -> None:
    wanted = json.loads(CASE.read_text())["lr_factor_per_step"]
    found = [
        learning_rate_factor(step, total=40, warmup=4, floor=0, decay="linear")
        for step in range(len(wanted))
    ]
    assert found == pytest.approx(wanted, abs=1e-9)
    assert learning_rate_factor(39, total=40, warmup=4, floor=0.5, decay="linear") == 0.5
