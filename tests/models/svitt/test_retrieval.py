"""SViTTForRetrieval and SViTTForMultipleChoice, and how transformers finds all models."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from svitt_ops.models import (
    FrozenConfig,
    FrozenForRetrieval,
    SViTTConfig,
    SViTTForMultipleChoice,
    SViTTForPreTraining,
    SViTTForQuestionAnswering,
    SViTTForRetrieval,
    SViTTModel,
)
from svitt_ops.models.svitt import load_official

MakeConfig = Callable[..., SViTTConfig]
PAIRS = ("pixel_values", "input_ids", "attention_mask", "pair_ids")


@pytest.fixture
def folder(make_config: MakeConfig, tmp_path: Path) -> Path:
    """A pretrained model's."""
    torch.manual_seed(0)
    SViTTForPreTraining(make_config(initializer_range=0.2)).save_pretrained(tmp_path / "a")
    return tmp_path / "a"


@pytest.mark.parametrize("kind", [SViTTForRetrieval, SViTTForMultipleChoice])
def test_losses_of_fine_tuning(
    folder: Path,
    batch: dict[str, Tensor],
    kind: type[SViTTForRetrieval],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Those of pretraining without masked tokens, from its weights."""
    model = kind.from_pretrained(folder)
    assert caplog.text == "" and type(model) is kind
    source = SViTTForPreTraining.from_pretrained(folder)
    source.config.loss_weights = {"vtc": 1, "vtm": 1, "mlm": 0}
    pairs = {name: batch[name] for name in PAIRS}
    losses = []
    for one in (model, source):
        torch.manual_seed(3)
        losses.append(one.train()(**pairs))
    assert torch.equal(losses[0].loss, losses[1].loss) and losses[0].loss_mlm is None
    assert torch.equal(losses[0].loss, losses[0].loss_vtc + losses[0].loss_vtm)
    losses[0].loss.backward()
    assert not model.leaves_parameters_unused
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in unused if not name.endswith("key.bias")] == []
    model.config.loss_weights = {"vtc": 0, "vtm": 1}
    assert model.leaves_parameters_unused and model(**pairs).loss_vtc is None
    model.config.loss_weights = {"vtc": 0, "vtm": 0}
    with pytest.raises(ValueError, match=f"{kind.__name__}: loss_weights must be positive for "):
        model(**pairs)


def test_save_and_load(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = SViTTForMultipleChoice.from_pretrained(folder)
    model.save_pretrained(tmp_path / "b")
    again = SViTTForRetrieval.from_pretrained(tmp_path / "b")
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert caplog.text == ""
    SViTTForPreTraining.from_pretrained(tmp_path / "b")
    assert "the head for masked tokens starts from random" in caplog.text


@torch.no_grad()
def test_a_choice(folder: Path, batch: dict[str, Tensor]) -> None:
    model = SViTTForMultipleChoice.from_pretrained(folder).eval()
    ids, mask = (batch[name] for name in ("input_ids", "attention_mask"))
    clips = torch.stack([batch["pixel_values"], batch["pixel_values"].flip(1)], 1)
    states = model.encode_video(clips.flatten(0, 1)).states.unflatten(0, (3, 2))
    options = ids.expand(3, -1, -1), mask.expand(3, -1, -1)
    found = model.choose(states, *options, merge="max")
    text = model.encode_text(ids, mask).states
    for row in range(3):
        for option in range(3):
            pair = text[option].expand(2, -1, -1), mask[option].expand(2, -1), states[row]
            no, yes = model.match_logits(*pair).unbind(1)
            torch.testing.assert_close(found.scores[row, option], (yes - no).max())
    assert torch.equal(found.choices, found.scores.argmax(1))
    one = model.choose(states[:, 0], *options)
    torch.testing.assert_close(one.scores, model.choose(states[:, :1], *options).scores)
    with pytest.raises(ValueError, match=r"SViTTForMultipleChoice: input_ids .* got \(3, 6\)"):
        model.choose(states, ids, mask)
    with pytest.raises(ValueError, match="merge must be one of"):
        model.choose(states, *options, merge="sum")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("compat", "wanted"), [(None, [2.0, -3.0]), ("svitt-official", [3.0, -1.0])]
)
def test_pairs_are_ranked_by_log_odds(
    folder: Path, compat: str | None, wanted: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The authors rank by the logit of "yes" alone."""
    model = SViTTForMultipleChoice.from_pretrained(folder, compat=compat)
    logits = torch.tensor([[1.0, 3.0], [2.0, -1.0]])
    monkeypatch.setattr(model, "match_logits", lambda *_: logits)
    states = torch.zeros(1, 3, 4)
    assert model.match_scores(states, states[..., 0], states).tolist() == wanted
    text = torch.ones(1, 2, 6, dtype=torch.int64)
    video = model.encode_video(torch.zeros(1, 2, 3, *[model.config.image_size] * 2)).states
    assert model.choose(video, text, text).scores.tolist() == [wanted]


@pytest.mark.parametrize(
    "kind",
    [SViTTForPreTraining, SViTTForRetrieval, SViTTForQuestionAnswering, SViTTForMultipleChoice],
)
def test_transformers_knows_the_models(
    make_config: MakeConfig,
    tmp_path: Path,
    kind: type[SViTTModel],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By the type in a folder's config.json; what `AutoModel` makes of it are the towers."""
    model = kind(make_config()).eval()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is SViTTConfig
    towers = AutoModel.from_pretrained(tmp_path)
    assert type(towers) is SViTTModel
    state = model.state_dict()
    for name, value in towers.state_dict().items():
        assert name not in state or torch.equal(value, state[name])
    if kind is not SViTTForQuestionAnswering:  # has no embeddings, whose start is said
        assert caplog.text == "" and set(towers.state_dict()) <= set(state)


def test_transformers_knows_frozen() -> None:
    small = {"num_hidden_layers": 1, "prune_layers": [], "image_size": 32, "vocab_size": 50}
    config = AutoConfig.for_model("svitt-frozen", **small)
    assert type(config) is FrozenConfig
    assert type(AutoModel.from_config(config)) is FrozenForRetrieval


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"task must be one of pretraining, .* got 'grounding'"):
        load_official({"a": torch.ones(1)}, task="grounding")
