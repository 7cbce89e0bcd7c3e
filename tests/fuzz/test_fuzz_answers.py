"""Whatever a judge or its server answers, it is a value of the promised kind, None, or a BadAnswer."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from fuzzing import JSON, NUMBERS, WORDS, tries
from hypothesis import given
from hypothesis import strategies as st

from sae_ray.judge.asking import BadAnswer
from sae_ray.judge.explainer import MAX_WORDS, parse_explanation
from sae_ray.judge.explainers.asking import Prompt, parse
from sae_ray.judge.openai_answers import (
    by_index,
    continuation_reading,
    message_of,
    token_logprobs,
    usage_of,
    yes_no_reading,
)
from sae_ray.judge.scorers.simulation import SCALE, parse_list
from sae_ray.judge.scorers.verdicts import parse_option

NONCE = "4711"
_PIECES = [
    *(
        '{"explanation": "',
        '"}',
        "{",
        "}",
        "[",
        "]",
        "```json\n",
        "```",
        "\n",
        "The topic of these texts is: ",
        "<<",
        ">>",
    ),
    *(
        "words",
        "dates and times",
        "I'm sorry",
        NONCE,
        "\\n",
        "\\u12",
        "\ud800",
        "█",
        "{7}",
        ". ",
        " ; ",
        "a",
        "of",
        "1",
    ),
    *('"option": ', '"option": 2', '"option": "2"', "12", "1.5", "2,5", "e999", "NaN", "\x1b[2J"),
]
ANSWERS = st.lists(st.one_of(st.sampled_from(_PIECES), st.text(max_size=6)), max_size=20).map("".join)


@tries(0.10)
@given(answer=st.one_of(ANSWERS, JSON.map(json.dumps)), chat=st.booleans())
def test_an_explanation_is_a_short_phrase_or_a_failure(answer, chat):
    for phrase in (parse(answer, Prompt("...", NONCE), chat), parse_explanation(answer)):
        assert phrase is None or (0 < len(phrase.split()) <= MAX_WORDS and "\n" not in phrase)


@tries(0.06)
@given(answer=st.one_of(ANSWERS, JSON.map(json.dumps)), options=st.lists(WORDS.filter(bool), min_size=1, max_size=4))
def test_an_option_is_one_of_those_that_were_named_or_a_failure(answer, options):
    found = parse_option(answer, "option", options)
    assert found is None or found in options


def test_an_answer_without_an_option_does_not_name_the_option_none():
    assert parse_option("{}", "option", ["None"]) is None
    assert parse_option('{"option": null}', "option", ["None"]) == "None"


@tries(0.08)
@given(
    pieces=st.lists(st.one_of(WORDS, st.sampled_from(['"', "\\", '": 3', "\n", " a"])), max_size=6),
    values=st.lists(st.one_of(NUMBERS, st.just("unknown")), max_size=7),
    noise=ANSWERS,
    spoil=st.booleans(),
)
def test_a_simulation_is_a_number_for_every_token_or_a_failure(pieces, values, noise, spoil):
    lines = [f"{json.dumps(piece)}: {value}" for piece, value in zip(pieces, values, strict=False)]
    answer = "\n".join([*lines, noise] if spoil else lines)
    found = parse_list(answer, pieces)
    if found is not None:
        assert found.shape == (len(pieces),)
        assert ((found >= 0) & (found <= SCALE) & (found == np.round(found))).all()


def value_or_bad(function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except BadAnswer:
        return None


SPELLINGS = [" a", "a", "Ġa", "▁b", " b"]
CHOICE = st.fixed_dictionaries(
    {},
    optional={
        "index": st.one_of(st.integers(0, 3), JSON),
        "logprobs": st.one_of(
            JSON,
            st.fixed_dictionaries(
                {},
                optional={
                    "tokens": st.one_of(
                        JSON, st.lists(st.one_of(WORDS, st.sampled_from([" a", "a", "Ġa", "▁b", " b"])))
                    ),
                    "token_logprobs": st.one_of(JSON, st.lists(st.one_of(st.none(), NUMBERS))),
                },
            ),
        ),
    },
)


@tries(0.10)
@given(
    choices=st.one_of(JSON, st.lists(st.one_of(CHOICE, JSON), max_size=3)),
    expected=st.integers(0, 3),
    usage=JSON,
    generated=st.integers(0, 2),
)
def test_an_answer_of_a_server_is_readings_or_a_bad_answer(choices, expected, usage, generated):
    # As it comes: what cannot be written as JSON cannot arrive.
    answer = json.loads(json.dumps({"choices": choices, "usage": usage}))
    assert all(isinstance(count, int) for count in usage_of(answer).values())
    for choice in value_or_bad(by_index, answer, expected) or ():
        found = value_or_bad(token_logprobs, choice)
        if found is None:
            continue
        for continuation in (" a", " a b", "x"):
            reading = continuation_reading(*found, continuation, generated)
            assert reading is None or (math.isfinite(reading[0]) and reading[1] >= 1)


@tries(0.04)
@given(st.lists(st.tuples(st.one_of(WORDS, st.sampled_from(["Yes", " no", "ĠYES"])), st.floats()), max_size=6))
def test_log_odds_are_a_number_or_missing(alternatives):
    value = yes_no_reading(alternatives)
    assert value is None or not math.isnan(value)


@tries(0.04)
@given(raw=st.one_of(st.binary(max_size=80), JSON.map(lambda value: json.dumps({"error": value}).encode()), ANSWERS.map(
    lambda text: text.encode(errors="replace")
)))  # fmt: skip
def test_what_an_error_says_is_one_printable_line(raw):
    said = message_of(raw)
    assert said.isprintable()
    assert len(said) <= 12 * 300


def test_answers_nested_deeper_than_python_reads_are_failures():
    deep = '{"explanation": ' + '{"a": ' * 50_000
    assert parse(deep, Prompt("...", ""), chat=True) is None
    assert parse_option("[" * 50_000, "option", ["1"]) is None
    assert message_of(b"[" * 50_000)


def test_good_answers_are_read_as_what_they_say():
    """The tests above would pass if nothing were ever read."""
    assert parse('{"explanation": "dates and times"}', Prompt("...", NONCE), chat=True) == "dates and times"
    assert parse_option('{"option": 2}', "option", ["1", "2"]) == "2"
    assert (parse_list('"a": 3\n" b": 10', ["a", " b"]) == [3, 10]).all()
    choice = {"index": 0, "logprobs": {"tokens": ["x", " a"], "token_logprobs": [None, -2]}}
    assert continuation_reading(*token_logprobs(by_index({"choices": [choice]}, 1)[0]), " a", 0) == (-2.0, 1)
