"""Chats: what other tools' keys mean, which messages are learned, and what is refused, by file and line."""

import json
import re

import pytest

from launch.encoding import IGNORED, Encoder
from launch.errors import UserError
from launch.records import checked_record, read_records
from launch.templates import ChatTemplate
from launch.tokenizer import BYTE_CHAT_TEMPLATE, byte_tokenizer

BOS, EOS, ASSISTANT = 256, 257, 261
USER = {"role": "user", "content": "a"}
FIRST, SECOND = {"role": "assistant", "content": "b"}, {"role": "assistant", "content": "c"}
WITHOUT_MARKS = BYTE_CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CALL_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content or '' }}{% for call in message.tool_calls or [] %}"
    "{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %};{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}{{ tools | tojson if tools else '' }}"
)


def encoder(template: object = BYTE_CHAT_TEMPLATE) -> Encoder:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return Encoder(tokenizer)


def encode(record: dict, template: object = BYTE_CHAT_TEMPLATE) -> dict:
    return encoder(template)(*checked_record(record, "file:7"), "file:7")


def learned(encoded: dict) -> bytes:
    """What the labels say, as text; an end token as a semicolon."""
    return bytes(ord(";") if label == EOS else label for label in encoded["labels"] if label != IGNORED)


def text_of(record: dict, template: str) -> str:
    return bytes(token for token in encode(record, template)["input_ids"] if token < 256).decode()


def answered(*messages: dict, **more) -> dict:
    return {"messages": [USER, *messages], **more}


@pytest.mark.parametrize("template", [BYTE_CHAT_TEMPLATE, WITHOUT_MARKS], ids=["marks", "prefixes"])
@pytest.mark.parametrize("key", ["weight", "train", "training", "trainable", "loss", "loss_mask"])
@pytest.mark.parametrize("off", [0, False, 0.0])
def test_a_message_that_is_not_to_be_learned_is_context(template, key, off):
    record = answered(FIRST | {key: off}, USER, SECOND)
    assert learned(encode(record, template)) == b"c;"
    assert learned(encode(answered(FIRST, USER, SECOND | {key: off}), template)) == b"b;"
    assert encode(record, template)["input_ids"] == encode(answered(FIRST, USER, SECOND), template)["input_ids"]


@pytest.mark.parametrize("on", [1, True, 1.0, None])
def test_a_message_that_is_to_be_learned_is(on):
    assert learned(encode(answered(FIRST | {"weight": on}, USER | {"weight": 0}, SECOND | {"train": on}))) == b"b;c;"


def test_a_mask_beside_the_messages_says_it_of_each():
    chat = answered(FIRST, USER, SECOND)
    assert learned(encode(chat | {"loss_mask": [0, 0, 0, 1]})) == b"c;"
    assert learned(encode(chat | {"loss_mask": [False, True, False, False]})) == b"b;"
    assert learned(encode(chat | {"loss_mask": None})) == b"b;c;"


UNCLEAR = {
    "half a weight": (answered(FIRST | {"weight": 0.5}), "message 2: 'weight' is 0.5; it must be 0 or 1"),
    "a word": (answered(FIRST | {"train": "no"}), "message 2: 'train' is \"no\"; it must be 0 or 1"),
    "a mask of tokens": (answered(FIRST | {"loss_mask": [0, 1]}), r"message 2: 'loss_mask' is \[0, 1\]; it must be 0"),
    "a mask of another length": (answered(FIRST, loss_mask=[1]), "one 0 or 1 for each of the 2 messages, not 1"),
    "a mask that is no list": (answered(FIRST, loss_mask=1), "one 0 or 1 for each of the 2 messages, not 1"),
    "a mask with 2": (answered(FIRST, loss_mask=[0, 2]), "'loss_mask' of message 2 is 2; it must be 0 or 1"),
    "two that differ": (answered(FIRST | {"weight": 0, "train": True}), "by one of .'train', 'weight'. and not by"),
    "mask and message": (answered(FIRST | {"weight": 0}, loss_mask=[0, 1]), "both the record and its messages"),
    "a learned user": ({"messages": [USER | {"train": True}, FIRST]}, "message 1: 'train' says .* of the user"),
    "a learned user by mask": (answered(FIRST, loss_mask=[1, 1]), "'loss_mask' of message 1 says .* of the user"),
    "nothing learned": (answered(FIRST | {"weight": 0}), "no message of the assistant is to be learned"),
}


@pytest.mark.parametrize(("record", "message"), UNCLEAR.values(), ids=UNCLEAR)
def test_an_unclear_weight_is_refused(record, message):
    with pytest.raises(UserError, match=message) as raised:
        checked_record(record, "file:7")
    assert str(raised.value).startswith("file:7: ")


def test_marks_that_run_over_several_messages_are_refused_where_it_matters():
    merging = (
        "{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}{% elif loop.first or "
        "messages[loop.index0 - 1].role == 'user' %}{% generation %}{% for later in messages[loop.index0:] %}"
        "{{ later.content if later.role == 'assistant' else '' }}{% endfor %}{% endgeneration %}{% endif %}{% endfor %}"
    )
    assert learned(encode(answered(FIRST, SECOND), merging)) == b"bc"
    with pytest.raises(UserError, match="file:7: .*does not mark each message of the assistant by itself"):
        encode(answered(FIRST | {"weight": 0}, SECOND), merging)


def call(arguments: object, **more) -> dict:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]} | more


OBJECT = {"city": "Zürich", "days": 2}
REAL_TEMPLATES = [
    "qwen2_5", "qwen3", "glm4moe", "gptoss", "llama3_1", "deepseekv3", "gemma4", "lfm2_v2", "qwen3_5_think",
]  # fmt: skip


def real_template(name: str) -> str:
    from trl import chat_template_utils

    return getattr(chat_template_utils, f"{name}_chat_template")


@pytest.mark.parametrize("name", REAL_TEMPLATES)
def test_arguments_as_text_are_those_of_the_object(name):
    """In every published template, whether it writes JSON of an object, adds text to text, or has a form of its own."""
    template = ChatTemplate(byte_tokenizer(), real_template(name))
    texts = []
    for given in (OBJECT, json.dumps(OBJECT)):
        _, chat = checked_record(answered(call(given)), "file:7")
        texts.append(template.render(template.fit(chat["messages"], "file:7", None), "file:7")[0])
    assert texts[0] == texts[1]
    assert "Zürich" in texts[0] and '\\"' not in texts[0]


def test_a_template_that_adds_text_to_text_is_given_text():
    adding = CALL_TEMPLATE.replace("{{ call.function.arguments | tojson }}", "{{ '' + call.function.arguments }}")
    for given in (OBJECT, json.dumps(OBJECT)):
        assert learned(encode(answered(call(given)), adding)) == 'f({"city": "Zürich", "days": 2});'.encode()


@pytest.mark.parametrize("none", [None, "", " ", {}, "{}"])
def test_no_arguments_are_an_empty_object(none):
    assert learned(encode(answered(call(none)), CALL_TEMPLATE)) == b"f({});"


def test_the_short_form_of_a_call_is_the_long_one():
    short = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "{}", "id": "x"}]}
    assert checked_record(answered(short), "file:7")[1]["messages"][1]["tool_calls"] == [
        {"type": "function", "id": "x", "function": {"name": "f", "arguments": {}}}
    ]


@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}], ids=["null", "empty", "none"])
@pytest.mark.parametrize("name", REAL_TEMPLATES)
def test_no_words_beside_a_call_are_none(name, content):
    """Templates add None to text, or write it out; others leave a call out where the content is not None."""
    message = call(OBJECT, **content)
    text = text_of(answered(message), real_template(name))
    assert "None" not in text and "Zürich" in text


def test_words_beside_a_call_that_the_template_leaves_out_are_refused():
    assert "b" in text_of(answered(call(OBJECT, content="b")), real_template("qwen2_5"))
    with pytest.raises(UserError, match="file:7: message 2: .* writes either 'tool_calls' or 'content'"):
        encode(answered(call(OBJECT, content="b")), real_template("llama3_1"))


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def test_tools_as_text_are_those_of_the_list():
    encoded = [encode(answered(FIRST, tools=tools), CALL_TEMPLATE) for tools in (TOOLS, json.dumps(TOOLS))]
    assert encoded[0] == encoded[1]
    assert json.dumps(TOOLS) in text_of(answered(FIRST, tools=json.dumps(TOOLS)), CALL_TEMPLATE)


@pytest.mark.parametrize("none", [None, [], "", "[]"])
def test_no_tools_are_none(none):
    """Not an empty list: templates ask whether tools are none, and write a heading for those that are not."""
    template = real_template("llama3_1")
    assert encode(answered(FIRST, tools=none), template) == encode(answered(FIRST), template)


def test_tools_that_the_template_does_not_read_are_refused():
    with pytest.raises(UserError, match="file:7: .*does not read 'tools'.*--ignore_keys tools"):
        encode(answered(FIRST, tools=TOOLS))


def test_an_unknown_key_that_the_template_reads_is_for_it():
    reading = BYTE_CHAT_TEMPLATE.replace("message['content'] + eos", "message.thinking + message['content'] + eos")
    assert learned(encode(answered(FIRST | {"thinking": "t"}), reading)) == b"tb;"
    with pytest.raises(UserError, match="message 2 has the unknown key 'thinking'.*--ignore_keys thinking"):
        encode(answered(FIRST | {"thinking": "t"}))


def test_ignored_keys_are_left_out_of_messages_too_but_for_known_ones():
    record = answered(FIRST | {"id": 3, "weight": 0}, USER, SECOND) | {"id": 1}
    shape, chat = checked_record(record, "file:7", frozenset({"id", "weight", "content"}))
    assert learned(encoder()(shape, chat, "file:7")) == b"c;"


LINES = {
    "misspelt content": ('{"role": "assistant", "content": "b", "contnet": "c"}', "key 'contnet'.*mean 'content'"),
    "misspelt calls": ('{"role": "assistant", "content": "b", "tool_call": []}', "key 'tool_call'.*'tool_calls'"),
    "a key twice": ('{"role": "assistant", "content": "b", "content": "c"}', "the key 'content' stands twice"),
    "a key twice in arguments": (json.dumps(call('{"a": 1, "a": 2}')), "'arguments' .*: the key 'a' stands twice"),
    "arguments are not JSON": (json.dumps(call("print(1)")), "'arguments' of a tool call: not valid JSON"),
    "arguments are a list": (json.dumps(call("[1]")), "'arguments' of a tool call must be an object"),
    "arguments are a number": (json.dumps(call(3)), "'arguments' of a tool call must be an object.*not 3"),
    "misspelt arguments": (
        '{"role": "assistant", "tool_calls": [{"function": {"name": "f", "argument": {}}}]}',
        r"unknown keys \['argument'\] in a tool call",
    ),
    "a call without a name": ('{"role": "assistant", "tool_calls": [{"function": {}}]}', "must have a 'function'"),
    "calls are an object": ('{"role": "assistant", "tool_calls": {"name": "f"}}', "must be a list of objects"),
    "a user's call": ('{"role": "user", "content": "", "tool_calls": [{"name": "f"}]}', "which only an assistant's"),
    "half a pair": (r'{"role": "assistant", "content": "b\ud83d"}', r"half of a surrogate pair, '.ud83d', stands"),
    "half a pair in arguments": (
        r'{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{\"a\": \"\\ud83d\"}"}}]}',
        "half of a surrogate pair",
    ),
    "half a pair in a key": (r'{"role": "assistant", "content": "b", "\udc00": 1}', "half of a surrogate pair"),
    "content is a list": ('{"role": "assistant", "content": ["b"], "tool_calls": [{"name": "f"}]}', "needs a"),
    "NaN": ('{"role": "assistant", "content": "b", "weight": NaN}', "NaN is not a number of JSON"),
    "a number without end": ('{"role": "assistant", "content": "b", "weight": ' + "1" * 5000 + "}", "cannot be read"),
}  # fmt: skip
RECORDS = {
    "tools are one object": ('"tools": {"name": "f"}', "'tools' must be a list of objects"),
    "tools are text of one object": (r'"tools": "{\"name\": \"f\"}"', "'tools' must be a list of objects"),
    "tools are other text": ('"tools": "f"', "'tools': not valid JSON"),
    "a tool is text": ('"tools": ["f"]', "'tools' must be a list of objects"),
    "a key twice": ('"tools": [], "tools": []', "the key 'tools' stands twice"),
}


def raised_by(tmp_path, line: str, template: str = CALL_TEMPLATE) -> str:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(answered(FIRST)) + "\n" + line + "\n")
    encode = encoder(template)

    def read_all() -> None:
        for where, shape, record in read_records(str(file)):
            encode(shape, record, where)

    with pytest.raises(UserError) as raised:
        read_all()
    message = str(raised.value)
    assert message.startswith(f"{file}:2: ") and "\n" not in message
    return message


@pytest.mark.parametrize(("message", "said"), LINES.values(), ids=LINES)
def test_a_bad_message_is_named(tmp_path, message, said):
    line = f'{{"messages": [{json.dumps(USER)}, {json.dumps(FIRST)}, {json.dumps(USER)}, {message}]}}'
    assert re.search(said, raised_by(tmp_path, line))


@pytest.mark.parametrize(("part", "said"), RECORDS.values(), ids=RECORDS)
def test_a_bad_chat_is_named(tmp_path, part, said):
    assert re.search(said, raised_by(tmp_path, f'{{"messages": {json.dumps([USER, FIRST])}, {part}}}'))


@pytest.mark.parametrize("line", [r'{"text": "\ud83d"}', r'{"prompt": "a", "completion": "\udc00"}'])
def test_half_a_pair_in_a_text_is_named(tmp_path, line):
    assert "half of a surrogate pair" in raised_by(tmp_path, line)
