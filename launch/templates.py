"""A chat template: what it reads, in which form it wants it, and which part of what it writes is the assistant's."""

import copy
import difflib
import functools
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from launch.conversations import MESSAGE_KEYS
from launch.errors import UserError

Span = tuple[int, int]  # begin and end in a text, in characters

# Nothing is lost with a template that does not read these: they say who called what, or are read from elsewhere.
MAY_STAY_UNREAD = ("role", "content", "name", "tool_call_id")


@dataclass(frozen=True)
class CallForm:
    """How a template wants an assistant's tool calls.

    Attributes:
        arguments: from an object to what the template is given: itself, or its JSON text. A template that writes JSON
            of it would write JSON text within JSON text, and one that adds it to a string cannot take an object.
        no_content: the content beside calls where there is none: None, which some write out as "None", or "".
        with_content: whether calls and content are both written.
    """

    arguments: Callable[[dict], object]
    no_content: str | None
    with_content: bool


class ChatTemplate:
    """One chat template of a tokenizer.

    Args:
        tokenizer: gives the special tokens.
        source: the template, in Jinja.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str):
        self.tokenizer, self.source = tokenizer, source

    @functools.cached_property
    def marked(self) -> str | None:
        """The template with marks around the assistant's part: itself, TRL's variant of it, or None."""
        from trl.chat_template_utils import get_training_chat_template, has_generation_markers

        alone = copy.copy(self.tokenizer)  # TRL looks at the tokenizer's template, which may be several
        alone.chat_template = self.source
        try:
            variant = get_training_chat_template(alone)
        except Exception:  # unknown to TRL, or not made for the chats that it tries: whatever a template may raise
            variant = None
        if variant is None and has_generation_markers(self.source):
            return self.source
        return variant

    @property
    def text(self) -> str:
        """What is rendered."""
        return self.marked or self.source

    @functools.cached_property
    def code(self) -> str:
        """The template without the text that it writes and without comments."""
        return "".join(re.findall(r"\{[{%].*?[%}]\}", self.text, flags=re.DOTALL))

    def reads_key(self, key: str) -> bool:
        """Whether it has ``.key``, or "key" as a string."""
        return re.search(rf"\.\s*{re.escape(key)}\b|(['\"]){re.escape(key)}\1", self.code) is not None

    @property
    def reads_tools(self) -> bool:
        return re.search(r"\btools\b", self.code) is not None

    def render(
        self, messages: list[dict], where: str, tools: list | None = None, add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """Apply the template; its own complaint is given the record's place.

        Returns:
            The text, and where in it the marks are, in order.
        """
        try:
            return self.rendered(messages, tools, add_generation_prompt)
        except Exception as error:  # a template is a program of others, and may raise anything
            reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
            raise UserError(
                f"{where}: the tokenizer's chat template refuses this conversation ({reason}). Many templates want "
                "'user' and 'assistant' in turn, after at most one 'system' message."
            ) from None

    def rendered(
        self, messages: list[dict], tools: list | None = None, add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        marked = self.marked is not None
        texts, spans = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=self.text,
            return_assistant_tokens_mask=marked,
            add_generation_prompt=add_generation_prompt,
            **self.tokenizer.special_tokens_map,
        )
        return texts[0], spans[0] if marked else []

    def before_answer(self, messages: list[dict], number: int, where: str, tools: list | None) -> str:
        """What comes before the answer that is message ``number``: the messages before it, and the generation prompt.

        Many templates look at the first message, and cannot write a conversation of none. What comes before an answer
        that is the first is then what does not depend on its words.
        """
        if number == 0:
            try:
                return self.rendered([], tools, add_generation_prompt=True)[0]
            except Exception:
                answers = [{**messages[0], "content": words} for words in ("First.", "Other.")]
                rendered = [self.render([answer], where, tools)[0] for answer in answers]
                return os.path.commonprefix(rendered)  # noqa: RUF071  of strings, which is what it is here for
        return self.render(messages[:number], where, tools, add_generation_prompt=True)[0]

    def fit(self, messages: list[dict], where: str, tools: list | None) -> list[dict]:
        """Messages in their normal form, as this template wants them.

        Raises:
            UserError: it would leave out something that they say.
        """
        if tools and not self.reads_tools:
            raise UserError(
                f"{where}: the tokenizer's chat template does not read 'tools', so the model would not see them. Use a "
                "tokenizer whose template does, or pass --ignore_keys tools."
            )
        return [self.fit_message(message, f"{where}: message {number}") for number, message in enumerate(messages, 1)]

    def fit_message(self, message: dict, place: str) -> dict:
        for key in message:
            if key not in MAY_STAY_UNREAD and not self.reads_key(key):
                close = difflib.get_close_matches(key, MESSAGE_KEYS, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else "."
                raise UserError(
                    f"{place} has the unknown key {key!r}, which the tokenizer's chat template does not read{hint} "
                    + ("Correct it." if key in MESSAGE_KEYS else f"Correct it, or pass --ignore_keys {key}.")
                )
        calls = message.get("tool_calls")
        if not calls:
            return message
        form = self.call_form
        content = message.get("content")
        if content is not None and not form.with_content:
            raise UserError(
                f"{place}: the tokenizer's chat template writes either 'tool_calls' or 'content', and this message has "
                "both. Split it, or remove one."
            )
        calls = [
            {**call, "function": {**call["function"], "arguments": form.arguments(call["function"]["arguments"])}}
            for call in calls
        ]
        return {**message, "content": form.no_content if content is None else content, "tool_calls": calls}

    @functools.cached_property
    def call_form(self) -> CallForm:
        """The form in which a call is written whole, found by trying."""
        for arguments in (itself, json_text):
            for no_content in (None, ""):
                if self.writes_call(arguments, no_content):
                    return CallForm(arguments, no_content, self.writes_call(arguments, "Words of the probe."))
        return CallForm(itself, None, with_content=True)  # what is wrong with it, a record's own rendering will say

    def writes_call(self, arguments: Callable[[dict], object], content: str | None) -> bool:
        """Whether the template writes a call's name, arguments and content, and nothing as Python writes it."""
        given = {"probe_key": "probe_value"}
        call = {
            "id": "probe0000",
            "type": "function",
            "function": {"name": "probe_name", "arguments": arguments(given)},
        }
        chat = [
            {"role": "user", "content": "A question."},
            {"role": "assistant", "content": content, "tool_calls": [call]},
        ]
        try:
            text, _ = self.rendered(chat)
        except Exception:
            return False
        wanted = ("probe_name", "probe_key", "probe_value", content or "")
        return all(part in text for part in wanted) and repr(given) not in text and "None" not in text


def itself(value: dict) -> dict:
    return value


def json_text(value: dict) -> str:
    return json.dumps(value, ensure_ascii=False)
