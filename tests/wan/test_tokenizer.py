import json
import shutil

import numpy as np
import pytest
import sentencepiece
import tokenizers
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
    """Also for each of the two model files alone, since transformers reads either."""
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


# Pieces of these lines are combined into prompts.
CORPUS = [
    "A stylish woman walks down a Tokyo street filled with warm glowing neon and animated city signage.",
    "Several giant woolly mammoths approach, treading through a snowy meadow; their fur lightly blows in the wind.",
    "一只可爱的橘猫在阳光下的窗台上打盹，窗外是樱花盛开的街道。",
    "夜晚的城市，霓虹灯闪烁；镜头缓缓推进，电影质感，4K 高清。",
    "Ein Mann fährt mit dem Fahrrad über eine Brücke – die Straße glänzt vom Regen.",
    "Une fille court sur la plage, l'été, à contre‑jour… « magnifique » !",
    "青い海と白い砂浜、カメラはゆっくりと上昇する。",
    "Кот сидит на подоконнике и смотрит на улицу.",
    "&lt;b&gt;Tom &amp; Jerry&lt;/b&gt; &quot;run&quot; &#39;fast&#39; &amp;amp; &eacute; &#x1F600;",
    "🐱🚀✨ 👨‍👩‍👧‍👦 🇯🇵 ☃️ ½ ² ﬁ Ⅳ ｆｕｌｌ　ｗｉｄｔｈ",
    "tabs\tand\nnewlines\r\n  and    many   spaces\u00a0\u3000\u200b.",
    "camera: 35mm, f/1.8; 24fps @ 1/48s -- [wide shot] {b-roll} <lora:film:0.8> C:\\path\\file.mp4 100%",
]


def two_hundred_prompts() -> list[str]:
    rng = np.random.default_rng(0)
    prompts = ["", " ", *CORPUS, " ".join(CORPUS) * 12]
    while len(prompts) < 200:
        pieces = rng.choice(CORPUS, size=rng.integers(1, 4))
        cuts = [sorted(rng.integers(0, len(piece) + 1, size=2)) for piece in pieces]
        separator = str(rng.choice(["", " ", "\n", "，", "&nbsp;"]))
        prompts.append(separator.join(piece[a:b] for piece, (a, b) in zip(pieces, cuts, strict=True)))
    return prompts


@pytest.mark.parametrize("byte_fallback", [True, False])
def test_ids_of_prompts_in_many_languages_equal_transformers(tmp_path, byte_fallback):
    """With UMT5's ids (pad 0, end 1, unknown 3) and a vocabulary that lacks some scripts of the prompts."""
    with open(tmp_path / "spiece.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS[:7]), model_writer=file, vocab_size=460, minloglevel=2, pad_id=0, eos_id=1,
            bos_id=2, unk_id=3, byte_fallback=byte_fallback, hard_vocab_limit=False,
        )  # fmt: skip
    reference = transformers.T5Tokenizer.from_pretrained(tmp_path, extra_ids=0)
    # transformers assumes T5's unknown piece and no bytes, contrary to UMT5's tokenizer.json.
    vocabulary = json.loads(reference.backend_tokenizer.to_str())["model"]["vocab"]
    reference.backend_tokenizer.model = tokenizers.models.Unigram(
        [tuple(entry) for entry in vocabulary], unk_id=3, byte_fallback=byte_fallback
    )
    prompts, length = two_hundred_prompts(), 512
    cleaned = [prompt_clean(prompt) for prompt in prompts]
    expected = reference(cleaned, padding="max_length", max_length=length, truncation=True)
    token_ids, mask = Tokenizer(tmp_path)(prompts, length)
    np.testing.assert_array_equal(token_ids, expected.input_ids)
    np.testing.assert_array_equal(mask, expected.attention_mask)
    lengths = [len(ids) for ids in reference(cleaned).input_ids]
    assert len(prompts) == 200 and max(lengths) > 600 and (3 in token_ids) == (not byte_fallback)
    raw = reference(prompts, padding="max_length", max_length=length, truncation=True)
    assert not np.array_equal(token_ids, raw.input_ids)  # a control: cleaning changes the ids


def test_every_word_of_the_captions_is_one_piece(folder):
    token_ids, mask = Tokenizer(folder)(CAPTIONS, 32)
    np.testing.assert_array_equal(mask.sum(axis=1), [len(caption.split()) + 1 for caption in CAPTIONS])
    assert 2 not in token_ids
    assert len(np.unique(token_ids, axis=0)) == len(CAPTIONS)


def test_padding_end_token_and_truncation(folder):
    tokenizer = Tokenizer(folder)
    token_ids, mask = tokenizer(["", "a red circle", "a red circle " * 20], 9)
    np.testing.assert_array_equal(mask.sum(axis=1), [1, 4, 9])
    assert token_ids[0].tolist() == [1] + [0] * 8
    assert token_ids[1, 3:].tolist() == [1, 0, 0, 0, 0, 0]
    assert token_ids[2, -1] == 1 and (token_ids[2, :-1] > 2).all()
    assert tokenizer(["a"])[0].shape == (1, 512)


def test_training_is_deterministic(folder, tmp_path):
    train_tokenizer(CAPTIONS, tmp_path)
    assert (tmp_path / "spiece.model").read_bytes() == (folder / "spiece.model").read_bytes()


def test_small_vocabularies_split_words_and_too_small_ones_are_refused(folder, tmp_path):
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


def test_cleaning_unescapes_and_repairs_text():
    assert clean_prompt(" a &amp;amp;  b\n") == "a & b"
    assert clean_prompt("donâ€™t") == "don't"


def test_missing_or_damaged_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="spiece.model: not found"):
        Tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match="expected a SentencePiece model"):
        Tokenizer(tmp_path)


def test_special_ids_of_umt5_are_supported_and_others_refused(tmp_path):
    """UMT5's vocabulary has <s> at 2 and <unk> at 3."""

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
