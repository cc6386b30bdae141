"""Models under `torch.compile`, `torch.export`, `torch.func` and on `meta`."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from svitt_ops.models import SViTTConfig, SViTTForPreTraining
from svitt_ops.models.parts.layers import embed
from svitt_ops.training.engine.process import compile_backward_outside_autocast

MakeConfig = Callable[..., SViTTConfig]
SHALLOW: dict[str, Any] = {
    "num_hidden_layers": 2,
    "prune_layers": [0],
    "text_num_hidden_layers": 2,
    "fusion_layer": 1,
}


def compiled(function: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def build(config: SViTTConfig) -> SViTTForPreTraining:
    torch.manual_seed(0)
    return SViTTForPreTraining(config).eval()


@pytest.mark.parametrize(
    ("frames", "changes"),
    [
        (4, {}),
        (4, {"prune_by": "random"}),
        (2, {"token_order": "hilbert"}),
        (4, {"edge_sparsity": False, "keep_rate": 1.0}),
    ],
)
def test_a_clip_is_encoded_in_one_graph(
    make_config: MakeConfig, batch: dict[str, Tensor], frames: int, changes: dict[str, Any]
) -> None:
    """With the patterns that are drawn without a compiler, on every call."""
    model = build(make_config(**SHALLOW, **changes))
    encode = compiled(model.encode_video)
    with torch.no_grad():
        for rows in (3, 2):
            pixels = batch["pixel_values"][:rows, :frames]
            wanted = model.encode_video(pixels)
            for _ in range(2):
                found = encode(pixels)
                torch.testing.assert_close(found.embeds, wanted.embeds)
                torch.testing.assert_close(found.states, wanted.states)
                assert torch.equal(found.indices, wanted.indices)


def test_texts_and_fusion_are_one_graph_each(
    make_config: MakeConfig, batch: dict[str, Tensor]
) -> None:
    model = build(make_config(**SHALLOW, multimodal_prune_by="random"))
    inputs = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        text, video = model.encode_text(*inputs), model.encode_video(batch["pixel_values"])
        torch.testing.assert_close(compiled(model.encode_text)(*inputs).embeds, text.embeds)
        arguments = (text.states, inputs[1], video.states, video.indices)
        found, wanted = compiled(model.fuse)(*arguments), model.fuse(*arguments)
    torch.testing.assert_close(found.states, wanted.states)
    assert torch.equal(found.video_indices, wanted.video_indices)


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dense", [False, True], ids=["hybrid", "dense"])
def test_a_step_is_one_graph(
    make_config: MakeConfig, batch: dict[str, Tensor], dense: bool, low: bool
) -> None:
    changes: dict[str, Any] = {"drop_path_rate": 0.2}
    if dense:
        changes |= {"edge_sparsity": False, "keep_rate": 1.0, "multimodal_keep_rate": 1.0}
    model = build(make_config(**SHALLOW | changes)).train()
    results = []
    for forward in (compiled(model), model):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = forward(**batch).loss
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        results.append((loss, [x for x in found if x is not None]))
    if not low:
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
        return
    (loss, grads), (wanted, others) = results
    torch.testing.assert_close(loss, wanted, rtol=0.01, atol=0)
    found, expected = (torch.cat([x.flatten() for x in all_of]) for all_of in (grads, others))
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_a_compiled_backward_is_as_exact_as_an_eager_one() -> None:
    """What a layer computes in fp32 under autocast has its gradient in fp32, compiled or not."""
    layer, states = nn.Linear(64, 32), torch.randn(4, 64)

    def run(states: Tensor) -> Tensor:
        return embed(layer, states.bfloat16()).square()[:, :5].sum()

    found = []
    with functorch_config.patch(backward_pass_autocast="same_as_forward"):  # torch's own
        compile_backward_outside_autocast()
        for forward in (compiled(run), run):
            with torch.autocast("cpu", torch.bfloat16):
                loss = forward(states)
            found.append(torch.autograd.grad(loss, layer.weight)[0])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


def test_an_evaluation_is_one_graph(make_config: MakeConfig, batch: dict[str, Tensor]) -> None:
    model = build(make_config(**SHALLOW))
    with torch.no_grad():
        for function in (model, model.match_scores):
            given: dict[str, Tensor] = batch
            if function is not model:
                text = model.encode_text(batch["input_ids"], batch["attention_mask"])
                video = model.encode_video(batch["pixel_values"])
                given = {"text_states": text.states, "video_states": video.states}
                given["attention_mask"] = batch["attention_mask"]
            torch.manual_seed(1)
            wanted = function(**given)
            torch.manual_seed(1)
            torch.testing.assert_close(compiled(function)(**given), wanted)


def test_export_of_a_tower(make_config: MakeConfig, batch: dict[str, Tensor]) -> None:
    class Encoder(nn.Module):
        def __init__(self, model: SViTTForPreTraining) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: Tensor) -> Tensor:
            embeds: Tensor = self.model.encode_video(pixels).embeds
            return embeds

    encoder, pixels = Encoder(build(make_config(**SHALLOW))), batch["pixel_values"]
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(encoder, (pixels,), dynamic_shapes=({0: rows},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    run = torch.export.load(file).module()
    for x in (pixels, pixels[:2]):
        torch.testing.assert_close(run(x), encoder(x))


def test_gradients_by_torch_func(make_config: MakeConfig, batch: dict[str, Tensor]) -> None:
    model = build(make_config(drop_path_rate=0.2)).train()
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        found: Tensor = functional_call(model, parameters, (), batch).loss
        return found

    torch.manual_seed(2)
    found = grad(loss)(parameters)
    torch.manual_seed(2)
    model(**batch).loss.backward()
    for name, parameter in parameters.items():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found[name], wanted)


def test_gradients_of_each_clip(make_config: MakeConfig, batch: dict[str, Tensor]) -> None:
    model = build(make_config(**SHALLOW))
    parameters = dict(model.named_parameters())
    tower = {name[6:]: p for name, p in parameters.items() if name.startswith("video.")}

    def loss(parameters: dict[str, Tensor], pixels: Tensor) -> Tensor:
        found: Tensor = functional_call(model.video, parameters, (pixels[None],)).tokens
        return found.square().mean()

    each = vmap(grad(loss), in_dims=(None, 0))(tower, batch["pixel_values"])
    for i, pixels in enumerate(batch["pixel_values"]):
        for name, wanted in grad(loss)(tower, pixels).items():
            torch.testing.assert_close(each[name][i], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compat", [None, "svitt-official"])
def test_shapes_on_meta(
    make_config: MakeConfig, batch: dict[str, Tensor], compat: str | None
) -> None:
    model = build(make_config(compat=compat)).to("meta")
    on_meta = {name: x.to("meta") for name, x in batch.items()}
    for training in (True, False):
        output = model.train(training)(**on_meta)
        assert output.loss.shape == () and output.video_embeds.shape == (3, 12)
        output.loss.backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
