"""From records to token ids and labels.

Labels are the token ids where the loss counts and -100 elsewhere. For texts the loss counts everywhere; for prompts,
instructions and chats only on the answers and on the token that ends each.

The encoding is done here rather than by TRL because TRL masks chats only for the templates it knows how to patch; the
comparison of prefixes below works for any template that does not rewrite earlier messages, Llama 3.1's among them.
"""

import copy
import functools

from transformers import PreTrainedTokenizerBase

from launch.errors import UserError
from launch.templates import ChatTemplate, Span

IGNORED = -100


class Encoder:
    """Turns checked records into ``{"input_ids": [...], "labels": [...]}``, two lists of the same length.

    Args:
        tokenizer: any HF tokenizer with an end-of-text token.
        answers_only: refuse what is not a conversation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, answers_only: bool = False):
        self.tokenizer, self.answers_only = tokenizer, answers_only
        self.templates: dict[str, ChatTemplate] = {}

    def __call__(self, shape: str, record: dict, where: str) -> dict[str, list[int]]:
        """Encode one record of a shape of ``records.SHAPES``, or a "piece" of a text file."""
        if self.answers_only and shape != "chat" and not (shape == "instruction" and self.tokenizer.chat_template):
            raise UserError(
                f"{where}: --assistant_only_loss is for conversations, and this is not one ({shape}). Leave it out: of "
                "prompts, instructions and chats only the answers are learned in any case."
            )
        if shape == "piece":
            return self.text_piece(**record)
        if shape == "text":
            return self.text_piece(record["text"], first=True, last=True)
        if shape == "prompt":
            return self.prompt_and_answer(record["prompt"], record["completion"])
        if shape == "instruction":
            return self.instruction(record, where)
        return self.chat(record["messages"], where, record.get("tools"), record.get("learnt"))

    def text_piece(self, text: str, first: bool, last: bool) -> dict[str, list[int]]:
        """A text, or a piece of one: a start token only before its first piece, an end token only after its last."""
        ids = self.ids(text)
        if first:
            ids = self.started(ids)
        if last:
            ids = self.ended(ids)
        return {"input_ids": ids, "labels": list(ids)}

    def prompt_and_answer(self, prompt: str, answer: str) -> dict[str, list[int]]:
        """Tokenized apart, as at inference: no token can straddle the boundary, so the mask is exact."""
        prompt_ids = self.started(self.ids(prompt))
        answer_ids = self.ended(self.ids(answer))
        return {"input_ids": prompt_ids + answer_ids, "labels": [IGNORED] * len(prompt_ids) + answer_ids}

    def instruction(self, record: dict, where: str) -> dict[str, list[int]]:
        """A chat where the tokenizer has a chat template, and plain paragraphs where it has none.

        All answers of a "history" are learned, as those of a chat are.
        """
        question = "\n\n".join(part for part in (record["instruction"], record.get("input")) if part)
        turns = [*record.get("history", []), [question, record["output"]]]
        if not self.tokenizer.chat_template:
            if len(turns) > 1:
                raise UserError(
                    f"{where}: a 'history' needs a chat template and the tokenizer has none. Fine-tune the model's chat "
                    "variant, or pass --ignore_keys history."
                )
            prompt = "\n\n".join(part for part in (record.get("system"), question) if part)
            return self.prompt_and_answer(prompt + "\n\n", record["output"])
        chat = [{"role": "system", "content": record["system"]}] if "system" in record else []
        for asked, answered in turns:
            chat += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return self.chat(chat, where)

    def chat(
        self, messages: list[dict], where: str, tools: list | None = None, learnt: list[bool] | None = None
    ) -> dict[str, list[int]]:
        """A chat, with the loss on every assistant message, or on those that ``learnt`` says, one bool per message."""
        template = self.template(where, tools)
        messages = template.fit(messages, where, tools)
        answers = [message["role"] == "assistant" for message in messages]
        by_marks = template.marked is not None and self.tokenizer.is_fast  # Python tokenizers keep no positions
        find = self.answers_by_marks if by_marks else self.answers_by_prefix
        ids, mask = find(template, messages, where, tools, answers if learnt is None else learnt)
        if not any(mask):
            raise UserError(
                f"{where}: the chat template gives the assistant no tokens, so there is nothing to learn. Check the "
                "record's assistant messages and the template's {% generation %} markers."
            )
        return {
            "input_ids": ids,
            "labels": [token if answer else IGNORED for token, answer in zip(ids, mask, strict=True)],
        }

    def template(self, where: str, tools: list | None) -> ChatTemplate:
        """The tokenizer's template for a chat: of several, that for tools where it has some, else the default."""
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{where}: chat data needs a chat template and the tokenizer has none. Fine-tune the model's chat "
                "variant, pass --tokenizer_name_or_path with one, or use records with 'prompt' and 'completion'."
            )
        try:
            source = self.tokenizer.get_chat_template(None, tools)
        except ValueError:
            names = ", ".join(sorted(self.tokenizer.chat_template))
            raise UserError(
                f"{where}: the tokenizer has several chat templates ({names}) and none of them is the default. Name "
                "one of them 'default' in the tokenizer's folder."
            ) from None
        if source not in self.templates:
            self.templates[source] = ChatTemplate(self.tokenizer, source)
        return self.templates[source]

    def answers_by_marks(
        self, template: ChatTemplate, messages: list[dict], where: str, tools: list | None, learnt: list[bool]
    ) -> tuple[list[int], list[int]]:
        """Find the answers by the marks in the template.

        Returns:
            (ids, mask), mask 1 on the tokens of the assistant's messages that are learned.
        """
        text, spans = template.render(messages, where, tools)
        if any(message["role"] == "assistant" and not learn for message, learn in zip(messages, learnt, strict=True)):
            owners = self.owners(template, messages, where, tools, len(spans))
            spans = [span for span, owner in zip(spans, owners, strict=True) if learnt[owner]]
        encoded = self.untrimmed(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoded["input_ids"], covered(spans, encoded["offset_mapping"], len(text))

    def owners(
        self, template: ChatTemplate, messages: list[dict], where: str, tools: list | None, marks: int
    ) -> list[int]:
        """The message that each of a conversation's marks belongs to, counted as the conversation grows."""
        owners: list[int] = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                spans = template.render(messages[: number + 1], where, tools)[1]
                if len(spans) <= len(owners):
                    break
                owners += [number] * (len(spans) - len(owners))
        else:
            if len(owners) == marks:
                return owners
        raise UserError(
            f"{where}: the tokenizer's chat template does not mark each message of the assistant by itself, so those "
            "that are not to be learned cannot be told from the others. Remove them, or split the record."
        )

    def answers_by_prefix(
        self, template: ChatTemplate, messages: list[dict], where: str, tools: list | None, learnt: list[bool]
    ) -> tuple[list[int], list[int]]:
        """Find the answers without marks: what an assistant message adds to the conversation before it.

        Returns:
            (ids, mask), mask 1 on the tokens of the assistant's messages that are learned.
        """
        ids = self.ids(template.render(messages, where, tools)[0])
        mask = [0] * len(ids)
        for number, learn in enumerate(learnt):
            if not learn:
                continue
            question = self.ids(template.before_answer(messages, number, where, tools))
            answered = self.ids(template.render(messages[: number + 1], where, tools)[0])
            if answered[: len(question)] != question or ids[: len(answered)] != answered:
                raise UserError(
                    f"{where}: the tokenizer's chat template rewrites earlier messages (message {number + 1}), so the "
                    "answers cannot be told from the rest. Put {% generation %} markers around the assistant's part of "
                    "the template, or use records with 'prompt' and 'completion'."
                )
            mask[len(question) : len(answered)] = [1] * (len(answered) - len(question))
        return ids, mask

    @functools.cached_property
    def untrimmed(self) -> PreTrainedTokenizerBase:
        """The tokenizer, whose tokens' positions take in white space.

        Byte-level tokenizers leave it out of them, afterwards, and a token that begins or ends with some could not be
        told to be in an answer.
        """
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.backend_tokenizer.post_processor = None
        return tokenizer

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def started(self, ids: list[int]) -> list[int]:
        """After the token that this tokenizer itself puts before a text, if it does, unless the text has it already."""
        start = self.start
        return ids if ids[: len(start)] == start else start + ids

    def ended(self, ids: list[int]) -> list[int]:
        """Before the end token, unless the text has it already."""
        end = self.tokenizer.eos_token_id
        return ids if ids[-1:] == [end] else [*ids, end]

    @functools.cached_property
    def start(self) -> list[int]:
        """The tokens that this tokenizer itself puts before a text: none, or its start token."""
        with_special = self.tokenizer("", add_special_tokens=True)["input_ids"]
        return with_special[:1] if with_special[:1] == [self.tokenizer.bos_token_id] else []


def covered(spans: list[Span], offsets: list[Span], length: int) -> list[int]:
    """1 for each token that has a character of a span, and 0 for the others.

    Args:
        spans: begins and ends in a text.
        offsets: the same of its tokens.
        length: characters of the text.
    """
    characters = bytearray(length)
    for begin, end in spans:
        characters[begin:end] = b"\1" * (end - begin)
    return [int(1 in characters[begin:end]) for begin, end in offsets]
