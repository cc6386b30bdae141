"""`sparsify`: what it computes, against eager attention under the masks of its layouts."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import (
    TAKES_MASKS,
    VISION,
    assert_equal_runs,
    build,
    eager_with,
    inputs,
    run,
)
from torch import Tensor, nn

from svitt_ops import BlockLayout, keep_count
from svitt_ops.integrations.transformers import desparsify, layouts, saliency, sparsify
from svitt_ops.integrations.transformers.bias import grid_of
from svitt_ops.integrations.transformers.sparsity import PREFIX_TOKENS
from svitt_ops.models.parts.token_order import token_order

pytestmark = pytest.mark.usefixtures("one_thread")
CALLS = [(name, False) for name in VISION] + [(name, True) for name in TAKES_MASKS]
SPARSE: dict[str, Any] = {"block_size": 5, "num_random": 1}
WITH_CLS = [name for name in VISION if name not in ("siglip", "videomae")]


def prefix_of(model: nn.Module) -> int:
    """Tokens before the patches."""
    config: Any = model.config
    return PREFIX_TOKENS[config.model_type] + getattr(config, "num_register_tokens", 0)


class Eager:
    """Eager attention under the masks of layouts, layer by layer, without what was pruned.

    Pruned tokens stay, and nobody attends them but they themselves.
    """

    def __init__(self, model: nn.Module, order: str | None, keep_rate: float, prune: list[int]):
        self.layouts, self.prefix = layouts(model), prefix_of(model)
        self.keep_rate, self.prune, self.number = keep_rate, prune, 0
        grid = grid_of(model.config)
        patches = grid[0] * grid[1] * grid[2]
        self.rank = token_order(order or "standard", grid).argsort()
        self.alive = torch.arange(patches).expand(2, -1)

    def mask(self, module: nn.Module) -> Tensor:
        g, layout = self.prefix, self.layouts[self.number]
        tokens = g + self.rank.numel()
        order = self.rank[self.alive].argsort(1)
        found = torch.eye(tokens, dtype=torch.bool).repeat(2, 1, 1, 1)
        for sample in range(2):
            places = torch.cat([torch.arange(g), g + self.alive[sample][order[sample]]])
            found[sample, 0, places[:, None], places] = layout.to_dense()
        return found

    def record(self, module: nn.Module, weights: Tensor) -> None:
        if self.number in self.prune:
            scores = weights[:, :, 0, self.prefix :].mean(1).gather(1, self.alive)
            keep = keep_count(self.keep_rate, scores.shape[1])
            self.alive = self.alive.gather(1, scores.topk(keep).indices.sort().values)
        self.number += 1

    def kept(self, states: Tensor) -> Tensor:
        first = torch.arange(self.prefix).expand(2, -1)
        places = torch.cat([first, self.alive + self.prefix], 1)
        return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))


def check_against_eager(name: str, given: dict[str, Tensor], **options: Any) -> list[BlockLayout]:
    """Forward and gradients of a sparse model, and of eager attention under its layouts."""
    model = build(name)
    sparsify(model, **options)
    actual = run(model, given)
    rate, prune = options.get("keep_rate", 1.0), options.get("prune_layers", [])
    eager = Eager(model, options.get("token_order"), rate, prune)
    with eager_with(eager.mask, eager.record) as implementation:
        wanted = build(name, implementation)
        states = wanted(**given).last_hidden_state
        states = eager.kept(states)
        weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(2))
        wanted.zero_grad()
        (states * weights).sum().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in wanted.parameters()]
    assert_equal_runs(actual, (states.detach(), grads))
    return eager.layouts


@pytest.mark.parametrize(("name", "masked"), CALLS)
def test_all_blocks_are_dense(name: str, masked: bool) -> None:
    given, model = inputs(name, masked=masked), build(name)
    wanted = run(model, given)
    assert sparsify(model, block_size=8, num_local=99) is model
    assert_equal_runs(run(model, given), wanted)
    assert all(layout.density == 1 for layout in layouts(model))


@pytest.mark.parametrize(("name", "masked"), CALLS)
def test_sparse_attention_is_eager_under_its_layouts(name: str, masked: bool) -> None:
    found = check_against_eager(name, inputs(name, masked=masked), **SPARSE)
    assert len(found) == 3 and all(layout.density < 0.7 for layout in found)


@pytest.mark.parametrize("name", ["vit", "videomae", "dinov3", "beit"])
def test_blocks_are_cut_along_a_curve(name: str) -> None:
    check_against_eager(name, inputs(name), token_order="hilbert", **SPARSE)


@pytest.mark.parametrize("name", WITH_CLS)
def test_pruned_tokens_are_gone(name: str) -> None:
    found = check_against_eager(name, inputs(name), keep_rate=0.5, prune_layers=[0, 1], **SPARSE)
    assert [layout.num_tokens for layout in found] == [36, 18, 9]


@pytest.mark.parametrize(("name", "masked"), [("vit", True), ("dinov3", False), ("beit", True)])
def test_masks_positions_and_order_go_with_the_tokens(name: str, masked: bool) -> None:
    pruned: dict[str, Any] = {"keep_rate": 0.6, "prune_layers": [0, 2], "token_order": "morton"}
    check_against_eager(name, inputs(name, masked=masked), **pruned, **SPARSE)


def same(a: list[BlockLayout], b: list[BlockLayout]) -> bool:
    return all(torch.equal(x.to_mask(), y.to_mask()) for x, y in zip(a, b, strict=True))


def test_layouts_are_drawn_anew_in_training_and_fixed_in_evaluation() -> None:
    model, given = sparsify(build("vit"), **SPARSE), inputs("vit")
    passes = []
    for training in (False, False, True, True, False):
        model.train(training)
        model(**given)
        passes.append(layouts(model))
    assert same(passes[0], passes[1]) and same(passes[0], passes[4])
    assert not same(passes[2], passes[3]) and not same(passes[0], passes[2])
    first, second, third = passes[0]
    assert not same([first, second], [second, third])
    other = sparsify(build("vit"), seed=1, **SPARSE)
    other(**given)
    assert not same(layouts(other), passes[0])


def test_a_sparse_model_opens_again_sparse_and_dense(tmp_path: Path) -> None:
    given = inputs("vit")
    dense, model = build("vit"), build("vit")
    options: dict[str, Any] = {**SPARSE, "keep_rate": 0.5, "prune_layers": [1], "seed": 3}
    wanted = sparsify(model, **options)(**given).last_hidden_state
    model.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path)
    assert again.config.svitt_ops == model.config.svitt_ops
    torch.testing.assert_close(
        again(**given).last_hidden_state, dense(**given).last_hidden_state, rtol=1e-5, atol=1e-5
    )
    sparsify(again, **again.config.svitt_ops)
    assert torch.equal(again(**given).last_hidden_state, wanted)
    # Where this package is not installed.
    torch.save((given["pixel_values"], dense(**given).last_hidden_state), tmp_path / "wanted.pt")
    code = f"""
import sys
sys.modules["svitt_ops"] = None
import torch, transformers
pixels, wanted = torch.load({str(tmp_path / "wanted.pt")!r})
model = transformers.AutoModel.from_pretrained({str(tmp_path)!r})
torch.testing.assert_close(model(pixels).last_hidden_state, wanted, rtol=1e-5, atol=1e-5)
print(model.config._attn_implementation)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "sdpa\n", done.stderr


def test_desparsify_leaves_the_model_as_it_was() -> None:
    given, model = inputs("dinov3"), build("dinov3", "sdpa")
    before, names = model(**given).last_hidden_state, list(model.state_dict())
    sparsify(model, keep_rate=0.5, prune_layers=[0], **SPARSE)
    assert list(model.state_dict()) == names
    twin = copy.deepcopy(model)
    assert model(**given).last_hidden_state.shape[1] < before.shape[1]
    for each in (model, twin):
        assert desparsify(each) is each
        assert torch.equal(each(**given).last_hidden_state, before)
        assert not hasattr(each.config, "svitt_ops")
    assert not any(x._forward_hooks or x._forward_pre_hooks for x in model.modules())


def test_vision_beside_text_becomes_sparse() -> None:
    text = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 32, "eos_token_id": 2, "bos_token_id": 1}
    vision = {k: v for k, v in VISION["clip"][1].items() if "dropout" not in k}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision)
    model = transformers.CLIPModel._from_config(config, attn_implementation="sdpa").eval()
    sparsify(model, **SPARSE)
    model(input_ids=torch.ones(2, 5, dtype=torch.int64), **inputs("clip"))
    assert len(layouts(model)) == 3
    assert model.text_model.config._attn_implementation == "sdpa"


def test_a_classifier_and_a_pretraining_model_become_sparse() -> None:
    config = build("videomae").config
    model = transformers.VideoMAEForPreTraining(config).eval()
    sparsify(model, **SPARSE)
    masked = torch.zeros(2, 36, dtype=torch.bool)
    masked[:, ::2] = True
    model(**inputs("videomae"), bool_masked_pos=masked)
    assert [layout.num_tokens for layout in layouts(model)] == [18] * 3  # of the encoder alone
    classifier = sparsify(transformers.ViTForImageClassification(build("vit").config), **SPARSE)
    assert classifier(**inputs("vit")).logits.shape == (2, 2)


def test_saliency_of_a_sparse_model_is_in_the_order_of_its_tokens() -> None:
    given = inputs("vit")
    found = []
    for order in (None, "hilbert"):
        model = sparsify(build("vit"), block_size=8, num_local=99, token_order=order)
        with saliency(model) as rows:
            model(**given)
        found.append(rows)
    for plain, ordered in zip(*found, strict=True):
        assert plain.shape == (2, 36)
        torch.testing.assert_close(plain, ordered, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_draws_the_same_layouts_again(reentrant: bool) -> None:
    given, found = inputs("vit"), []
    for checkpointed in (False, True):
        model = sparsify(build("vit"), keep_rate=0.5, prune_layers=[1], **SPARSE).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.embeddings.register_forward_hook(lambda m, args, out: out.requires_grad_())
        torch.manual_seed(7)
        found.append(run(model, given))
    assert_equal_runs(found[1], found[0])


@pytest.mark.parametrize("name", ["beit", "dinov3"])
def test_checkpointing_where_positions_are_pruned_is_refused(name: str) -> None:
    model = sparsify(build(name), keep_rate=0.5, prune_layers=[1], **SPARSE).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing must be off where tokens are"):
        model(**inputs(name))


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        ("vit", {"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        ("vit", {"num_random": -1}, ValueError, "num_random must be at least 0, got -1"),
        ("vit", {"seed": -1}, ValueError, "seed must be an int of at least 0, got -1"),
        ("vit", {"keep_rate": 0.5}, ValueError, "must be given together, got 0.5 and None"),
        ("vit", {"prune_layers": [1]}, ValueError, r"must be given together, got None and \[1\]"),
        (
            "vit",
            {"keep_rate": 1.5, "prune_layers": [1]},
            ValueError,
            "keep_rate must be more than 0 and at most 1, got 1.5",
        ),
        (
            "vit",
            {"keep_rate": 0.5, "prune_layers": [3]},
            ValueError,
            r"prune_layers must be numbers of layers, 0 to 2, got \[3\]",
        ),
        (
            "videomae",
            {"keep_rate": 0.5, "prune_layers": [1]},
            ValueError,
            r"keep_rate must be None for videomae, which has no \[CLS\] token",
        ),
        (
            "deit",
            {"keep_rate": 0.5, "prune_layers": [1], "num_global": 1},
            ValueError,
            "num_global must be 2 for deit with keep_rate, got 1",
        ),
        (
            "beit",
            {"num_global": 2},
            ValueError,
            "num_global must be 1 for beit with a relative position bias, got 2",
        ),
        (
            "vit",
            {"token_order": "spiral"},
            ValueError,
            "order must be 'standard', 'morton' or 'hilbert', got 'spiral'",
        ),
        ("bert", {}, ValueError, r"model must have a tower of vit, .* beit, got bert"),
    ],
)
def test_what_cannot_be_sparse_is_refused(
    name: str, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = build(name)
    with pytest.raises(error, match=words):
        sparsify(model, **options)
    model(**inputs(name))  # as it was
    assert not hasattr(model.config, "svitt_ops")


def test_a_model_in_the_wrong_state_is_refused() -> None:
    model = build("vit")
    with pytest.raises(ValueError, match="desparsify: model must be sparse"):
        desparsify(model)
    with pytest.raises(ValueError, match="layouts: model must be sparse"):
        layouts(model)
    sparsify(model, **SPARSE)
    with pytest.raises(ValueError, match="layouts: model must have run, got no forward pass"):
        layouts(model)
    with pytest.raises(ValueError, match="sparsify: model must be dense, got a sparse one"):
        sparsify(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="must be svitt_ops, got another attn_implementation"):
        model(**inputs("vit"))


def test_an_order_is_refused_for_other_patches_than_the_config_s() -> None:
    model = sparsify(build("vit"), token_order="morton", **SPARSE)
    with pytest.raises(ValueError, match="for the 36 patches of the config's grid, got 16"):
        model(torch.randn(1, 3, 16, 16), interpolate_pos_encoding=True)


@pytest.mark.parametrize(("name", "training"), [("vit", False), ("beit", True)])
def test_a_sparse_model_compiles_whole(name: str, training: bool) -> None:
    torch.compiler.reset()
    given = inputs(name, masked=True)
    model = build(name, num_hidden_layers=2).train(training)
    sparsify(model, keep_rate=0.5, prune_layers=[0], token_order="hilbert", **SPARSE)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = run(compiled, given)
    drawn = layouts(model)
    assert [layout.num_tokens for layout in drawn] == [36, 18]
    if training:
        compiled(**given)
        assert not same(layouts(model), drawn)
    else:
        assert_equal_runs(found, run(model, given))
        assert same(layouts(model), drawn)
