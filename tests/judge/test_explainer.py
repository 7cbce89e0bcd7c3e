from __future__ import annotations

import pytest

from sae_ray.judge.explainer import (
    MAX_WORDS,
    background,
    explanation_prompt,
    lexical_explanation,
    parse_explanation,
)


def split(text: str) -> list[str]:
    return [(" " if i else "") + w for i, w in enumerate(text.split())]


def test_the_prompt_shows_active_tokens_marked_and_listed() -> None:
    prompt = explanation_prompt([split("open the file path now")], [[False, False, True, True, False]])
    assert "- open the <<file path>> now" in prompt
    assert prompt.endswith("Marked words: file, path\nTopic:")


def test_a_long_context_is_cut_around_its_first_firing() -> None:
    words = split(" ".join(f"word{i}" for i in range(200)) + " target " + " ".join(f"tail{i}" for i in range(200)))
    prompt = explanation_prompt([words], [[w == " target" for w in words]])
    assert "<<target>>" in prompt
    assert "word0 " not in prompt
    assert "tail199" not in prompt


@pytest.mark.parametrize(
    ("completion", "phrase"),
    [
        (" file paths and directories\n\nTexts:", "file paths and directories"),
        ("Topic: dates.", "dates"),
        ("The topic of these texts is HTTP requests. They are", "HTTP requests"),
        (' "string encoding"', "string encoding"),
        ("the use of a", "the use"),
        ("word word word word word", "word word"),
        ("", None),
        ("\n\n", None),
        ("<<>> -- 12", None),
        ("I'm sorry, I cannot", None),
        ("Marked words: a, b", None),
    ],
)
def test_completions_are_parsed_to_a_phrase_or_counted_as_failures(completion: str, phrase: str | None) -> None:
    assert parse_explanation(completion) == phrase


def test_explanations_are_short() -> None:
    phrase = parse_explanation(" ".join(f"word{chr(97 + i)}" for i in range(26)))
    assert phrase is not None
    assert len(phrase.split()) == MAX_WORDS


def test_the_lexical_candidate_names_what_it_fires_on_more_than_the_corpus_does() -> None:
    contexts = [split("open the file at this path"), split("the path of the file")]
    corpus = background([split("the a of at this open and is " * 50), split("file path")])
    found = lexical_explanation(contexts, [" file", " path", " file", " the"], corpus, words=2)
    assert found == "file, path"


def test_a_latent_that_fires_on_spaces_is_explained_by_its_contexts() -> None:
    contexts = [split("red green colour"), split("blue colour wheel")]
    corpus = background([split("some other words here " * 20)])
    assert lexical_explanation(contexts, [" ", "\n"], corpus) == "colour"


def test_nothing_to_name_is_no_explanation() -> None:
    assert lexical_explanation([], [" "], {}) is None


def test_the_lexical_candidate_does_not_depend_on_the_order_of_evidence() -> None:
    contexts = [split("alpha beta gamma"), split("gamma delta beta")]
    corpus = background(contexts)
    active = [" beta", " gamma", " alpha"]
    assert lexical_explanation(contexts, active, corpus) == lexical_explanation(contexts[::-1], active[::-1], corpus)
