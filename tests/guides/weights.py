"""Folders with the names of the BEiT and BERT that the guide fetches, with tiny random weights."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import BeitConfig, BeitModel, BertConfig, BertModel

from svitt_ops.training import save_tokenizer, train_tokenizer

BEIT = "beit-base-patch16-224-pt22k-ft22k"
BERT = "bert-base-uncased"
SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
LAYERS, TEXT_LAYERS = 3, 4
TINY = " ".join(
    f"model.{key}={value}"
    for key, value in {
        **SIZES,
        **{f"text_{name}": value for name, value in SIZES.items()},
        "num_hidden_layers": LAYERS,
        "text_num_hidden_layers": TEXT_LAYERS,
        "fusion_layer": 2,
        "prune_layers": "[1]",
        "multimodal_prune_layers": "[0]",
        "projection_dim": 16,
        "max_position_embeddings": 64,
    }.items()
)


def write_weights(folder: Path) -> None:
    """What `hf download` would bring, small; the tokenizer knows the words of `my.json`."""
    vision = BeitConfig(**SIZES, num_hidden_layers=LAYERS, use_relative_position_bias=True)
    BeitModel(vision).save_pretrained(folder / BEIT)
    captions = [str(entry["caption"]) for entry in json.loads((folder / "my.json").read_text())]
    tokenizer = train_tokenizer(captions, 200)
    save_tokenizer(tokenizer, folder / BERT)
    text = BertConfig(
        **SIZES,
        num_hidden_layers=TEXT_LAYERS,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
    )
    BertModel(text).save_pretrained(folder / BERT)
