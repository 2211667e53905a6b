"""Labels, checked token by token: the loss counts on answers and on the token that ends each, nowhere else."""

import pytest

from launch.encoding import IGNORED, Encoder
from launch.errors import UserError
from launch.tokenizer import BYTE_CHAT_TEMPLATE, byte_tokenizer

BOS, EOS, USER, ASSISTANT = 256, 257, 260, 261
CHAT = [
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "cd"},
    {"role": "user", "content": "e"},
    {"role": "assistant", "content": "fg"},
]
CHAT_IDS = [BOS, USER, *b"ab", ASSISTANT, *b"cd", EOS, USER, *b"e", ASSISTANT, *b"fg", EOS]
CHAT_LABELS = [IGNORED] * 5 + [*b"cd", EOS] + [IGNORED] * 3 + [*b"fg", EOS]


def encoder(template: str | None = BYTE_CHAT_TEMPLATE) -> Encoder:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return Encoder(tokenizer)


def without_marks(template: str) -> str:
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def test_a_text_is_learnt_whole():
    encoded = encoder()("text", {"text": "abc"}, "here")
    assert encoded["input_ids"] == [*b"abc", EOS]
    assert encoded["labels"] == encoded["input_ids"]


def test_the_pieces_of_a_text_are_its_ids():
    pieces = [{"text": "ab", "first": True, "last": False}, {"text": "c", "first": False, "last": True}]
    ids = [token for piece in pieces for token in encoder()("piece", piece, "here")["input_ids"]]
    assert ids == encoder()("text", {"text": "abc"}, "here")["input_ids"]


def test_a_prompt_is_not_learnt():
    encoded = encoder()("prompt", {"prompt": "abc", "completion": "de"}, "here")
    assert encoded["input_ids"] == [*b"abcde", EOS]
    assert encoded["labels"] == [IGNORED] * 3 + [*b"de", EOS]


def test_a_chat_learns_every_answer_and_its_end():
    encoded = encoder()("chat", {"messages": CHAT}, "here")
    assert encoded["input_ids"] == CHAT_IDS
    assert encoded["labels"] == CHAT_LABELS


def test_a_template_without_marks_gives_the_same_labels():
    plain = encoder(without_marks(BYTE_CHAT_TEMPLATE))
    assert plain.template("here", None).marked is None
    assert plain("chat", {"messages": CHAT}, "here") == {"input_ids": CHAT_IDS, "labels": CHAT_LABELS}


def test_messages_after_the_last_answer_are_context_only():
    chat = [*CHAT[:2], {"role": "user", "content": "xyz"}]
    for template in (BYTE_CHAT_TEMPLATE, without_marks(BYTE_CHAT_TEMPLATE)):
        encoded = encoder(template)("chat", {"messages": chat}, "here")
        assert encoded["input_ids"] == [*CHAT_IDS[:8], USER, *b"xyz"]
        assert encoded["labels"] == CHAT_LABELS[:8] + [IGNORED] * 4


def test_an_instruction_is_a_chat_of_one_turn():
    record = {"instruction": "ab", "input": "cd", "output": "e"}
    encoded = encoder()("instruction", record, "here")
    assert encoded["input_ids"] == [BOS, USER, *b"ab\n\ncd", ASSISTANT, *b"e", EOS]
    assert [label for label in encoded["labels"] if label != IGNORED] == [*b"e", EOS]


@pytest.mark.parametrize("empty", ["", None])
def test_an_instruction_without_a_template_is_paragraphs(empty):
    encoded = encoder(None)("instruction", {"instruction": "ab", "input": empty, "output": "e"}, "here")
    assert encoded == {"input_ids": [*b"ab\n\ne", EOS], "labels": [IGNORED] * 4 + [*b"e", EOS]}


def test_a_chat_without_a_template_raises():
    with pytest.raises(UserError, match="file:7: chat data needs a chat template"):
        encoder(None)("chat", {"messages": CHAT}, "file:7")


def test_a_template_that_rewrites_the_past_raises():
    # Shows how many messages there are, so every further message changes the beginning.
    rewriting = "{{ messages | length }}" + without_marks(BYTE_CHAT_TEMPLATE)
    with pytest.raises(UserError, match="file:7: the tokenizer's chat template rewrites earlier messages"):
        encoder(rewriting)("chat", {"messages": CHAT}, "file:7")


def test_a_template_that_refuses_says_where():
    refusing = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="file:7: .* refuses this conversation .roles must alternate."):
        encoder(refusing)("chat", {"messages": CHAT}, "file:7")


def test_marks_around_nothing_raise():
    empty_marks = without_marks(BYTE_CHAT_TEMPLATE) + "{% generation %}{% endgeneration %}"
    with pytest.raises(UserError, match="file:7: the chat template gives the assistant no tokens"):
        encoder(empty_marks)("chat", {"messages": CHAT}, "file:7")


def test_a_tokenizer_that_starts_texts_keeps_doing_so():
    from tokenizers.processors import TemplateProcessing

    starting = encoder()
    starting.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)]
    )
    assert starting("prompt", {"prompt": "a", "completion": "b"}, "here") == {
        "input_ids": [BOS, *b"ab", EOS],
        "labels": [IGNORED, IGNORED, *b"b", EOS],
    }
    middle = starting("piece", {"text": "a", "first": False, "last": False}, "here")
    assert middle["input_ids"] == [*b"a"]
