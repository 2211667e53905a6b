"""ShareGPT's and Alpaca's longer forms are the chats that they mean; pairs are refused, or their better answer learned."""

import pytest

from launch.encoding import Encoder
from launch.errors import UserError
from launch.records import checked_record
from launch.tokenizer import BYTE_CHAT_TEMPLATE, byte_tokenizer

HUMAN, GPT = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}
USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}


def chat(record: dict) -> dict:
    shape, checked = checked_record(record, "file:7")
    assert shape == "chat"
    return checked


def encode(record: dict, template: str | None = BYTE_CHAT_TEMPLATE) -> dict:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return Encoder(tokenizer)(*checked_record(record, "file:7"), "file:7")


@pytest.mark.parametrize("human", ["human", "user"])
@pytest.mark.parametrize("gpt", ["gpt", "assistant", "chatgpt", "bot", "model"])
def test_each_name_is_a_role(human, gpt):
    entries = [HUMAN | {"from": human}, GPT | {"from": gpt}]
    assert chat({"conversations": entries}) == {"messages": [USER, ASSISTANT]}


def test_roles_and_contents_may_stand_there_too():
    assert chat({"conversations": [USER, ASSISTANT]}) == chat({"messages": [USER, ASSISTANT]})


@pytest.mark.parametrize("first", [{"from": "system", "value": "s"}, None])
def test_a_system_prompt_comes_first(first):
    record = {"conversations": [first, HUMAN, GPT]} if first else {"conversations": [HUMAN, GPT], "system": "s"}
    assert chat(record) == {"messages": [SYSTEM, USER, ASSISTANT]}


def test_an_empty_system_prompt_is_none():
    assert chat({"conversations": [HUMAN, GPT], "system": ""}) == {"messages": [USER, ASSISTANT]}


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
@pytest.mark.parametrize("off", [0, False])
def test_an_answer_that_is_not_to_be_learned_is_context(key, off):
    entries = [HUMAN, GPT | {key: off}, HUMAN, GPT | {"value": "c"}]
    assert chat({"conversations": entries, "system": "s"})["learnt"] == [False, False, False, False, True]
    assert chat({"conversations": entries[:2] + entries, "loss_mask": None})["learnt"][-1]


def test_a_call_and_what_came_of_it_are_tool_calls():
    entries = [
        HUMAN,
        {"from": "function_call", "value": '{"name": "f", "arguments": {"k": 1}}'},
        {"from": "observation", "value": "r"},
        GPT,
    ]
    call = {"type": "function", "function": {"name": "f", "arguments": {"k": 1}}}
    assert chat({"conversations": entries, "tools": '[{"name": "f"}]'}) == {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "r"},
            ASSISTANT,
        ],
        "tools": [{"name": "f"}],
    }


BAD = {
    "no list": ({"conversations": "a"}, "'conversations' must be a non-empty list"),
    "no value": ({"conversations": [HUMAN, {"from": "gpt"}]}, "message 2 must be an object with 'from' and 'value'"),
    "an unknown name": (
        {"conversations": [HUMAN, GPT | {"from": "claude"}]},
        'message 2 is from "claude"; known: human',
    ),
    "both": ({"conversations": [HUMAN, GPT | {"role": "assistant"}]}, "message 2 has both 'from' and 'role'"),
    "a call of no JSON": ({"conversations": [HUMAN, {"from": "function_call", "value": "f()"}]}, "message 2: the call"),
    "no answer": ({"conversations": [HUMAN]}, "no message has the role 'assistant'"),
    "a system of no words": ({"conversations": [HUMAN, GPT], "system": 3}, "'system' must be a string"),
    "two masks": ({"conversations": [HUMAN, GPT], "system": "s", "loss_mask": [0, 1]}, "'loss_mask' and 'system'"),
    "two shapes": (
        {"conversations": [HUMAN, GPT], "messages": [USER, ASSISTANT]},
        "the record has keys .* several shapes",
    ),
    "an unknown key": ({"conversations": [HUMAN, GPT], "id": "1"}, "unknown keys .*--ignore_keys id"),
    "a history of no pairs": ({"instruction": "a", "output": "b", "history": [["c"]]}, "'history' must be a list of"),
}


@pytest.mark.parametrize(("record", "message"), BAD.values(), ids=BAD)
def test_what_is_not_clear_is_refused(record, message):
    with pytest.raises(UserError, match=f"^file:7: {message}"):
        checked_record(record, "file:7")


def test_an_instruction_with_a_system_prompt_and_a_history_is_a_chat():
    record = {"instruction": "e", "input": "f", "output": "g", "system": "s", "history": [["a", "b"]]}
    messages = [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "e\n\nf"}, {"role": "assistant", "content": "g"}]
    assert encode(record) == encode({"messages": messages})


def test_without_a_template_a_system_prompt_is_a_paragraph_and_a_history_refused():
    record = {"instruction": "a", "output": "b", "system": "s", "history": []}
    assert encode(record, None) == encode({"prompt": "s\n\na\n\n", "completion": "b"}, None)
    with pytest.raises(UserError, match="file:7: a 'history' needs a chat template"):
        encode(record | {"history": [["c", "d"]]}, None)


PAIRS = {
    "strings": ({"prompt": "a", "chosen": "b"}, {"prompt": "a", "completion": "b"}),
    "Alpaca": ({"instruction": "a", "chosen": "b"}, {"instruction": "a", "output": "b"}),
    "messages": ({"chosen": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT]}),
    "messages after a prompt": ({"prompt": [USER], "chosen": [ASSISTANT]}, {"messages": [USER, ASSISTANT]}),
    "ShareGPT": ({"conversations": [HUMAN], "chosen": GPT}, {"conversations": [HUMAN, GPT]}),
}


@pytest.mark.parametrize(("record", "alone"), PAIRS.values(), ids=PAIRS)
def test_pairs_are_refused_and_the_way_out_learns_the_better_answers(record, alone):
    with pytest.raises(UserError, match="^file:7: preference data .*TRL's dpo script .*--ignore_keys rejected"):
        checked_record(record | {"rejected": record["chosen"]}, "file:7")
    assert encode(record) == encode(alone)
    ignored = frozenset({"rejected"})
    assert checked_record(record | {"rejected": "c"}, "file:7", ignored) == checked_record(alone, "file:7")


def test_a_chosen_answer_of_another_kind_than_its_prompt_is_refused():
    with pytest.raises(UserError, match="^file:7: 'chosen' is"):
        checked_record({"prompt": "a", "chosen": [ASSISTANT]}, "file:7")


def test_answers_with_a_mark_are_refused():
    for label in (True, False):
        with pytest.raises(UserError, match="^file:7: preference data .*TRL's kto script"):
            checked_record({"prompt": "a", "completion": "b", "label": label}, "file:7")
    with pytest.raises(UserError, match="unknown keys .'label'"):
        checked_record({"prompt": "a", "completion": "b", "label": "x"}, "file:7")
