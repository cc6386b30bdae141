"""SViTTConfig: what is refused, and what new weights it makes."""

from collections.abc import Callable

import pytest
import torch

from svitt_ops.models import SViTTConfig, SViTTForPreTraining
from svitt_ops.nn import RelativePositionBias3D

MakeConfig = Callable[..., SViTTConfig]


def test_new_weights(make_config: MakeConfig) -> None:
    torch.manual_seed(0)
    model = SViTTForPreTraining(make_config(bias_init_std=0.3, layer_scale_init_value=0.7))
    bias = model.video.layers[1].attention.bias
    assert bias.std == 0.3
    torch.manual_seed(1)
    bias.reset_parameters()
    assert bias.table.std() > 0
    torch.manual_seed(1)
    wanted = RelativePositionBias3D(bias.grid, bias.num_heads, std=0.3)
    assert torch.equal(bias.table, wanted.table)  # whose deviation the tests of the module hold
    assert model.video.layers[1].add_mlp.scale.eq(0.7).all()
    assert 0.015 < model.text.layers[0].mlp.up.weight.std() < 0.025
    zero = SViTTForPreTraining(make_config(bias_init_std=0.0, layer_scale_init_value=0.0))
    assert zero.video.layers[1].attention.bias.table.eq(0).all()
    assert zero.video.layers[1].add_mlp.scale is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 5}, r"patch_size must be a divisor of image_size \(32\), got 5"),
        ({"num_attention_heads": 5}, r"heads must be a divisor of hidden_size \(32\), got 5"),
        ({"text_hidden_size": 25}, r"text_num_attention_heads must be a divisor of .* got 3"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be at least 0 and less than 1, got 1.0"),
        ({"keep_rate": 0}, "keep_rate must be more than 0 and at most 1, got 0"),
        ({"token_order": "peano"}, "token_order must be one of .*'hilbert'.*, got 'peano'"),
        ({"prune_layers": [3]}, r"prune_layers must be a list of layers 0 to 2, got \[3\]"),
        ({"multimodal_prune_layers": [2]}, "multimodal_prune_layers must be a list of layers"),
        ({"prune_layers": 1}, "prune_layers must be a list of layers 0 to 2, got 1"),
        ({"keep_rate": "0.7"}, "keep_rate must be more than 0 and at most 1, got '0.7'"),
        ({"num_frames": 4.0}, "num_frames must be an integer of at least 1, got 4.0"),
        ({"edge_sparsity": "no"}, r"edge_sparsity must be one of \(True, False\), got 'no'"),
        ({"fusion_layer": 5}, "fusion_layer must be 0 to 4, got 5"),
        ({"temperature_init": 3.0}, "temperature_init must be 0.001 to 0.5, got 3.0"),
        ({"loss_weights": {"itc": 1}}, r"loss_weights must be keyed by \('vtc', 'vtm', 'mlm'\)"),
        ({"loss_weights": dict.fromkeys(("vtc", "vtm", "mlm"), 0)}, "positive for one loss"),
        ({"compat": "official"}, "compat must be one of"),
        ({"compat": "svitt-official", "num_local": 3}, "num_local must be 0 or 1 with compat"),
    ],
)
def test_wrong_configurations(
    make_config: MakeConfig, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**changes)
    config = make_config()
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        SViTTForPreTraining(config)
