"""`attn_implementation="svitt_ops"`: equal to eager, on our ops alone, or refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tiny_models import (
    TAKES_MASKS,
    TEXTS,
    VISION,
    assert_equal_runs,
    build,
    eager_with,
    inputs,
    run,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from svitt_ops.integrations.transformers import attention, saliency

pytestmark = pytest.mark.usefixtures("one_thread")
MASKED = [*TAKES_MASKS, *TEXTS]
CALLS = [(name, False) for name in [*VISION, *TEXTS]] + [(name, True) for name in MASKED]


class Calls(TorchDispatchMode):
    """Names of the operators that attention is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "attention" in name or "softmax" in name:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "masked"), CALLS)
def test_the_plug_in_equals_eager(name: str, masked: bool) -> None:
    given = inputs(name, masked=masked)
    wanted, model = build(name), build(name, "svitt_ops")
    assert_equal_runs(run(model, given), run(wanted, given))


@pytest.mark.parametrize("name", MASKED)
def test_masks_are_not_dropped(name: str) -> None:
    model = build(name, "svitt_ops")
    plain, masked = (model(**inputs(name, masked=m)).last_hidden_state for m in (False, True))
    assert float((plain - masked).detach().abs().max()) > 1e-3


@pytest.mark.parametrize(("name", "masked"), CALLS)
def test_every_attention_is_an_op_of_ours(name: str, masked: bool) -> None:
    # The pooling head of SigLIP is torch's MultiheadAttention, which no plug-in reaches.
    changes = {"vision_use_head": False} if name == "siglip" else {}
    model = build(name, "svitt_ops", **changes)
    with Calls() as calls:
        model(**inputs(name, masked=masked)).last_hidden_state.sum().backward()
    forward = {"block_sparse_attention", "cross_attention"}
    backward = {f"{op}_backward" for op in forward}
    assert set(calls.names) <= forward | backward
    assert sum(call in forward for call in calls.names) == 3  # one a layer
    assert sum(call in backward for call in calls.names) == 3


@pytest.mark.parametrize(("name", "masked"), [("vit", False), ("vit", True), ("beit", True)])
def test_saliency_is_the_first_row(name: str, masked: bool) -> None:
    given, rows = inputs(name, masked=masked), []

    def record(module: nn.Module, weights: Tensor) -> None:
        rows.append(weights[:, :, 0, 1:].mean(1))

    with eager_with(lambda module: None, record) as implementation:
        build(name, implementation)(**given)
    model = build(name, "svitt_ops")
    with saliency(model) as found:
        model(**given)
    model(**given)  # nothing is collected outside
    assert len(found) == 3
    for actual, wanted in zip(found, rows, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)


def test_saliency_of_another_attention_is_refused() -> None:
    with (
        pytest.raises(
            ValueError, match='saliency: model must have attn_implementation="svitt_ops"'
        ),
        saliency(build("vit", "sdpa")),
    ):
        pass


def test_bf16_is_as_close_to_fp32_as_sdpa() -> None:
    given = inputs("vit")
    wanted = build("vit")(**given).last_hidden_state
    errors = {}
    for implementation in ("sdpa", "svitt_ops"):
        states = build("vit", implementation).bfloat16()(**given).last_hidden_state
        errors[implementation] = float((states.float() - wanted).abs().mean())
    assert errors["svitt_ops"] < 1.5 * errors["sdpa"]


def test_beit_takes_other_square_images_and_refuses_the_rest() -> None:
    model, wanted = build("beit", "svitt_ops"), build("beit")
    square = {"pixel_values": torch.randn(1, 3, 16, 16)}
    assert_equal_runs(run(model, square), run(wanted, square))
    with pytest.raises(ValueError, match="of an image that is not square"):
        model(torch.randn(1, 3, 16, 24))
    with pytest.raises(ValueError, match=r"table over the patches \(1, 6, 6\), got another one"):
        model(torch.randn(1, 3, 12, 48))  # as many patches as the config's, in another grid


def refused(**given: Any) -> str:
    """What calling the attention function says."""
    q = torch.randn(2, 2, 4, 8)
    module: Any = SimpleNamespace(is_causal=given.pop("module_causal", False), config=None)
    with pytest.raises(ValueError) as error:
        attention(module, q, q, q, given.pop("attention_mask", None), **given)
    return str(error.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"softcap": 30.0}, "softcap must be None, got float"),
        ({"position_bias": torch.zeros(1, 2, 4, 4)}, "position_bias must be None, got Tensor"),
        ({"head_mask": torch.ones(2)}, "head_mask must be None, got Tensor"),
        ({"s_aux": torch.ones(2)}, "s_aux must be None, got Tensor"),
        ({"sliding_window": 8}, "sliding_window must be None, got int"),
        ({"cu_seq_lens_q": torch.ones(2)}, "cu_seq_lens_q must be None, got Tensor"),
        ({"dropout": 0.1}, "dropout of attention weights must be 0, got 0.1"),
        ({"is_causal": True}, "is_causal must be False, got causal attention"),
        ({"module_causal": True}, "is_causal must be False, got causal attention"),
        ({"output_attentions": True}, "output_attentions must be False, got True; the first"),
        (
            {"attention_mask": torch.ones(2, 1, 4, 4, dtype=torch.bool)},
            r"attention_mask must be bool (batch, 1, 1, 4), a padding mask, got torch.bool of "
            r"(2, 1, 4, 4)",
        ),
        (
            {"attention_mask": torch.zeros(1, 2, 4, 4)},
            r"attention_mask must be bool (batch, 1, 1, 4), a padding mask, got torch.float32",
        ),
    ],
)
def test_what_the_ops_do_not_do_is_refused(given: dict[str, Any], words: str) -> None:
    assert words in refused(**given)


def test_tensors_that_were_applied_already_pass() -> None:
    q = torch.randn(2, 2, 4, 8)
    module: Any = SimpleNamespace(is_causal=False, config=None)
    out, weights = attention(module, q, q, q, None, position_ids=torch.arange(4), return_dict=True)
    assert out.shape == (2, 4, 2, 8) and weights is None


@pytest.mark.parametrize("name", ["vit", "videomae", "siglip", "dinov3", "bert"])
def test_output_attentions_is_refused_with_the_call_to_use(name: str) -> None:
    with pytest.raises(ValueError, match=r"output_attentions must be False.*saliency\(model\)"):
        build(name, "svitt_ops")(**inputs(name), output_attentions=True)


def test_dropout_in_training_is_refused() -> None:
    model = build("bert", "svitt_ops", attention_probs_dropout_prob=0.1)
    model(**inputs("bert"))
    with pytest.raises(ValueError, match="BertSelfAttention: dropout of attention weights must be"):
        model.train()(**inputs("bert"))


def test_causal_text_is_refused_and_vision_beside_it_runs() -> None:
    text = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 32, "eos_token_id": 2, "bos_token_id": 1}
    vision = {k: v for k, v in VISION["clip"][1].items() if "dropout" not in k}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision)
    given = {"input_ids": torch.ones(2, 5, dtype=torch.int64), **inputs("clip")}
    model = transformers.CLIPModel._from_config(config, attn_implementation="svitt_ops").eval()
    words = "clip_text_model must attend in both directions, got causal_mask_function"
    with pytest.raises(ValueError, match=words):
        model(**given)
    wanted = transformers.CLIPModel._from_config(config, attn_implementation="eager").eval()
    wanted.load_state_dict(model.state_dict())
    model.set_attn_implementation({"vision_config": "svitt_ops", "text_config": "sdpa"})
    torch.testing.assert_close(model(**given).image_embeds, wanted(**given).image_embeds)


@pytest.mark.parametrize("name", ["vit", "beit"])
def test_the_plug_in_compiles_whole(name: str) -> None:
    torch.compiler.reset()
    given = inputs(name, masked=True)
    model = build(name, "svitt_ops", num_hidden_layers=1)
    wanted = run(model, given)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equal_runs(run(compiled, given), wanted)


def test_the_plug_in_compiles_with_inductor() -> None:
    torch.compiler.reset()
    model = build("siglip", "svitt_ops", num_hidden_layers=1, vision_use_head=False)
    given = inputs("siglip")
    with torch.no_grad():
        wanted = model(**given).last_hidden_state
        found = torch.compile(model, fullgraph=True)(**given).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
