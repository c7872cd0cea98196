"""Vocabularies: exact round trips, the same text gives the same tokens, bad input refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memspan.base import BadInput
from memspan.data.text import BPETokenizer, CharTokenizer, train_bpe

TEXT = "To be, or not to be,\nthat is the question:\n\nWhether 'tis nobler\t in the mind — to suffer\r\n" * 9
WORDS = train_bpe(TEXT, size=300)


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=40))
def test_any_text_survives_byte_pairs_even_bytes_never_seen(text):
    assert WORDS.decode(WORDS.encode(text)) == text


def test_byte_pairs_are_deterministic_shorten_text_and_stay_below_the_size():
    again = train_bpe(TEXT, size=300)
    tokens = WORDS.encode(TEXT)
    assert np.array_equal(again.encode(TEXT), tokens)
    assert tokens.dtype == np.int64
    assert tokens.max() < len(WORDS) == 300
    assert len(tokens) < len(TEXT.encode()) / 1.5


def test_characters_take_one_number_each_and_unknown_ones_zero():
    letters = CharTokenizer(TEXT)
    tokens = letters.encode(TEXT)
    assert len(tokens) == len(TEXT)
    assert letters.decode(tokens) == TEXT
    assert tokens.min() >= 1
    assert tokens.max() == len(letters) - 1 == len(set(TEXT))
    assert letters.encode("tQ").tolist()[1] == 0 or "Q" in TEXT


@pytest.mark.parametrize(("kind", "made"), [(BPETokenizer, WORDS), (CharTokenizer, CharTokenizer(TEXT))])
def test_a_vocabulary_kept_as_text_encodes_alike(kind, made):
    again = kind.from_json(made.to_json())
    assert np.array_equal(again.encode(TEXT), made.encode(TEXT))
    assert again.decode(again.encode(TEXT)) == TEXT


def test_empty_texts_small_sizes_and_broken_vocabularies_are_refused():
    with pytest.raises(BadInput, match="size=200"):
        train_bpe(TEXT, size=200)
    with pytest.raises(BadInput, match="texts="):
        train_bpe([])
    with pytest.raises(BadInput, match="text="):
        CharTokenizer("")
    with pytest.raises(BadInput, match="to_json"):
        BPETokenizer.from_json("{")
