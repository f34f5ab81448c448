import pathlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jsurgery.config import CHOICES, ITEMS, base, flatten, validate
from jsurgery.errors import InputError
from jsurgery.load_config import config_path, load_config, override

SHIPPED = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


def assert_refused(overrides, *parts, name="tiny"):
    with pytest.raises(InputError) as raised:
        load_config(name, overrides)
    message = str(raised.value)
    for part in parts:
        assert part in message, message
    assert "\n" not in message


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_are_valid_by_path_and_by_name(path):
    config = load_config(str(path))
    assert config == load_config(path.stem)
    assert [name for name, _ in flatten(config)] == [name for name, _ in flatten(base())]
    assert config_path(path.stem) == path


def test_wan_configs_have_the_settings_of_the_paper():
    """Appendix A.1: 50 steps, guidance 5, Euler ancestral; distillation: 1e-3, batch 1; fine-tuning: 1e-5, batch 16."""
    for name, tokens in (("wan_1_3b_lowres", 12_600), ("wan_1_3b", 32_760), ("wan_14b", 32_760)):
        c = load_config(name)
        assert ((c.video.frames - 1) // 4 + 1) * (c.video.height // 16) * (c.video.width // 16) == tokens
        assert (c.sampler.steps, c.sampler.guidance, c.trace.solver) == (50, 5.0, "euler_ancestral")
        assert (c.distill.loss, c.distill.learning_rate, c.distill.batch) == ("value", 1e-3, 1)
        assert (c.finetune.learning_rate, c.finetune.batch, c.finetune.steps) == (1e-5, 16, 1000)
        assert (c.hybrid.degree, c.hybrid.layers, tuple(c.plan.rates)) == (2, 2, (1, 2, 4, 8))
        assert (c.model.dtype, c.plan.budget) == ("bfloat16", "20R2" if name == "wan_14b" else "15R2")


def test_a_loaded_config_is_locked():
    config = load_config("tiny")
    with pytest.raises(AttributeError):
        config.video.frame = 17


def test_the_base_config_is_valid():
    validate(base())


def test_overrides_take_the_type_of_the_default():
    given_texts = {
        "seed": "7",
        "sampler.shift": "5",
        "sampler.guidance": "1e-1",
        "model.path": "123",
        "distill.calibrate": "true",
        "hybrid.linear_branch": "False",
        "hybrid.rates": "(2, 8, 'linear')",
        "plan.rates": "[1, 2]",
        "train.vae_crop": "(5, 64, 48)",
    }
    config = dict(flatten(load_config("tiny", given_texts)))
    assert {field: config[field] for field in given_texts} == {
        "seed": 7,
        "sampler.shift": 5.0,
        "sampler.guidance": 0.1,
        "model.path": "123",
        "distill.calibrate": True,
        "hybrid.linear_branch": False,
        "hybrid.rates": (2, 8, "linear"),
        "plan.rates": (1, 2),
        "train.vae_crop": (5, 64, 48),
    }
    assert type(config["sampler.shift"]) is float


@pytest.mark.parametrize("name", ["tiny", "wan_1_3b"])
def test_rates_are_numbers_and_names_whatever_the_default_has(name):
    rates = {"hybrid.rates": "(2, 'linear', 'C3O1')", "plan.rates": "(1, 2, 'C3O1')", "plan.budget": "1R2"}
    config = load_config(name, rates)
    assert (config.hybrid.rates, config.plan.rates) == ((2, "linear", "C3O1"), (1, 2, "C3O1"))
    with pytest.raises(InputError, match="config.plan.rates: expected"):
        load_config(name, rates | {"plan.rates": "(1, 2.5)"})
    with pytest.raises(InputError, match="C3X1"):
        load_config(name, rates | {"plan.rates": "(1, 'C3X1')"})


@pytest.mark.parametrize(
    ("text", "budget"), [("15R2", "15R2"), ("3Rlinear", "3Rlinear"), ("0.6", 0.6), ("2e12", 2e12), ("1", 1)]
)
def test_a_budget_is_a_name_or_a_number(text, budget):
    config = load_config("tiny", {"plan.budget": text})
    assert config.plan.budget == budget
    with config.unlocked():
        assert config.copy_and_resolve_references().plan.budget == budget


def test_a_single_rate_needs_no_parentheses():
    assert load_config("tiny", {"plan.rates": "8"}).plan.rates == (8,)


@pytest.mark.parametrize(
    ("field", "text", "parts"),
    [
        ("video.frame", "17", ["config.video.frame", "unknown", "did you mean config.video.frames?"]),
        ("finetune.learning_rte", "1", ["did you mean config.finetune.learning_rate?"]),
        ("video", "17", ["config.video", "unknown field"]),
        ("seed.x", "1", ["config.seed.x", "unknown field"]),
        ("", "1", ["unknown field"]),
        ("seed", "1.5", ["config.seed", "int", "'1.5'"]),
        ("seed", "True", ["config.seed", "int", "'True'"]),
        ("seed", "{[]}", ["config.seed", "int"]),
        ("sampler.shift", "high", ["config.sampler.shift", "float", "'high'"]),
        ("sampler.shift", "1e999", ["config.sampler.shift", "inf"]),
        ("sampler.shift", "-1", ["config.sampler.shift", "positive", "-1"]),
        ("finetune.batch", "0", ["config.finetune.batch", "positive"]),
        ("model.remat", "yes", ["config.model.remat", "none, blocks, matmuls", "'yes'"]),
        ("finetune.accumulate", "5", ["config.finetune.accumulate", "divisor of config.finetune.batch = 4", "5"]),
        ("hybrid.linear_branch", "yes", ["config.hybrid.linear_branch", "bool", "'yes'"]),
        ("data.two_sprites", "1.5", ["config.data.two_sprites", "between 0 and 1"]),
        ("plan.budget", "(1, 2)", ["config.plan.budget", "15R2"]),
        ("plan.budget", "True", ["config.plan.budget", "15R2"]),
        ("plan.budget", "-0.5", ["config.plan.budget", "positive"]),
        ("hybrid.rates", "(2, 3)", ["config.hybrid.rates", "2 does not divide 3"]),
        ("hybrid.rates", "(2, 2)", ["config.hybrid.rates", "distinct"]),
        ("hybrid.rates", "()", ["config.hybrid.rates"]),
        ("hybrid.rates", "(0, 2)", ["config.hybrid.rates", "found 0"]),
        ("hybrid.rates", "(2, 'lin')", ["config.hybrid.rates", "'lin'"]),
        ("hybrid.rates", "(2, (4,))", ["config.hybrid.rates"]),
        ("hybrid.rates", "(2, 4.0)", ["config.hybrid.rates"]),
        ("plan.rates", "(1, 16)", ["config.plan.rates", "rate 16"]),
        ("train.vae_crop", "abc", ["config.train.vae_crop", "tuple"]),
        ("train.vae_crop", "(8, 80, 80)", ["config.train.vae_crop: frames", "4k + 1", "5 and 9"]),
        ("train.vae_crop", "(9, 84, 80)", ["config.train.vae_crop: height", "multiple of 8", "80 and 88"]),
        ("train.vae_crop", "(9, 80)", ["config.train.vae_crop", "frames, height and width"]),
        ("train.vae_crop", "(9, True, 80)", ["config.train.vae_crop", "tuple"]),
        ("distill.steps", "1" + "0" * 400, ["config.distill.steps", "at most"]),
        ("sampler.shift", "1" + "0" * 400, ["config.sampler.shift", "positive number, found inf"]),
        ("plan.budget", "1" + "0" * 400, ["config.plan.budget", "at most"]),
        ("prompts", "a\0b", ["config.prompts", "null byte"]),
        ("sampler.negative_prompt", "\udc80", ["config.sampler.negative_prompt", "UTF-8"]),
        ("video.frames", "20", ["config.video.frames", "4k + 1", "17 and 21"]),
        ("video.frames", "3", ["1 and 5"]),
        ("video.height", "200", ["config.video.height", "multiple of 16", "192 and 208"]),
        ("video.width", "8", ["config.video.width", "16"]),
        ("trace.keep_steps", "99", ["config.trace.keep_steps", "99"]),
        ("trace.holdout", "9999", ["config.trace.holdout"]),
        (
            "distill.velocity_steps",
            "0",
            ["config.distill.velocity_steps", "config.plan.errors is 'velocity'", "found 0"],
        ),
        ("distill.blocks", "3-1", ["config.distill.blocks", "'0-9,12'", "'3-1'"]),
        ("distill.blocks", "0,,1", ["config.distill.blocks", "'0,,1'"]),
        ("distill.blocks", "all", ["config.distill.blocks", "'all'"]),
        ("profile", "-1", ["config.profile", "-1"]),
    ],
)
def test_bad_values_name_the_field_and_what_is_allowed(field, text, parts):
    assert_refused({field: text}, *parts)


@pytest.mark.parametrize("field", CHOICES)
def test_an_unknown_choice_lists_the_valid_ones(field):
    assert_refused({field: "nonsense"}, f"config.{field}", "'nonsense'", *CHOICES[field])
    for choice in CHOICES[field]:
        needed = {"hybrid.degree": "1", "hybrid.layers": "1"} if choice == "hedgehog" else {}
        assert dict(flatten(load_config("tiny", {field: choice, **needed})))[field] == choice


def test_an_unknown_name_lists_the_shipped_configs():
    assert_refused({}, "--config=tinny", *(path.stem for path in SHIPPED), name="tinny")
    assert_refused({}, "--config=no/such.py", "no such file", name="no/such.py")


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("c.video.frame = 17", ["frame"]),
        ("c.video.frames = 'many'", ["many"]),
        ("c.video.frames = 16", ["config.video.frames", "13 and 17"]),
        ("c = None", ["ConfigDict", "None"]),
        ("c.unlock(); c.extra = 1", ["extra"]),
        ("del c", ["UnboundLocalError"]),
        ("raise SystemExit(0)", ["SystemExit"]),
        ("raise RuntimeError('line one\\nline two')", ["RuntimeError"]),
    ],
)
def test_a_bad_config_file_is_refused(tmp_path, body, parts):
    file = tmp_path / "mine.py"
    file.write_text(
        f"from jsurgery.config import base\n\ndef get_config():\n    c = base()\n    {body}\n    return c\n"
    )
    with pytest.raises(InputError) as raised:
        load_config(str(file))
    assert all(part in str(raised.value) for part in parts), raised.value


def test_a_config_file_may_set_a_budget_of_another_type(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from jsurgery.config import base\n\ndef get_config():\n    c = base()\n    c.plan.budget = 0.6\n    return c\n"
    )
    assert load_config(str(file)).plan.budget == 0.6


VALUES = {
    int: st.integers(),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    str: st.text(),
    tuple: st.lists(st.integers(1), min_size=1).map(tuple),
}


@st.composite
def fields_and_values(draw):
    field, default = draw(st.sampled_from(flatten(base())))
    if field in ITEMS:
        return field, draw(st.lists(VALUES[ITEMS[field]], min_size=1).map(tuple))
    return field, draw(VALUES[type(default)])


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(fields_and_values())
def test_overrides_set_the_written_value_and_no_other_field(field_and_value):
    field, value = field_and_value
    config = base()
    before = dict(flatten(config))
    override(config, field, value if isinstance(value, str) else repr(value))
    after = dict(flatten(config))
    if field != "plan.budget":
        assert after[field] == value
        assert type(after[field]) is type(before[field])
    assert {name for name in after if after[name] != before[name]} <= {field}


def test_distilling_rate_1_and_linear_without_its_branch_are_refused():
    with pytest.raises(InputError, match=r"hybrid\.rates: 1 is full softmax"):
        load_config("tiny", {"hybrid.rates": '(1, 2, 4, 8, "linear")'})
    with pytest.raises(InputError, match=r"plan\.rates: 'linear' needs"):
        load_config("tiny", {"hybrid.linear_branch": "False"})
