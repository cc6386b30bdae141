"""Texts as the released checkpoints were trained on them: [CLS] and pieces, without [SEP]."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase

from svitt_ops.training.data.collate import Collator, encode_texts
from svitt_ops.training.data.datasets import Clip
from svitt_ops.training.data.text import append_sep, clean_caption, save_tokenizer
from svitt_ops.training.engine.build import build_tokenizer

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "svitt" / "tokenizer.json").read_text())


def bert() -> PreTrainedTokenizerBase:
    return BertTokenizer(vocab={piece: k for k, piece in enumerate(GOLDEN["vocab"])})


def encoded(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> list[int]:
    found = encode_texts(tokenizer, [text], length, "max")
    return found["input_ids"][0][found["attention_mask"][0].bool()].tolist()


def test_ids_are_the_authors(tmp_path: Path) -> None:
    tokenizer = append_sep(bert(), False)
    save_tokenizer(tokenizer, tmp_path)
    for loaded in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for caption in GOLDEN["captions"]:
            text = clean_caption(caption["raw"])
            assert text == " ".join(caption["pre_text"].split())
            assert encoded(loaded, text, GOLDEN["max_length"]) == caption["ids"], caption
        for question in GOLDEN["questions"]:
            ids = encoded(loaded, clean_caption(question["raw"]), GOLDEN["max_q_len"])
            assert ids == question["ids"]
        for answer in GOLDEN["answers"]:
            assert encoded(loaded, f"{answer['raw']} [SEP]", GOLDEN["max_a_len"]) == answer["ids"]
        assert loaded.num_special_tokens_to_add() == 1
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        assert sorted(loaded.all_special_tokens) == sorted(special)


def test_the_separator_comes_and_goes(tmp_path: Path) -> None:
    tokenizer = bert()
    assert append_sep(tokenizer, True) is tokenizer
    without = append_sep(tokenizer, False)
    assert append_sep(without, False) is without
    assert tokenizer("a dog")["input_ids"] == [2, 5, 80, 3]  # as it was
    assert without("a dog")["input_ids"] == [2, 5, 80]
    assert without("a dog", "the cat")["input_ids"] == [2, 5, 80, 3, 77, 81]
    again = append_sep(without, True)
    save_tokenizer(again, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a dog", "", "the [MASK] is"):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("sep", [True, False])
def test_special_tokens_are_never_masked(sep: bool) -> None:
    tokenizer = append_sep(bert(), sep)
    collate = Collator(tokenizer=tokenizer, text_length=8, mask_probability=1.0)
    frames = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    texts = ["a dog \N{SNOWMAN}", "", "the cat is on the beach"]
    batch = collate([Clip(frames, text, k, k) for k, text in enumerate(texts)])
    ids, labels = batch["input_ids"], batch["mlm_labels"]
    special = torch.isin(ids, torch.arange(5))
    assert torch.equal(labels != -100, ~special)
    assert torch.equal(batch["mlm_input_ids"][special], ids[special])
    assert (ids == 3).any() == sep and (ids == 1).any()


def test_official_files_have_texts_without_separator(make_recipe: Any, tmp_path: Path) -> None:
    entries: list[Any] = []
    save_tokenizer(bert(), tmp_path / "bert")
    (tmp_path / "official.pth").touch()

    def ids(*overrides: str) -> list[int]:
        recipe = make_recipe(tmp_path / "run", f"tokenizer.name={tmp_path / 'bert'}", *overrides)
        tokenizer = build_tokenizer(recipe, entries)
        found: list[int] = tokenizer("a dog")["input_ids"]
        return found

    plain, ended = [2, 5, 80], [2, 5, 80, 3]
    none = "tokenizer.train_vocab_size=null"
    official = f"init.checkpoint={tmp_path / 'official.pth'}"
    assert ids(none) == ended
    assert ids(none, "tokenizer.append_sep=false") == plain
    assert ids(none, official) == plain
    assert ids(none, official, "tokenizer.append_sep=true") == ended
    save_tokenizer(append_sep(bert(), False), tmp_path / "bert")
    assert ids(none) == plain  # of an earlier run


def test_a_run_keeps_its_texts(make_recipe: Any, tmp_path: Path) -> None:
    from svitt_ops.training.engine.loading import load_trained
    from svitt_ops.training.engine.run import pretrain

    recipe = make_recipe(tmp_path / "run", "optimizer.steps=1", "tokenizer.append_sep=false")
    pretrain(recipe)
    _, tokenizer, _ = load_trained(tmp_path / "run")
    assert tokenizer.sep_token_id not in tokenizer("a red square")["input_ids"]
    checkpoint = AutoTokenizer.from_pretrained(tmp_path / "run" / "checkpoint-1")
    assert checkpoint("a red square")["input_ids"] == tokenizer("a red square")["input_ids"]


def test_tokenizers_of_other_libraries_are_named() -> None:
    class Own:
        cls_token, sep_token, sep_token_id = "a", "b", 3

        def __call__(self, _: str) -> dict[str, list[int]]:
            return {"input_ids": [2, 3]}

    with pytest.raises(ValueError, match=r"tokenizer\.append_sep: must be null .* with Own"):
        append_sep(Own(), False)
