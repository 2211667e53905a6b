"""ShareGPT's ``conversations``, as chats have them: "messages" with a "role" and a "content".

{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}], "system": "..."}
"""

from launch.errors import UserError
from launch.json_files import parse, shown

__all__ = ["as_chat"]

# By the names that data sets use; in the normal form they are the tokenizer's template's.
ROLES = {
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "system": "system",
    "observation": "tool", "tool": "tool", "function_response": "tool",
    "function_call": "assistant",
}  # fmt: skip
_PAIRS = {"from": "role", "value": "content"}


def as_chat(record: dict, where: str) -> dict:
    """A record with "conversations", and perhaps "system", as one with "messages"; its other keys stay.

    Raises:
        UserError: an entry is none of ShareGPT's, nor a message.
    """
    entries = record["conversations"]
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{where}: 'conversations' must be a non-empty list of {{'from': ..., 'value': ...}}.")
    messages = [_message(entry, f"{where}: message {number}") for number, entry in enumerate(entries, start=1)]
    chat = {key: value for key, value in record.items() if key not in ("conversations", "system")}
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise UserError(f"{where}: 'system' must be a string, not {shown(system)}. Correct the record.")
    if system and record.get("loss_mask") is not None:
        raise UserError(f"{where}: 'loss_mask' and 'system' beside 'conversations'. Make the system's words a message.")
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return {**chat, "messages": messages}


def _message(entry: object, place: str) -> dict:
    if not isinstance(entry, dict) or not (_PAIRS.keys() <= entry.keys() or set(_PAIRS.values()) <= entry.keys()):
        raise UserError(f"{place} must be an object with 'from' and 'value', or with 'role' and 'content'.")
    message = dict(entry)
    for theirs, ours in _PAIRS.items():
        if theirs in message:
            if ours in message:
                raise UserError(f"{place} has both {theirs!r} and {ours!r}. Keep one of them.")
            message[ours] = message.pop(theirs)
    name = message["role"]
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise UserError(f"{place} is from {shown(name)}; known: {', '.join(ROLES)}.")
    message["role"] = role
    if name == "function_call":
        calls = message.pop("content")
        calls = parse(calls, f"{place}: the call") if isinstance(calls, str) else calls
        message |= {"content": None, "tool_calls": calls if isinstance(calls, list) else [calls]}
    return message
