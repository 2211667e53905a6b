"""The byte-level tokenizer, and what loading makes of one without a pad token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from launch.errors import UserError
from launch.tokenizer import BYTE_SPECIAL_TOKENS, byte_tokenizer, load_tokenizer

TOKENIZER = byte_tokenizer()


@given(st.text())
def test_a_token_is_a_byte(text):
    if any(token in text for token in BYTE_SPECIAL_TOKENS):
        return
    ids = TOKENIZER(text)["input_ids"]
    assert bytes(ids) == text.encode()
    assert TOKENIZER.decode(ids) == text


def test_special_tokens_follow_the_bytes():
    assert TOKENIZER.convert_tokens_to_ids(list(BYTE_SPECIAL_TOKENS)) == list(range(256, 262))
    assert (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id) == (256, 257, 258)
    assert len(TOKENIZER) == 262


def test_it_survives_saving(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "héllo\n\t世界<|eos|>"
    assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert loaded.apply_chat_template(chat) == TOKENIZER.apply_chat_template(chat)


def saved_tokenizer(tmp_path, **special_tokens) -> str:
    vocabulary = {"a": 0, "b": 1, "</s>": 2}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[])), **special_tokens
    ).save_pretrained(tmp_path)
    return str(tmp_path)


def test_without_a_pad_token_the_end_token_pads_and_is_said_to(tmp_path):
    path = saved_tokenizer(tmp_path, eos_token="</s>")
    tokenizer, description = load_tokenizer(path)
    assert tokenizer.pad_token == "</s>"
    assert "padded with </s>" in description


def test_without_an_end_token_it_raises(tmp_path):
    path = saved_tokenizer(tmp_path)
    with pytest.raises(UserError, match=f"{path}: .* no end-of-text token.*eos_token"):
        load_tokenizer(path)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))
