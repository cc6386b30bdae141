"""FrozenForRetrieval: two towers, one loss."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from svitt_ops.models import FrozenConfig, FrozenForRetrieval, SViTTConfig

MakeConfig = Callable[..., SViTTConfig]


def test_frozen(make_config: MakeConfig, batch: dict[str, Tensor], tmp_path: Path) -> None:
    torch.manual_seed(0)
    shapes = {
        name: value
        for name, value in make_config().to_dict().items()
        if name in ("image_size", "patch_size", "hidden_size", "num_attention_heads", "vocab_size")
        or name in ("intermediate_size", "block_size", "num_random", "prune_layers")
        or name in ("text_hidden_size", "text_num_attention_heads", "text_intermediate_size")
    }
    model = FrozenForRetrieval(FrozenConfig(**shapes, num_hidden_layers=3)).eval()
    del batch["mlm_input_ids"], batch["mlm_labels"]
    assert not any("bias.table" in name or "scale" in name for name in model.state_dict())
    assert model.text.embeddings.token_type is None and len(model.text.layers) == 6
    assert model.video.layers[0].attention.key.bias is not None
    output = model(**batch)
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not model.leaves_parameters_unused
    logits = output.video_embeds @ output.text_embeds.T / 0.05
    target = torch.arange(3)
    wanted = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(output.loss, wanted)
    torch.optim.SGD(model.parameters(), 1e-5).step()
    assert model(**batch).loss < output.loss
    video = model.encode_video(batch["pixel_values"])
    assert [stage.shape[1] for stage in video.indices_per_stage] == [45, 32]
    model.save_pretrained(tmp_path)
    loaded = FrozenForRetrieval.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode_video(batch["pixel_values"]).embeds, video.embeds)
    with pytest.raises(ValueError, match="fusion_layer must be 6, got 5"):
        FrozenConfig(fusion_layer=5)
