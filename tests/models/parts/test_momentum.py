"""Momentum twins and queues."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from momentum_cases import TINY
from torch import Tensor

from svitt_ops.models import ALBEFConfig, ALBEFForPreTraining, ALBEFForVisualEntailment
from svitt_ops.models.parts.losses import IGNORED, distilled_cross_entropies, mean_of_labels
from svitt_ops.models.parts.momentum import FeatureQueue


def build(**changes: object) -> ALBEFForPreTraining:
    torch.manual_seed(0)
    return ALBEFForPreTraining(ALBEFConfig(**{**TINY, "queue_size": 7, **changes}))


def rows(first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    numbers = torch.arange(first, first + count)
    return numbers[:, None].repeat(1, 2).float(), -numbers[:, None].repeat(1, 2).float(), numbers


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 50])
@pytest.mark.parametrize("batches", [(4, 4, 4), (3, 1, 5), (9, 2), (1,) * 12])
def test_a_queue_holds_the_last_rows(length: int, batches: tuple[int, ...]) -> None:
    """Each in the place of its number, whatever the length and the batches."""
    queue, first = FeatureQueue(length, 2), 0
    queue.reset()
    torch.testing.assert_close(queue.video.norm(dim=1), torch.ones(length))
    for count in batches:
        queue.push(*rows(first, count))
        first += count
        assert int(queue.next) == first % length
    last = torch.arange(max(first - length, 0), first)
    wanted = torch.full((length,), IGNORED)
    wanted[last % length] = last
    assert torch.equal(queue.ids, wanted)
    assert torch.equal(queue.video[last % length, 0], last.float())
    assert torch.equal(queue.text[last % length, 1], -last.float())


PUSH = """
from svitt_ops.models.parts.momentum import FeatureQueue
queue = FeatureQueue(5, 2)
queue.reset()
for first in (0, 10):
    ids = torch.arange(2) + first + 2 * rank
    queue.push(ids[:, None].repeat(1, 2).float(), torch.zeros(2, 2), ids)
torch.save(queue.state_dict(), f"{sys.argv[1]}/queue-{rank}")
"""


def test_rows_of_all_processes_are_queued(
    tmp_path: Path, on_two_ranks: Callable[..., None]
) -> None:
    on_two_ranks(PUSH, tmp_path, str(tmp_path))
    one, other = (torch.load(tmp_path / f"queue-{rank}") for rank in (0, 1))
    assert one["ids"].tolist() == other["ids"].tolist() == [11, 12, 13, 3, 10]
    assert torch.equal(one["video"][:, 0], one["ids"].float())
    assert one["next"] == 3


def test_the_twin_follows(pairs: dict[str, Tensor]) -> None:
    model = build()
    own, twin = model.video.cls_token, model.teacher.video.cls_token
    assert torch.equal(own, twin) and not twin.requires_grad
    assert all(torch.equal(x, model.get_parameter(n)) for n, x in model.teacher.named_parameters())
    before = twin.clone()
    with torch.no_grad():
        own.add_(1)
    model.before_step()
    torch.testing.assert_close(twin, before + 0.005)
    model(**pairs).loss.backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    assert not any(p.requires_grad for p in model.teacher.parameters())


def test_queues_take_batches_only_while_training(pairs: dict[str, Tensor]) -> None:
    model = build(queue_size=5)
    model(**pairs)
    assert int(model.queue.next) == 3 and model.queue.ids.tolist()[:3] == [0, 1, 2]
    model.eval()(**pairs)
    assert int(model.queue.next) == 3
    model.train()(**pairs)
    assert int(model.queue.next) == 1


def test_weights_for_use_hold_the_model_once(pairs: dict[str, Tensor], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = build()
    for _ in range(2):
        model.before_step()
        model(**pairs)
    with torch.no_grad():
        model.video.cls_token.add_(1)  # no longer the twin's
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    state = model.training_state()
    assert set(stored) == set(model.state_dict()) - set(state)
    assert {name.partition(".")[0] for name in state} == {"teacher", "queue", "steps"}
    loaded, info = ALBEFForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(loaded.teacher.video.cls_token, model.video.cls_token)
    assert loaded.queue.video.norm(dim=1).allclose(torch.ones(7)) and loaded.alpha == 0.4
    again = build()
    again.load_state_dict(stored | state)
    with torch.no_grad():
        arguments = {**pairs, "alpha": 0.4}
        torch.manual_seed(1)
        wanted = model.eval()(**arguments).loss
        torch.manual_seed(1)
        assert torch.equal(again.eval()(**arguments).loss, wanted)
    light = ALBEFForPreTraining.from_pretrained(tmp_path, momentum=None)
    assert set(light.state_dict()) == set(stored)
    with pytest.raises(ValueError, match="momentum must be a number to train with, got None"):
        light(**pairs)


def test_the_share_of_the_twin_grows() -> None:
    model = build(alpha_warmup_steps=4)
    shares = []
    for _ in range(6):
        model.before_step()
        shares.append(model.alpha)
    assert shares == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4])
    again = build(alpha_warmup_steps=4)
    state = model.training_state()
    state["steps"] = torch.tensor([2])
    again.load_state_dict(state, strict=False)
    assert again.alpha == pytest.approx(0.1)
    fitted = build(alpha_warmup_steps=None)
    with pytest.raises(ValueError, match="alpha_warmup_steps must be a number to train with"):
        fitted.share_of_teacher(None)
    assert fitted.share_of_teacher(0.3) == 0.3
    for built, steps in ((fitted, 7), (again, 4)):
        built.fit_epoch(7)
        assert built.config.alpha_warmup_steps == steps
    for wrong in (-0.1, 1.5):
        with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got"):
            model.share_of_teacher(wrong)


def test_a_twin_that_agrees_changes_nothing() -> None:
    """Targets mixed with one's own prediction add its entropy, and no gradient of the mean."""
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, IGNORED, 0], [4, 2, IGNORED]])
    found = distilled_cross_entropies(logits, labels, torch.randn(2, 3, 5), 0.3)
    assert found.shape == labels.shape and (found[labels == IGNORED] == 0).all()
    soft = distilled_cross_entropies(logits, labels, logits.detach(), 1.0)
    entropy = torch.distributions.Categorical(logits=logits.detach()).entropy().float()
    torch.testing.assert_close(soft[labels >= 0], entropy[labels >= 0])
    soft.sum().backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-6
    hard = distilled_cross_entropies(logits, labels, None, 0.0)
    wanted = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
    torch.testing.assert_close(mean_of_labels(hard, labels), wanted)
    with pytest.raises(ValueError, match=r"teacher must have shape \(2, 3, 5\), got None"):
        distilled_cross_entropies(logits, labels, None, 0.1)


def test_classes_without_a_twin(pairs: dict[str, Tensor]) -> None:
    model = ALBEFForVisualEntailment(ALBEFConfig(**{**TINY, "momentum": None}))
    arguments = [pairs[name] for name in ("pixel_values", "input_ids", "attention_mask")]
    labels = torch.tensor([0, 2, 1])
    output = model(*arguments, labels)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
    assert output.logits.shape == (3, 3) and not model.training_state()
    with pytest.raises(ValueError, match="alpha must be 0 without a teacher"):
        model(*arguments, labels, alpha=0.4)
    with pytest.raises(ValueError, match=r"labels must have shape \(3,\), got \(2,\)"):
        model(*arguments, labels[:2])
