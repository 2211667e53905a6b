"""What tokenized data depend on beside the data: a cache is good as long as none of it has changed."""

import hashlib
import importlib.metadata
import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerBase

# The modules through which a record goes on its way to token ids and labels.
SOURCES = (
    "conversations", "data", "encoding", "errors", "examples", "json_files", "preferences", "records", "rows", "sharegpt",
    "tables", "templates",
)  # fmt: skip
# jinja2 renders chat templates, trl has variants of them, sentencepiece is behind some Python tokenizers.
LIBRARIES = ("datasets", "jinja2", "pyarrow", "sentencepiece", "tokenizers", "transformers", "trl")


def encoding_key(tokenizer: PreTrainedTokenizerBase, folder: Path = Path(__file__).parent) -> str:
    """A key of 64 digits for how records are encoded: by this code, these libraries and this tokenizer.

    Args:
        tokenizer: taken by the files that it saves, chat templates included.
        folder: where ``SOURCES`` lie.
    """
    key = hashlib.sha256()
    for name in SOURCES:
        add(key, name, (folder / f"{name}.py").read_bytes())
    for name in LIBRARIES:
        add(key, name, version(name).encode())
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        for file in sorted(path for path in Path(saved).rglob("*") if path.is_file()):
            add(key, str(file.relative_to(saved)), file.read_bytes())
    return key.hexdigest()


def combined_key(*parts: object) -> str:
    """A key for several things, told apart by their ``repr``."""
    key = hashlib.sha256()
    for part in parts:
        add(key, "", repr(part).encode())
    return key.hexdigest()


def add(key, name: str, content: bytes) -> None:
    """Lengths keep one part from being taken for the end of another."""
    key.update(f"{name} {len(content)}\n".encode())
    key.update(content)


def version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "none"
