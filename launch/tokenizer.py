"""The tokenizer: loaded with the model, or one token per byte, made here without any download."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from launch.errors import UserError

# The markers around {% generation %} tell HF which tokens the assistant wrote: the content and its end token.
BYTE_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
BYTE_SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 256 bytes (ids 0 to 255 in byte order) and a few special tokens (ids from 256).

    It needs no file, represents any text without an unknown token, and has a chat template.
    """
    alphabet = byte_characters()
    tokenizer = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(BYTE_SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        chat_template=BYTE_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def byte_characters() -> list[str]:
    """The printable character that byte-level BPE uses for each byte, in byte order.

    Bytes that print as themselves stand for themselves; the others take the code points from 256 upwards, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    replacements = iter(range(256, 512))
    return [chr(byte if byte in printable else next(replacements)) for byte in range(256)]


def load_tokenizer(name_or_path: str | None) -> tuple[PreTrainedTokenizerBase, str]:
    """Load a tokenizer, or make the byte-level one for None.

    Returns:
        The tokenizer, with a pad token, and a sentence that says which it is.
    """
    if name_or_path is None:
        tokenizer = byte_tokenizer()
        return tokenizer, f"one token per byte ({len(tokenizer)} tokens, made in code)"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name_or_path}: no tokenizer could be loaded ({first_line(error)}). Pass --tokenizer_name_or_path with a "
            "folder that holds tokenizer.json, or a Hub name; without a network only folders work."
        ) from error
    description = f"{name_or_path} ({len(tokenizer)} tokens)"
    if tokenizer.eos_token is None:
        raise UserError(
            f"{name_or_path}: the tokenizer has no end-of-text token, so a model could not learn to stop. "
            "Set eos_token in its tokenizer_config.json."
        )
    if tokenizer.pad_token is None:
        # Safe for training: padding is left out of the loss by its label (-100), not by its token.
        tokenizer.pad_token = tokenizer.eos_token
        description += f", padded with {tokenizer.eos_token} as it has no pad token"
    return tokenizer, description


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
