"""Labels, checked token by token: the loss counts on answers and on the token that ends each, nowhere else."""

import pytest
from tokenizers import processors
from transformers import ByT5Tokenizer

from launch.encoding import IGNORED, Encoder, covered
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


def starting_encoder() -> Encoder:
    """With a tokenizer that puts a start token before a text."""
    starting = encoder()
    starting.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)]
    )
    return starting


def test_a_tokenizer_that_starts_texts_keeps_doing_so():
    starting = starting_encoder()
    assert starting("prompt", {"prompt": "a", "completion": "b"}, "here") == {
        "input_ids": [BOS, *b"ab", EOS],
        "labels": [IGNORED, IGNORED, *b"b", EOS],
    }
    middle = starting("piece", {"text": "a", "first": False, "last": False}, "here")
    assert middle["input_ids"] == [*b"a"]


@pytest.mark.parametrize("text", ["ab", "<|bos|>ab", "ab<|eos|>", "<|bos|>ab<|eos|>"])
def test_a_start_or_end_that_a_record_has_is_not_doubled(text):
    starting = starting_encoder()
    assert starting("text", {"text": text}, "here")["input_ids"] == [BOS, *b"ab", EOS]
    whole = starting("piece", {"text": text, "first": True, "last": True}, "here")
    assert whole["input_ids"] == [BOS, *b"ab", EOS]


def test_nor_is_that_of_a_prompt_or_an_answer():
    encoded = starting_encoder()("prompt", {"prompt": "<|bos|>a", "completion": "b<|eos|>"}, "here")
    assert encoded == {"input_ids": [BOS, *b"ab", EOS], "labels": [IGNORED, IGNORED, *b"b", EOS]}


def test_only_tokens_at_the_ends_are_taken_for_them():
    encoded = starting_encoder()("text", {"text": "a<|bos|>b<|eos|>c"}, "here")
    assert encoded["input_ids"] == [BOS, *b"a", BOS, *b"b", EOS, *b"c", EOS]


def test_of_several_templates_the_one_for_tools_is_taken_where_there_are_tools():
    template = BYTE_CHAT_TEMPLATE + "{{ tools[0]['name'] if tools else '' }}"
    several = encoder({"default": BYTE_CHAT_TEMPLATE, "tool_use": "T" + template})
    assert several("chat", {"messages": CHAT}, "here") == {"input_ids": CHAT_IDS, "labels": CHAT_LABELS}
    with_tools = several("chat", {"messages": CHAT, "tools": [{"name": "f"}]}, "here")
    assert with_tools["input_ids"] == [*b"T", *CHAT_IDS, *b"f"]
    assert with_tools["labels"] == [IGNORED, *CHAT_LABELS, IGNORED]
    turn = several("instruction", {"instruction": "ab", "output": "cd"}, "here")
    assert turn["input_ids"] == CHAT_IDS[:8]


def test_several_templates_without_a_default_are_named():
    with pytest.raises(UserError, match="file:7: .*several chat templates .b, c. and none of them is the default"):
        encoder({"c": BYTE_CHAT_TEMPLATE, "b": BYTE_CHAT_TEMPLATE})("chat", {"messages": CHAT}, "file:7")


@pytest.mark.parametrize("none", [None, ""])
def test_no_template_is_none(none):
    with pytest.raises(UserError, match="file:7: chat data needs a chat template"):
        encoder(none)("chat", {"messages": CHAT}, "file:7")
    assert encoder(none)("instruction", {"instruction": "a", "output": "b"}, "here")["input_ids"] == [*b"a\n\nb", EOS]


LOOKS_AT_FIRST = "{{ '' if messages[0]['role'] == 'system' else '' }}"  # as ChatML's templates do


@pytest.mark.parametrize(
    "template",
    [BYTE_CHAT_TEMPLATE, without_marks(BYTE_CHAT_TEMPLATE), LOOKS_AT_FIRST + without_marks(BYTE_CHAT_TEMPLATE)],
    ids=["marks", "prefixes", "prefixes, none before the first"],
)
def test_an_assistant_who_begins_is_learned_where_the_template_takes_it(template):
    encoded = encoder(template)("chat", {"messages": CHAT[1:]}, "here")
    assert encoded["input_ids"] == [BOS, ASSISTANT, *CHAT_IDS[5:]]
    assert encoded["labels"] == [IGNORED, IGNORED, *CHAT_LABELS[5:]]


@pytest.mark.parametrize("template", [BYTE_CHAT_TEMPLATE, without_marks(BYTE_CHAT_TEMPLATE)], ids=["marks", "prefixes"])
def test_an_assistant_who_begins_is_refused_in_the_template_s_words_where_it_does_not(template):
    check = "{% if messages[0].role == 'assistant' %}{{ raise_exception('a user begins') }}{% endif %}"
    with pytest.raises(UserError, match=r"file:7: .* refuses this conversation \(a user begins\)") as raised:
        encoder(check + template)("chat", {"messages": CHAT[1:]}, "file:7")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "fault", ["1 + 'a'", "messages[0].content.nothing()", "'a'.split(3)", "'a'.index('b')", "1 // 0"]
)
def test_whatever_a_template_raises_is_one_line(fault):
    with pytest.raises(UserError, match="file:7: the tokenizer's chat template refuses this conversation") as raised:
        encoder("{{ %s }}" % fault + BYTE_CHAT_TEMPLATE)("chat", {"messages": CHAT}, "file:7")  # noqa: UP031
    assert "\n" not in str(raised.value)


def test_a_python_tokenizer_learns_the_same_answers():
    """It keeps no positions, by which marks are found in the tokens."""
    plain = ByT5Tokenizer()
    plain.chat_template = (
        "{% for message in messages %}{{ '[' + message.role[0] }}{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content + eos_token }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '[a' }}{% endif %}"
    )
    assert not plain.is_fast
    encoded = Encoder(plain)("chat", {"messages": CHAT}, "here")
    assert plain.decode(encoded["input_ids"]) == "[uab[acd</s>[ue[afg</s>"
    learned = [label for label in encoded["labels"] if label != IGNORED]
    assert plain.decode(learned) == "cd</s>fg</s>"
    assert len(encoded["labels"]) == len(encoded["input_ids"])
    weighted = Encoder(plain)("chat", {"messages": CHAT, "learnt": [False, False, False, True]}, "here")
    assert plain.decode([label for label in weighted["labels"] if label != IGNORED]) == "fg</s>"


def test_white_space_at_the_edges_of_an_answer_is_learned():
    """Llama 3's, GPT-2's and others' tokenizers leave it out of their tokens' positions."""
    trimming = encoder(BYTE_CHAT_TEMPLATE.replace("message['content'] + eos_token", "' ' + message['content'] + '\n'"))
    trimming.tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    encoded = trimming("chat", {"messages": CHAT}, "here")
    assert bytes(label for label in encoded["labels"] if label != IGNORED) == b" cd\n fg\n"


def test_a_token_is_learned_that_has_a_character_of_an_answer():
    offsets = [(0, 2), (2, 3), (3, 6), (6, 6), (6, 8), (8, 9)]
    assert covered([(1, 4), (6, 7)], offsets, 9) == [1, 1, 1, 0, 1, 0]
    assert covered([], offsets, 9) == [0] * 6
    assert covered([(3, 3)], offsets, 9) == [0] * 6


@pytest.mark.parametrize("shape", ["text", "prompt", "instruction"])
def test_answers_only_refuses_what_is_not_a_conversation(shape):
    record = {"text": "a", "prompt": "a", "completion": "b", "instruction": "a", "output": "b"}
    plain = Encoder(encoder(None).tokenizer, answers_only=True)
    with pytest.raises(UserError, match=f"file:7: --assistant_only_loss is for conversations, .* .{shape}."):
        plain(shape, record, "file:7")


def test_answers_only_of_a_conversation_is_what_is_learned_anyway():
    only = Encoder(encoder().tokenizer, answers_only=True)
    assert only("chat", {"messages": CHAT}, "here") == {"input_ids": CHAT_IDS, "labels": CHAT_LABELS}
    turn = only("instruction", {"instruction": "ab", "output": "cd"}, "here")
    assert turn == {"input_ids": CHAT_IDS[:8], "labels": CHAT_LABELS[:8]}
