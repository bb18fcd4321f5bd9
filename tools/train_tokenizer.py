"""Train a byte-level BPE tokenizer on ShareGPT JSONL files: a Hugging Face folder comes out."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_dynmix.data.conversation import parse_sharegpt
from megatron_dynmix.data.jsonl import BadLine, read_jsonl
from megatron_dynmix.data.tokenizer import train_bpe
from megatron_dynmix.errors import InputError


def _texts(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        for line, row in read_jsonl(path):
            try:
                if isinstance(row, BadLine):
                    raise ValueError(row.reason)
                conversation = parse_sharegpt(row)
            except ValueError as error:
                print(f"{path}:{line}: left out: {error}", file=sys.stderr)
                continue
            yield from (turn.text for turn in conversation.turns)


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", type=Path, required=True, metavar="FILE")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    try:
        tokenizer = train_bpe(_texts(args.input), args.vocab_size, args.output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {tokenizer.vocab_size} tokens (asked for {args.vocab_size})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
