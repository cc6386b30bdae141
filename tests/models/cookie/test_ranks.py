"""Two processes have the loss, and the gradient, of one with both parts of the batch."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from svitt_ops.models.cookie.convolution import SharedBatchNorm2d
from svitt_ops.models.cookie.losses import triplet_loss

PART = """
from svitt_ops.models.cookie.convolution import SharedBatchNorm2d
from svitt_ops.models.cookie.losses import triplet_loss
folder = sys.argv[1]
given = torch.load(f"{folder}/given.pt")
mine = slice(4 * rank, 4 * rank + 4)
found = {}
for negatives in ("hardest", "all"):
    rows = [given[name][mine].clone().requires_grad_() for name in ("images", "texts")]
    more = {"ids": given["ids"][mine], "group": dist.group.WORLD}
    loss = triplet_loss(*rows, 0.2, negatives=negatives, **more)
    loss.backward()
    found[negatives] = [loss.detach(), *(x.grad for x in rows)]
norm = SharedBatchNorm2d(3)
norm.load_state_dict(given["norm"])
x = given["x"][mine].clone().requires_grad_()
out = norm(x)
(out * given["weight"][mine]).sum().backward()
found["norm"] = [out.detach(), x.grad, norm.weight.grad, norm.bias.grad]
found["running"] = [norm.running_mean, norm.running_var]
torch.save(found, f"{folder}/{rank}.pt")
"""


@pytest.fixture(scope="module")
def given() -> dict[str, Tensor]:
    torch.manual_seed(0)
    norm = SharedBatchNorm2d(3)
    torch.nn.init.normal_(norm.weight)
    images, texts = (torch.nn.functional.normalize(torch.randn(8, 5), dim=1) for _ in range(2))
    return {
        "images": images,
        "texts": texts,
        "ids": torch.tensor([0, 1, 2, 2, 3, 1, 4, 5]),
        "x": torch.randn(8, 3, 4, 4),
        "weight": torch.randn(8, 3, 4, 4),
        "norm": norm.state_dict(),
    }


@pytest.fixture(scope="module")
def parts(
    given: dict[str, Tensor],
    tmp_path_factory: pytest.TempPathFactory,
    on_two_ranks: Callable[..., None],
) -> list[dict[str, list[Tensor]]]:
    """What each of two processes finds."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.save(given, folder / "given.pt")
    on_two_ranks(PART, folder, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("negatives", ["hardest", "all"])
def test_triplets(
    negatives: str, given: dict[str, Tensor], parts: list[dict[str, list[Tensor]]]
) -> None:
    rows = [given[name].clone().requires_grad_() for name in ("images", "texts")]
    loss = triplet_loss(*rows, 0.2, negatives=negatives, ids=given["ids"])  # type: ignore[arg-type]
    loss.backward()
    for part in parts:
        torch.testing.assert_close(part[negatives][0], loss.detach())
    for place, x in enumerate(rows, start=1):
        # Twice each process's own part, whose mean over both is what DDP takes.
        found = torch.cat([part[negatives][place] for part in parts]) / 2
        assert x.grad is not None
        torch.testing.assert_close(found, x.grad)


def test_statistics_of_the_batch(
    given: dict[str, Tensor], parts: list[dict[str, list[Tensor]]]
) -> None:
    norm = torch.nn.BatchNorm2d(3)
    norm.load_state_dict(given["norm"])  # type: ignore[arg-type]
    x = given["x"].clone().requires_grad_()
    out = norm(x)
    (out * given["weight"]).sum().backward()
    for place, wanted in ((0, out.detach()), (1, x.grad)):
        found = torch.cat([part["norm"][place] for part in parts])
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for place, wanted in ((2, norm.weight.grad), (3, norm.bias.grad)):
        total = parts[0]["norm"][place] + parts[1]["norm"][place]
        torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-5)
    for part in parts:
        torch.testing.assert_close(part["running"], [norm.running_mean, norm.running_var])


def test_statistics_of_the_weights() -> None:
    """Frozen ones are read while training, and stay."""
    norm = SharedBatchNorm2d(3, frozen=True).train()
    torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    x, before = torch.randn(4, 3, 2, 2), norm.running_var.clone()  # type: ignore[union-attr]
    assert torch.equal(norm(x), norm.eval()(x)) and torch.equal(norm.running_var, before)
