"""A trained model as a module of sentence-transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_svitt import SVITT

from svitt_ops.models import SViTTConfig, SViTTForRetrieval
from svitt_ops.training.corpora.shapes import CorpusSpec, plan, write_video
from svitt_ops.training.data.processor import VideoTextProcessor
from svitt_ops.training.data.text import train_tokenizer

pytest.importorskip("sentence_transformers")
from sentence_transformers import SentenceTransformer

from svitt_ops.integrations.sentence_transformers import VideoTextEncoder

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["a red circle", "a blue square then a red circle"]
SMALL: dict[str, Any] = {**SVITT, "eval_pattern_seed": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a run leaves one, with `clip.mp4` and `photo.png` in it."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS, 60)
    SViTTForRetrieval(SViTTConfig(**SMALL)).save_pretrained(path)
    VideoTextProcessor(tokenizer, size=16, num_frames=2).save_pretrained(path)
    spec = CorpusSpec(size=16, frames=4, train_films=1)
    (pictures, *_) = plan(spec)[0].shoot(spec).values()
    write_video(path / "clip.mp4", pictures)
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(noise).save(path / "photo.png")
    return path


def test_texts_and_videos(folder: Path, tmp_path: Path) -> None:
    encoder = SentenceTransformer(modules=[VideoTextEncoder.from_pretrained(folder)])
    film, photo = str(folder / "clip.mp4"), str(folder / "photo.png")
    films = torch.from_numpy(encoder.encode([film, {"video": film}]))
    texts = torch.from_numpy(encoder.encode(TEXTS))
    assert films.shape == (2, encoder.get_embedding_dimension()) == (2, 8)
    module: Any = encoder[0]
    with torch.no_grad():
        given = module.processor(videos=film, text=TEXTS)
        video = module.model.encode_video(given["pixel_values"]).embeds
        text = module.model.encode_text(given["input_ids"], given["attention_mask"]).embeds
    torch.testing.assert_close(films, video.expand(2, -1))
    torch.testing.assert_close(texts, text)
    torch.testing.assert_close(encoder.similarity(films, texts), films @ texts.T)
    one, other = encoder.encode([photo, Image.open(photo)])
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    encoder.save_pretrained(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), trust_remote_code=True)
    torch.testing.assert_close(torch.from_numpy(again.encode([film, film])), films)


def test_refusals(folder: Path) -> None:
    encoder = SentenceTransformer(modules=[VideoTextEncoder.from_pretrained(folder)])
    (folder / "broken.mp4").write_bytes(b"no film")
    for value in (str(folder / "broken.mp4"), {"video": np.zeros((2, 4, 4, 5), np.uint8)}):
        with pytest.raises(ValueError, match=r"broken\.mp4|a picture must be uint8"):
            encoder.encode([value])
    module: Any = encoder[0]
    with pytest.raises(ValueError, match=r"model must embed videos and texts, .* got Linear"):
        VideoTextEncoder(torch.nn.Linear(2, 2), module.processor)
