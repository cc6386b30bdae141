"""`svitt visualize` of a COOKIE: salient regions and words."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
from PIL import Image

from svitt_ops.models import COOKIEConfig, COOKIEForHashing, COOKIEForPreTraining
from svitt_ops.training import cli
from svitt_ops.training.cli.maps import find_maps
from svitt_ops.training.data.text import save_tokenizer, train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = "the small red circle left of a blue square"
TOKENIZER = train_tokenizer([TEXT] * 9, 100)
SMALL: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "cnn_depths": [1, 1],
    "cnn_sizes": [8, 16],
    "cnn_stem": 8,
    "cnn_layer": "basic",
    "hidden_size": 16,
    "num_attention_heads": 2,
    "projection_dim": 16,
    "text_hidden_size": 16,
    "text_num_attention_heads": 2,
    "text_num_hidden_layers": 1,
    "fusion_layer": 1,
    "vocab_size": len(TOKENIZER),
    "initializer_range": 0.3,
}


def store(folder: Path, kind: Any = COOKIEForPreTraining, **changes: Any) -> Path:
    torch.manual_seed(0)
    kind(COOKIEConfig(**{**SMALL, **changes})).save_pretrained(folder)
    save_tokenizer(TOKENIZER, folder)
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    coarse = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    path = tmp_path / "photo.jpg"
    Image.fromarray(coarse).resize((53, 37), Image.Resampling.BICUBIC).save(path)
    return path


def test_a_figure(tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["visualize", str(store(tmp_path / "model")), str(photo), "--caption", TEXT]
    assert cli.main([*words, "--output", str(tmp_path / "maps")]) == 0
    figure = tmp_path / "maps" / "000-photo.png"
    assert capsys.readouterr().out.split() == [str(figure)]
    ink = (np.array(Image.open(figure).convert("RGB")) < 250).any(-1)
    assert ink.any() and not (ink[:4].any() or ink[-4:].any())
    assert cli.main([*words, "--layer", "1"]) == 2
    assert "--layer: must be absent, COOKIEForPreTraining has no fusion layers, got 1" in (
        capsys.readouterr().err
    )
    for kind, changes, message in (
        (COOKIEForHashing, {}, "to have maps of words, got COOKIEForHashing"),
        (
            COOKIEForPreTraining,
            {"feature_size": 8, "loss_weights": {"vcl": 0}},
            "model: must be one of pictures, got one of given features",
        ),
    ):
        folder = str(store(tmp_path / str(len(message)), kind, **changes))
        assert cli.main([words[0], folder, *words[2:]]) == 2
        assert message in capsys.readouterr().err
        assert cli.main([*words, "--beside", folder]) == 2
        assert message.replace("model:", "--beside:") in capsys.readouterr().err


def test_maps_are_the_similarities_of_states() -> None:
    torch.manual_seed(0)
    model = COOKIEForPreTraining(COOKIEConfig(**SMALL))
    picture = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    regions, words = find_maps(model, TOKENIZER, picture, TEXT).groups
    pixels = (picture.float() / 255 * 2 - 1)[None]
    ids = TOKENIZER(TEXT, return_tensors="pt")
    with torch.no_grad():
        image = model.encode_video(pixels)
        text = model.encode_text(ids["input_ids"], ids["attention_mask"])
        cosines = torch.cosine_similarity(text.states[0], text.embeds, dim=-1)[1:-1]
        (panel,) = regions.panels
        wanted = torch.cosine_similarity(image.states[0], image.embeds, dim=-1).view(4, 4)
        assert panel.values is not None
        torch.testing.assert_close(panel.values, wanted - wanted.min(), rtol=1e-4, atol=1e-5)
        pieces = TOKENIZER.tokenize(TEXT)
        best = cosines.argsort(descending=True, stable=True)[:5].tolist()
        assert [panel.label for panel in words.panels] == [
            f"{pieces[k]} {cosines[k]:.2f}" for k in best
        ]
        for place, panel in zip(best, words.panels, strict=True):
            own = torch.cosine_similarity(image.states[0], text.states[0, 1 + place], dim=-1)
            assert panel.values is not None
            shown = own.view(4, 4) - own.min()
            torch.testing.assert_close(panel.values, shown, rtol=1e-4, atol=1e-5)
        torch.nn.init.constant_(model.text_type, torch.nan)
        with pytest.raises(ValueError, match=r"visualize: words: .* not finite"):
            find_maps(model, TOKENIZER, picture, TEXT)
