"""From records to token ids and labels.

Labels are the token ids where the loss counts and -100 elsewhere. For texts the loss counts everywhere; for prompts,
instructions and chats only on the answers and on the token that ends each.

The encoding is done here rather than by TRL because TRL masks chats only for the templates it knows how to patch; the
comparison of prefixes below works for any template that does not rewrite earlier messages, Llama 3.1's among them.
"""

import functools

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from launch.errors import UserError

IGNORED = -100


class Encoder:
    """Turns checked records into ``{"input_ids": [...], "labels": [...]}``, two lists of the same length.

    Args:
        tokenizer: any HF tokenizer with an end-of-text token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    @functools.cached_property
    def marked_template(self) -> str | None:
        """For chats alone, so that texts need no TRL."""
        return template_with_answer_marks(self.tokenizer)

    def __call__(self, shape: str, record: dict, where: str) -> dict[str, list[int]]:
        """Encode one record of a shape of ``records.SHAPES``, or a "piece" of a text file."""
        if shape == "piece":
            return self.text_piece(**record)
        if shape == "text":
            return self.text_piece(record["text"], first=True, last=True)
        if shape == "prompt":
            return self.prompt_and_answer(record["prompt"], record["completion"])
        if shape == "instruction":
            return self.instruction(record, where)
        return self.chat(record["messages"], where, record.get("tools"))

    def text_piece(self, text: str, first: bool, last: bool) -> dict[str, list[int]]:
        """A text, or a piece of one: a start token only before its first piece, an end token only after its last."""
        ids = self.ids(text)
        if first:
            ids = self.start() + ids
        if last:
            ids = ids + [self.tokenizer.eos_token_id]
        return {"input_ids": ids, "labels": list(ids)}

    def prompt_and_answer(self, prompt: str, answer: str) -> dict[str, list[int]]:
        """Tokenized apart, as at inference: no token can straddle the boundary, so the mask is exact."""
        prompt_ids = self.start() + self.ids(prompt)
        answer_ids = self.ids(answer) + [self.tokenizer.eos_token_id]
        return {"input_ids": prompt_ids + answer_ids, "labels": [IGNORED] * len(prompt_ids) + answer_ids}

    def instruction(self, record: dict, where: str) -> dict[str, list[int]]:
        """A chat of one turn where the tokenizer has a chat template, and plain paragraphs where it has none."""
        question = "\n\n".join(part for part in (record["instruction"], record.get("input")) if part)
        if self.tokenizer.chat_template is None:
            return self.prompt_and_answer(question + "\n\n", record["output"])
        turn = [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]
        return self.chat(turn, where)

    def chat(self, messages: list[dict], where: str, tools: list | None = None) -> dict[str, list[int]]:
        """A chat, with the loss on every assistant message."""
        if self.tokenizer.chat_template is None:
            raise UserError(
                f"{where}: chat data needs a chat template and the tokenizer has none. Fine-tune the model's chat "
                "variant, pass --tokenizer_name_or_path with one, or use records with 'prompt' and 'completion'."
            )
        if self.marked_template is not None:
            encoded = self.render(
                messages, where, tools, chat_template=self.marked_template, return_assistant_tokens_mask=True
            )
            ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        else:
            ids, mask = self.answers_by_prefix(messages, where, tools)
        if not any(mask):
            raise UserError(
                f"{where}: the chat template gives the assistant no tokens, so there is nothing to learn. Check the "
                "record's assistant messages and the template's {% generation %} markers."
            )
        return {
            "input_ids": ids,
            "labels": [token if answer else IGNORED for token, answer in zip(ids, mask, strict=True)],
        }

    def answers_by_prefix(self, messages: list[dict], where: str, tools: list | None) -> tuple[list[int], list[int]]:
        """Find the answers without markers: what an assistant message adds to the conversation before it.

        Returns:
            (ids, mask), mask 1 on the tokens of assistant messages.
        """
        ids = self.render(messages, where, tools)["input_ids"]
        mask = [0] * len(ids)
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            question = self.render(messages[:number], where, tools, add_generation_prompt=True)["input_ids"]
            answered = self.render(messages[: number + 1], where, tools)["input_ids"]
            if answered[: len(question)] != question or ids[: len(answered)] != answered:
                raise UserError(
                    f"{where}: the tokenizer's chat template rewrites earlier messages (message {number + 1}), so the "
                    "answers cannot be told from the rest. Put {% generation %} markers around the assistant's part of "
                    "the template, or use records with 'prompt' and 'completion'."
                )
            mask[len(question) : len(answered)] = [1] * (len(answered) - len(question))
        return ids, mask

    def render(self, messages: list[dict], where: str, tools: list | None, **options) -> dict[str, list[int]]:
        """Apply the chat template; a template's own complaint is given the record's place."""
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=True, **options)
        except TemplateError as error:
            raise UserError(
                f"{where}: the tokenizer's chat template refuses this conversation ({error}). Many templates want "
                "'user' and 'assistant' in turn, after at most one 'system' message."
            ) from None

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def start(self) -> list[int]:
        """The tokens that this tokenizer itself puts before a text: none, or its start token."""
        with_special = self.tokenizer("", add_special_tokens=True)["input_ids"]
        return with_special[:1] if with_special[:1] == [self.tokenizer.bos_token_id] else []


def template_with_answer_marks(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A chat template that marks the assistant's tokens: the tokenizer's own, TRL's variant of it, or None."""
    if tokenizer.chat_template is None:
        return None
    from trl.chat_template_utils import get_training_chat_template

    try:
        # None means that the tokenizer's own template has the marks already.
        return get_training_chat_template(tokenizer) or tokenizer.chat_template
    except ValueError:
        return None
