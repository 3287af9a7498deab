"""Prompts with times: reading them, what each section hears, cross-fades, errors."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowvram_video.framepack.sections import plan_sections
from lowvram_video.framepack.timed_prompts import TimedPart, parse_timed_prompt


def at(text: str, seconds: float, cross_fade: float = 0.0) -> dict[str, float]:
    return dict(parse_timed_prompt(text, cross_fade).prompts_at_time(seconds))


def test_the_parts_are_read() -> None:
    prompt = parse_timed_prompt(" a street,\n[2S : she  waves]  at dusk [0s: a man: tall] [3.5s - 5.25s:\nthey walk]")
    assert prompt.base == "a street, at dusk"
    assert prompt.parts == (
        TimedPart(0.0, None, "a man: tall"),
        TimedPart(2.0, None, "she waves"),
        TimedPart(3.5, 5.25, "they walk"),
    )
    assert parse_timed_prompt("only this").prompts() == ("only this",)
    assert parse_timed_prompt("").prompts_at_time(3.0) == [("", 1.0)]


@pytest.mark.parametrize(
    "text",
    [
        "[0s: 猫] [1.5s-3s: 犬]",
        "［0s：猫］［1.5s－3s：犬］",
        "【０ｓ：猫】【１．５秒〜３秒：犬】",
        "〔0秒：猫〕〔1.5秒—3秒：犬〕",
        "［0s﹕猫］［1.5s–3s∶犬］",
        "［0s：猫］［1.5s−3s：犬］",
    ],
)
def test_punctuation_of_other_keyboards(text: str) -> None:
    assert parse_timed_prompt(text).parts == (TimedPart(0.0, None, "猫"), TimedPart(1.5, 3.0, "犬"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # what holds at 0.5, 1.5, 2.5, 3.5, 4.5, 5.5 seconds
        ("[0s: a] [2s: b] [3s-5s: c]", "aabccb"),
        ("[2s: b]", "bbbbbb"),
        ("x [2s: b]", "xxbbbb"),
        ("x [1s-3s: b]", "xbbxxx"),
        ("[1s-3s: b]", "bbbbbb"),
        ("[0s: a] [1s-3s: b] [3s-4s: c]", "abbcaa"),
        ("x [0s: a] [1s-2s: b] [4s: c]", "abxxcc"),
        ("[1s-2s: b] [4s-5s: c]", "bbbbcc"),
        ("x [1s: x] [3s: x]", "xxxxxx"),
    ],
)
def test_what_holds_when(text: str, expected: str) -> None:
    heard = [parse_timed_prompt(text).prompts_at_time(0.5 + second) for second in range(6)]
    assert all(len(prompts) == 1 and prompts[0][1] == 1.0 for prompts in heard)
    assert "".join(prompts[0][0] for prompts in heard) == expected


def test_a_part_takes_over_at_its_second() -> None:
    assert at("[0s: a] [2s: b]", 1.999) == {"a": 1.0}
    assert at("[0s: a] [2s: b]", 2.0) == {"b": 1.0}


def test_cross_fade_is_linear_around_the_change() -> None:
    text = "[0s: a] [2s: b]"
    assert at(text, 1.5, 1.0) == {"a": 1.0}
    assert at(text, 1.75, 1.0) == pytest.approx({"a": 0.75, "b": 0.25})
    assert at(text, 2.0, 1.0) == pytest.approx({"a": 0.5, "b": 0.5})
    assert at(text, 2.25, 1.0) == pytest.approx({"a": 0.25, "b": 0.75})
    assert at(text, 2.5, 1.0) == {"b": 1.0}
    # a part shorter than the fade never holds alone
    assert at("[0s: a] [2s: b] [2.5s: c]", 2.25, 1.0) == pytest.approx({"a": 0.25, "b": 0.5, "c": 0.25})
    assert at("a [2s-2.5s: b]", 2.25, 1.0) == pytest.approx({"a": 0.5, "b": 0.5})


@settings(deadline=None)
@given(
    times=st.lists(st.integers(0, 60), min_size=1, max_size=6, unique=True),
    base=st.sampled_from(["", "base"]),
    seconds=st.floats(0.0, 80.0),
    cross_fade=st.one_of(st.just(0.0), st.floats(0.01, 20.0)),
)
def test_weights_sum_to_one(times: list[int], base: str, seconds: float, cross_fade: float) -> None:
    text = base + " ".join(f"[{time / 2}s: p{index}]" for index, time in enumerate(times))
    prompt = parse_timed_prompt(text, cross_fade)
    weights = prompt.prompts_at_time(seconds)
    assert sum(weight for _, weight in weights) == pytest.approx(1.0)
    assert all(weight > 0 for _, weight in weights)
    assert {name for name, _ in weights} <= set(prompt.prompts())
    if cross_fade == 0.0:
        assert len(weights) == 1


def test_times_are_of_the_finished_video() -> None:
    """The same moments hear the same prompts, whichever end is generated first."""
    prompt = parse_timed_prompt("[0s: a] [2s: b] [4s: c]", 0.5)
    base, f1 = plan_sections(6, mode="base"), plan_sections(6, mode="f1")
    assert [prompt.prompts_at(section) for section in base] == [prompt.prompts_at(section) for section in reversed(f1)]
    assert prompt.prompts_at(f1[0]) == [("a", 1.0)]  # 0 to 1.23 s
    assert prompt.prompts_at(f1[1])[0][0] == "a"  # 1.23 to 2.43 s: the middle is 1.83 s
    assert dict(prompt.prompts_at(f1[1])) == pytest.approx(
        {"a": 1 - (55 / 30 - 1.75) / 0.5, "b": (55 / 30 - 1.75) / 0.5}
    )
    assert prompt.prompts_at(base[0]) == [("c", 1.0)]
    assert prompt.unused(base) == ()
    assert parse_timed_prompt("[0s: a] [1.3s-1.5s: blink] [9s: late]").unused(base) == ("blink", "late")
    assert parse_timed_prompt("a street [0s: a] [2s: b]").unused(base) == ("a street",), "brackets hold all the time"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[2s she waves]", r"'\[2s she waves\]' does not begin with a time; write \[2s: text\]"),
        ("a [red] car", r"'\[red\]' does not begin with a time; .* use \( \) in prompts"),
        ("[2: x]", r"'\[2: x\]' does not begin with a time"),
        ("[-1s: x]", r"'\[-1s: x\]' does not begin with a time"),
        ("[2s: ]", r"'\[2s: \]' has a time but no text"),
        ("[3s-2s: x]", r"'\[3s-2s: x\]' ends at 2 s but starts at 3 s"),
        ("[2s: x", r"bracket '\[2s: x' is not closed"),
        ("[2s: x [3s: y]", r"bracket '\[2s: x \[3s: y' is not closed before the next one"),
        ("a man] walks [2s: x]", r"a '\]' without a '\[' after 'a man'"),
        ("[2s: x] y]", r"a '\]' without a '\[' after ' y'"),
        ("[2s: x] [2s: y]", "'x' and 'y' both start at 2 s"),
        ("[1s-4s: x] [2s: y]", "'y' starts at 2 s, before 'x' ends at 4 s; end the first at 2 s or start the second"),
    ],
)
def test_malformed_brackets_are_quoted(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_timed_prompt(text)


def test_cross_fade_has_to_be_a_duration() -> None:
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="cross_fade is"):
            parse_timed_prompt("x", value)
