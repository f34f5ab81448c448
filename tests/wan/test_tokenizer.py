import shutil

import numpy as np
import pytest
import sentencepiece
import transformers
from diffusers.pipelines.wan.pipeline_wan import prompt_clean

from jsurgery.errors import InputError
from jsurgery.wan.tokenizer import Tokenizer, clean_prompt, train_tokenizer

CAPTIONS = [
    f"a {color} {shape} {motion} over a {background} background"
    for color in ("red", "green", "blue", "yellow")
    for shape in ("circle", "square", "triangle")
    for motion in ("moves left", "moves right", "moves up", "stays still")
    for background in ("black", "grey")
] + ["a red circle moves left and a blue square stays still over a grey background"]

ODD_PROMPTS = [
    "",
    "   ",
    "a  red\t\ncircle ",
    "a red &amp; a blue square",
    "a red &amp;amp; a blue square",
    "Ünïcödé ☃ 红色的圆 קֶשֶׁת",
    "ﬁne ｆｕｌｌｗｉｄｔｈ Ⅳ",
    "redcircle circles unred",
    "\u00a0a\u3000red\u200bcircle",
    "donâ€™t â€œquoteâ€\x9d",
    "▁a ▁red",
    "a red circle " * 60,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(CAPTIONS, folder)
    return folder


@pytest.mark.parametrize("kept", ["spiece.model", "tokenizer.json"])
@pytest.mark.parametrize("length", [17, 64])
def test_ids_equal_transformers(folder, tmp_path, length, kept):
    """Whichever of the two model files transformers finds."""
    for file in (kept, "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(folder / file, tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(reference, transformers.T5TokenizerFast) and len(reference) == Tokenizer(folder).vocab_size
    prompts = CAPTIONS + ODD_PROMPTS
    expected = reference(
        [prompt_clean(prompt) for prompt in prompts], padding="max_length", max_length=length, truncation=True
    )
    token_ids, mask = Tokenizer(folder)(prompts, length)
    assert token_ids.dtype == mask.dtype == np.int32
    np.testing.assert_array_equal(token_ids, expected.input_ids)
    np.testing.assert_array_equal(mask, expected.attention_mask)


def test_every_word_of_the_captions_is_one_piece(folder):
    token_ids, mask = Tokenizer(folder)(CAPTIONS, 32)
    np.testing.assert_array_equal(mask.sum(axis=1), [len(caption.split()) + 1 for caption in CAPTIONS])
    assert 2 not in token_ids
    assert len(np.unique(token_ids, axis=0)) == len(CAPTIONS)


def test_padding_end_and_truncation(folder):
    tokenizer = Tokenizer(folder)
    token_ids, mask = tokenizer(["", "a red circle", "a red circle " * 20], 9)
    np.testing.assert_array_equal(mask.sum(axis=1), [1, 4, 9])
    assert token_ids[0].tolist() == [1] + [0] * 8
    assert token_ids[1, 3:].tolist() == [1, 0, 0, 0, 0, 0]
    assert token_ids[2, -1] == 1 and (token_ids[2, :-1] > 2).all()
    assert tokenizer(["a"])[0].shape == (1, 512)


def test_training_repeats_itself(folder, tmp_path):
    train_tokenizer(CAPTIONS, tmp_path)
    assert (tmp_path / "spiece.model").read_bytes() == (folder / "spiece.model").read_bytes()


def test_a_small_vocabulary_splits_words_and_a_tiny_one_is_refused(folder, tmp_path):
    small = train_tokenizer(CAPTIONS, tmp_path, vocab_size=40)
    assert small.vocab_size <= 40 < Tokenizer(folder).vocab_size
    assert small(CAPTIONS, 128)[1].sum() > Tokenizer(folder)(CAPTIONS, 128)[1].sum()
    with pytest.raises(InputError, match="0 different characters"):
        train_tokenizer([], tmp_path)
    with pytest.raises(InputError, match="vocab_size is 10; captions of .* need at least"):
        train_tokenizer(CAPTIONS, tmp_path, vocab_size=10)


ODDER_PROMPTS = [*ODD_PROMPTS, "<b>bold</b> &lt;i&gt; &nbsp; &#233; &#x1F600;", "a\x1cb\x85c\u2028d"]


@pytest.mark.parametrize("prompt", ODDER_PROMPTS)
def test_cleaning_equals_diffusers(prompt):
    assert clean_prompt(prompt) == prompt_clean(prompt)


def test_cleaning_does_something():
    assert clean_prompt(" a &amp;amp;  b\n") == "a & b"
    assert clean_prompt("donâ€™t") == "don't"


def test_missing_or_broken_model(tmp_path):
    with pytest.raises(InputError, match="spiece.model: not found"):
        Tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match="expected a SentencePiece model"):
        Tokenizer(tmp_path)


def test_other_conventions_of_ids(tmp_path):
    """UMT5's own vocabulary has <s> at 2 and <unk> at 3; one that starts otherwise is refused."""

    def spiece(**ids):
        with open(tmp_path / "spiece.model", "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(CAPTIONS), model_writer=file, vocab_size=40, minloglevel=2, **ids
            )

    spiece(pad_id=0, eos_id=1, bos_id=2, unk_id=3)
    assert Tokenizer(tmp_path)(["☃"], 4)[0][0, 1:].tolist() == [3, 1, 0]
    spiece(unk_id=0, bos_id=1, eos_id=2)
    with pytest.raises(InputError, match="expected the first pieces to be <pad> and </s>, found <unk> and <s>"):
        Tokenizer(tmp_path)
