"""Chat records: checked, and brought to the one form in which templates are given them.

Which messages are learned is said by other tools' keys, all of which mean the same here, on a message: true or 1 learns
it, false or 0 leaves it out of the loss, and an assistant's message without any is learned.

    "weight"                       OpenAI's and Mistral's fine-tuning formats
    "train", "training"            Axolotl
    "loss"                         ChatGLM, ms-swift
    "trainable", "loss_mask"       others

A "loss_mask" beside "messages" (LLaMA-Factory, verl) is a list with one such value per message.
"""

from launch.errors import UserError
from launch.json_files import parse, shown

ROLES = ("system", "user", "assistant", "tool")
LEARN_KEYS = ("weight", "train", "training", "trainable", "loss", "loss_mask")
# Keys that every chat may have; whether others mean anything is the template's to say (templates.ChatTemplate.fit).
MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id")
CALL_KEYS = ("id", "type", "index", "function")
FUNCTION_KEYS = ("name", "arguments")


def normal_form(record: dict, where: str, ignored: frozenset[str] = frozenset()) -> dict:
    """Check a chat.

    Args:
        record: "messages", and perhaps "tools" and "loss_mask".
        where: "file:line", or a dataset's name and row, for the messages.
        ignored: keys to leave out of messages, unless they are in ``MESSAGE_KEYS`` or ``LEARN_KEYS``, which those of a
            record beside "messages" may happen to share.

    Returns:
        "messages", whose tool calls have objects as arguments, and whose content is None where only calls are;
        "tools", a list, where there are any; "learnt", a bool per message, where the record says which.

    Raises:
        UserError: what the record says is not clear, or nothing of it would be learned.
    """
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: 'messages' must be a non-empty list of {{'role': ..., 'content': ...}}.")
    said = [checked_message(message, f"{where}: message {number}") for number, message in enumerate(messages, 1)]
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{where}: no message has the role 'assistant', so there is no answer to learn from.")
    if record.get("loss_mask") is not None:
        said = masked(said, messages, record["loss_mask"], where)
    chat: dict = {"messages": [plain_message(message, where, ignored) for message in messages]}
    tools = checked_tools(record.get("tools"), where)
    if tools:
        chat["tools"] = tools
    learnt = [
        message["role"] == "assistant" if flag is None else flag for message, flag in zip(messages, said, strict=True)
    ]
    if not any(learnt):
        raise UserError(f"{where}: no message of the assistant is to be learned. Remove the record, or learn one.")
    if any(flag is not None for flag in said):
        chat["learnt"] = learnt
    return chat


def checked_message(message: object, place: str) -> bool | None:
    """Check a message's role, its content and what says whether it is learned, which is returned."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"{place} must be an object with a 'role' and a 'content'.")
    role = message["role"]
    if role not in ROLES:
        raise UserError(f"{place} has the role {role!r}; known roles: {', '.join(ROLES)}.")
    if message.get("tool_calls") and role != "assistant":
        raise UserError(f"{place} ({role}) has 'tool_calls', which only an assistant's message may have.")
    content = message.get("content")
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise UserError(f"{place} ({role}) needs a 'content' string.")
    flags = {key: message[key] for key in LEARN_KEYS if message.get(key) is not None}
    learnt = {key: learn_flag(value, role, f"{place}: {key!r}") for key, value in flags.items()}
    if len(set(learnt.values())) > 1:
        raise UserError(f"{place} is to be learned by one of {sorted(learnt)} and not by another. Keep one of them.")
    return next(iter(learnt.values()), None)


def learn_flag(value: object, role: str, what: str) -> bool:
    """A bool, or 0 or 1, as a bool; only an assistant's messages may be learned."""
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise UserError(
            f"{what} is {shown(value)}; it must be 0 or 1, false or true: a message is learned or it is not."
        )
    if value and role != "assistant":
        raise UserError(f"{what} says that a message of the {role} is learned; only the assistant's are. Remove it.")
    return bool(value)


def masked(said: list[bool | None], messages: list[dict], mask: object, where: str) -> list[bool | None]:
    """What a mask beside the messages says of each."""
    if not isinstance(mask, list) or len(mask) != len(messages):
        found = f"{len(mask)}" if isinstance(mask, list) else shown(mask)
        raise UserError(
            f"{where}: 'loss_mask' must be a list with one 0 or 1 for each of the {len(messages)} messages, not "
            f"{found}."
        )
    if any(flag is not None for flag in said):
        raise UserError(f"{where}: both the record and its messages say what is learned. Keep one of them.")
    return [
        learn_flag(value, message["role"], f"{where}: 'loss_mask' of message {number}")
        for number, (value, message) in enumerate(zip(mask, messages, strict=True), start=1)
    ]


def plain_message(message: dict, where: str, ignored: frozenset[str]) -> dict:
    """A message without nulls and without what is not for the template, with its tool calls in their normal form."""
    known = {*MESSAGE_KEYS, *LEARN_KEYS}
    plain = {
        key: value
        for key, value in message.items()
        if value is not None and key not in LEARN_KEYS and (key in known or key not in ignored)
    }
    calls = plain.pop("tool_calls", None)
    if calls:
        plain["tool_calls"] = [plain_call(call, where) for call in listed(calls, f"{where}: 'tool_calls'")]
        # No words beside the calls: an empty string and null mean the same, and templates differ in what they expect.
        plain["content"] = plain.get("content", "") if plain.get("content", "").strip() else None
    return plain


def listed(value: object, what: str) -> list[dict]:
    """A list of objects, or a complaint."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise UserError(f"{what} must be a list of objects, [{{...}}, ...], not {shown(value)}.")
    return value


def plain_call(call: dict, where: str) -> dict:
    """A tool call as ``{"function": {"name": ..., "arguments": {...}}}``, with its id and type where it has them."""
    call = {key: value for key, value in call.items() if value is not None}
    if "function" not in call and "name" in call:  # the short form, without an object around it
        function = {key: call.pop(key) for key in FUNCTION_KEYS if key in call}
        call = {"type": "function", **call, "function": function}
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where}: a tool call must have a 'function', an object with a 'name' and 'arguments'.")
    unknown = sorted(call.keys() - set(CALL_KEYS)) + sorted(function.keys() - set(FUNCTION_KEYS))
    if unknown:
        raise UserError(
            f"{where}: unknown keys {unknown} in a tool call; known: {', '.join(CALL_KEYS)}, and in its function "
            f"{', '.join(FUNCTION_KEYS)}. Correct or remove them."
        )
    return {**call, "function": {"name": function["name"], "arguments": arguments(function.get("arguments"), where)}}


def arguments(given: object, where: str) -> dict:
    """The arguments of a call: an object, or JSON text of one, as OpenAI's format has it; without any an empty one."""
    if given is None or (isinstance(given, str) and not given.strip()):
        return {}
    what = f"{where}: 'arguments' of a tool call"
    value = parse(given, what) if isinstance(given, str) else given
    if not isinstance(value, dict):
        raise UserError(f"{what} must be an object, or JSON text of one, not {shown(value)}.")
    return value


def checked_tools(tools: object, where: str) -> list[dict] | None:
    """The tools of a chat: a list of objects, or JSON text of one."""
    if tools is None or (isinstance(tools, str) and not tools.strip()):
        return None
    what = f"{where}: 'tools'"
    return listed(parse(tools, what) if isinstance(tools, str) else tools, what)
