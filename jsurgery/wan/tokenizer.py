"""Wan's tokenizer: it cleans a prompt, splits it by UMT5's SentencePiece model, and appends </s> (1) and padding (0).

In a prompt, the name of a special token, such as "</s>", is ordinary text.
"""

import base64
import collections
import html
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath

from jsurgery.errors import InputError
from jsurgery.wan.folder_hashes import check_hashes, write_hashes

PAD, EOS = 0, 1
UNK = 2  # in T5's vocabularies and in those made here; UMT5's own has <unk> at 3


def clean_prompt(prompt: str) -> str:
    """Wan's cleaning: repairs broken unicode, resolves HTML entities twice, folds whitespace to single spaces."""
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


class Tokenizer:
    """The SentencePiece model in a `tokenizer/` folder. Raises InputError if `spiece.model` is missing or damaged."""

    def __init__(self, path: epath.PathLike):
        import sentencepiece

        model_file = epath.Path(path) / "spiece.model"
        if not model_file.exists():
            raise InputError(f"{model_file}: not found; expected a tokenizer folder with a SentencePiece model")
        check_hashes(path)
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.load_from_serialized_proto(model_file.read_bytes())
            first = [self._pieces.id_to_piece(id) for id in (PAD, EOS) if id < self._pieces.vocab_size()]
        except (RuntimeError, UnicodeDecodeError) as error:
            raise InputError(f"{model_file}: expected a SentencePiece model, found something else") from error
        if first != ["<pad>", "</s>"]:
            raise InputError(
                f"{model_file}: expected the first pieces to be <pad> and </s>, found {' and '.join(first)}"
            )

    @property
    def vocab_size(self) -> int:
        return self._pieces.vocab_size()

    def kept(self, prompt: str, length: int, shown: int = 24) -> str | None:
        """The last characters of what `length` tokens hold of a prompt; None if they hold all of it."""
        ids = self._pieces.encode(clean_prompt(prompt))
        return None if len(ids) < length else self._pieces.decode(ids[: length - 1])[-shown:]

    def __call__(self, prompts: Sequence[str], length: int = 512) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and mask, both int32 [B, length]: every prompt cleaned, cut to fit, closed with EOS, padded."""
        token_ids_BxL = np.full((len(prompts), length), PAD, np.int32)
        mask_BxL = np.zeros((len(prompts), length), np.int32)
        for row, prompt in enumerate(prompts):
            ids = [*self._pieces.encode(clean_prompt(prompt))[: length - 1], EOS]
            token_ids_BxL[row, : len(ids)] = ids
            mask_BxL[row, : len(ids)] = 1
        return token_ids_BxL, mask_BxL


def describe_cut(tokenizer: Tokenizer, prompts: Sequence[str], length: int) -> str | None:
    """How many of the prompts are longer than `length` tokens, and where the first of them is cut; None without any."""
    kept = ((number, tokenizer.kept(prompt, length)) for number, prompt in enumerate(prompts))
    cut = [(number, end) for number, end in kept if end is not None]
    if not cut:
        return None
    number, end = cut[0]
    where = f"prompt {number + 1} ends with {end!r}" if len(prompts) > 1 else f"it ends with {end!r}"
    return f"{len(cut)} of {len(prompts)} prompts are cut at config.text_length = {length} tokens: {where}"


def train_tokenizer(captions: Iterable[str], folder: epath.PathLike, vocab_size: int = 256) -> Tokenizer:
    """Fits a unigram model to `captions` and writes the `tokenizer/` folder, which transformers loads too.

    The pieces are the captions' characters and, most frequent first, as many whole words as `vocab_size` has room for.
    A word's score is the logarithm of its frequency. The vocabulary may be smaller than `vocab_size`.
    Raises InputError if `vocab_size` is too small for the characters.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    spaces = dict.fromkeys(("add_dummy_prefix", "escape_whitespaces", "remove_extra_whitespaces"), True)
    normalizer = sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc", **spaces)
    counts = collections.Counter(
        word for caption in captions for word in re.findall("▁[^▁]+", normalizer.normalize(clean_prompt(caption)))
    )
    characters = sorted(set("".join(counts)))
    special = ["<pad>", "</s>", "<unk>"]
    room = vocab_size - len(special) - len(characters)
    if not characters or room < 0:
        raise InputError(
            f"tokenizer: vocab_size is {vocab_size}; captions of {len(characters)} different characters need at least "
            f"{vocab_size - room}"
        )
    words = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:room]
    scores = {word: math.log(count / counts.total()) for word, count in words}
    # Characters score below every word, so that no word is split into a shorter word and characters.
    character_score = min(scores.values(), default=0.0) - 1.0
    pieces = [*dict.fromkeys(special, 0.0).items(), *scores.items(), *((c, character_score) for c in characters)]

    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.ParseFromString(normalizer.serialized_model_proto())
    for piece, score in pieces:
        kind = {"<pad>": "CONTROL", "</s>": "CONTROL", "<unk>": "UNKNOWN"}.get(piece, "NORMAL")
        model.pieces.add(piece=piece, score=score, type=kind)
    spec = model.trainer_spec
    spec.model_type, spec.vocab_size = spec.UNIGRAM, len(pieces)
    spec.pad_id, spec.eos_id, spec.unk_id, spec.bos_id = PAD, EOS, UNK, -1

    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.SerializeToString(deterministic=True))
    names = dict(zip(("pad_token", "eos_token", "unk_token"), special, strict=True))
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 512, **names}
    fast = _fast_tokenizer(pieces, model.normalizer_spec.precompiled_charsmap)
    for file, content in (("special_tokens_map", names), ("tokenizer_config", config), ("tokenizer", fast)):
        (folder / f"{file}.json").write_text(json.dumps(content, indent=1) + "\n")
    write_hashes(folder, {}, "spiece.model", "special_tokens_map.json", "tokenizer_config.json", "tokenizer.json")
    return Tokenizer(folder)


def _fast_tokenizer(pieces: list[tuple[str, float]], precompiled_charsmap: bytes) -> dict[str, Any]:
    """The same model as a `tokenizer.json`, which transformers loads without sentencepiece and protobuf."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    text, end = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}
    other = {"Sequence": {"id": "B", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": piece, **flags} for id, (piece, _) in enumerate(pieces[:3])],
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(precompiled_charsmap).decode()},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [text, end],
            "pair": [text, end, other, end],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [EOS], "tokens": ["</s>"]}},
        },
        "decoder": metaspace,
        "model": {"type": "Unigram", "unk_id": UNK, "vocab": pieces, "byte_fallback": False},
    }
