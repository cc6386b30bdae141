"""PEFT's adapters on the projections of attention, in every tower."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from momentum_cases import TINY as PICTURES
from torch import Tensor

from svitt_ops.models import ALBEFConfig, ALBEFForPreTraining, SViTTConfig, SViTTForPreTraining

peft = pytest.importorskip("peft")
TOWERS = ("video.", "text.", "fusion.")


@pytest.fixture(params=["svitt", "albef"])
def case(request: pytest.FixtureRequest, make_config: Any) -> tuple[Any, dict[str, Tensor]]:
    """A model, and its batch. ALBEF has a momentum twin, which is adapted beside it."""
    torch.manual_seed(0)
    if request.param == "svitt":
        config: SViTTConfig = make_config(eval_pattern_seed=0)
        return SViTTForPreTraining(config), request.getfixturevalue("batch")
    return ALBEFForPreTraining(ALBEFConfig(**PICTURES)), request.getfixturevalue("pairs")


@torch.no_grad()
def encodings(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """What the towers make of a batch."""
    model.eval()
    texts = model.encode_text(batch["input_ids"], batch["attention_mask"])
    return [model.encode_video(batch["pixel_values"]).embeds, texts.embeds]


def test_adapters(case: tuple[Any, dict[str, Tensor]], tmp_path: Path) -> None:
    model, batch = case
    plain = deepcopy(model)
    before = encodings(model, batch)
    settings = peft.LoraConfig(target_modules=["query", "value"], r=2)
    adapted = peft.get_peft_model(model, settings)
    torch.testing.assert_close(encodings(model, batch), before)  # they begin at nothing
    own = {
        name: x
        for name, x in adapted.named_parameters()
        if x.requires_grad and "teacher" not in name
    }
    assert all(any(tower in name for name in own) for tower in (*TOWERS, "cross_attention."))
    optimizer = torch.optim.SGD(own.values(), lr=1.0)
    model.train()
    for _ in range(2):  # the first ones of a pair have a gradient once the second ones are not 0
        optimizer.zero_grad()
        model.before_step()
        adapted(**batch).loss.backward()
        assert all("lora_" in name for name, x in model.named_parameters() if x.grad is not None)
        optimizer.step()
    assert all(x.grad is not None and x.grad.any() for x in own.values())
    learned = encodings(model, batch)
    assert all((x - y).abs().max() > 1e-3 for x, y in zip(learned, before, strict=True))
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(encodings(again.merge_and_unload(), batch), learned)
