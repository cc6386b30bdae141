"""Captions as text: cleaning, and the tokenizer by folder, by name, or trained on the corpus."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from transformers import (
    AutoTokenizer,
    BertTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from svitt_ops.training.data.paths import expand

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

_SIDES = re.compile(r"\b(?:left|right)|clockwise")


def names_a_side(caption: str) -> bool:
    """Whether a clean caption speaks of left, right or a sense of rotation, which mirrors swap."""
    return _SIDES.search(caption) is not None


def clean_caption(caption: str, max_words: int | None = None) -> str:
    """Lower-case a caption and drop its punctuation, as Singularity, SViTT and ALBEF do.

    `,.'!?"()*#:;~` are deleted, `-` and `/` become spaces, `<person>` becomes person.
    """
    text = re.sub(r"[,.'!?\"()*#:;~]", "", caption.lower())
    text = re.sub(r"[-/]", " ", text).replace("<person>", "person")
    words = text.split()
    return " ".join(words if max_words is None else words[:max_words])


def load_tokenizer(
    name_or_path: str | Path, name: str = "tokenizer.name"
) -> PreTrainedTokenizerBase:
    """A Hugging Face tokenizer: a folder on this machine, or the name of a downloaded one.

    Raises:
        ValueError: there is none, or it lacks a token; begins with `name`, the key or the option.
    """
    source = str(expand(name_or_path, name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    except Exception as error:  # of the parsers of several formats, about files of any content
        advice = "" if Path(source).exists() else f"; get it by: hf download {source}"
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{name}: must be a folder with a tokenizer or a downloaded Hugging Face tokenizer, got"
            f" {source!r} ({type(error).__name__}: {reason}){advice}"
        ) from error
    for token in ("pad_token", "cls_token", "sep_token", "mask_token"):
        if getattr(tokenizer, token) is None:
            raise ValueError(f"{name}: must have a {token}, {source!r} has none")
    if len(tokenizer) <= len(SPECIAL_TOKENS):  # what transformers makes of a missing vocabulary
        raise ValueError(f"{name}: must have a vocabulary, {source!r} has {len(tokenizer)} pieces")
    return tokenizer


def append_sep(tokenizer: PreTrainedTokenizerBase, append: bool) -> PreTrainedTokenizerBase:
    """A tokenizer whose texts end with [SEP], or with their last piece.

    BERT's texts are `[CLS] ... [SEP]`; those that SViTT, Singularity, ALBEF and SIMLA were trained
    on are `[CLS] ...`, with room for one piece more. Saving keeps it.

    Raises:
        ValueError: the tokenizer is not one of the `tokenizers` library.
    """
    # Imported here, as the trainer is below.
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    cls, sep = str(tokenizer.cls_token), str(tokenizer.sep_token)
    if (tokenizer("")["input_ids"][-1:] == [tokenizer.sep_token_id]) == append:
        return tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ValueError(
            f"tokenizer.append_sep: must be null with a tokenizer that is not of the tokenizers"
            f" library, got {append} with {type(tokenizer).__name__}"
        )
    pieces = Tokenizer.from_str(backend.to_str())
    end = f" {sep}" if append else ""
    pieces.post_processor = TemplateProcessing(
        single=f"{cls} $A{end}",
        pair=f"{cls} $A {sep} $B:1" + (f"{end}:1" if append else ""),
        special_tokens=[(cls, tokenizer.cls_token_id), (sep, tokenizer.sep_token_id)],
    )
    # Not the class it was: that of BERT puts its own template back when it is loaded.
    special = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        model_max_length=tokenizer.model_max_length,
        model_input_names=tokenizer.model_input_names,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        **{name: getattr(tokenizer, name) for name in special},
    )


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a WordPiece tokenizer, lower-case and with BERT's special tokens, on captions."""
    # Imported here: a run with a ready tokenizer has no use for the trainer.
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    texts = sorted(set(captions))
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=True)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The trainer would number the inner letters of words by hashing, break ties between merges by
    # these numbers, and so give every process a vocabulary of its own: announce them in order.
    inner: set[str] = set()
    for text in texts:
        for word, _ in pieces.pre_tokenizer.pre_tokenize_str(pieces.normalizer.normalize_str(text)):
            inner.update(word[1:])
    letters = [f"##{letter}" for letter in sorted(inner)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS + letters, show_progress=False
    )
    pieces.train_from_iterator(texts, trainer)
    return BertTokenizer(vocab=pieces.get_vocab(), do_lower_case=True)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer so that `load_tokenizer(folder)` reads it."""
    tokenizer.save_pretrained(str(folder))
