"""Train a byte-level BPE tokenizer on instruction data; a Hugging Face folder comes out."""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_dynmix.data.prepare.formats import read_conversations
from megatron_dynmix.data.prepare.readers import find_inputs
from megatron_dynmix.data.tokenizer.fast import train_bpe
from megatron_dynmix.errors import InputError


def _texts(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        for conversation in read_conversations(path):
            yield from (turn.text for turn in conversation.turns if turn.text)


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", type=Path, required=True, metavar="FILE")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    try:
        files = [file for path in args.input for file in find_inputs(path)]
        tokenizer = train_bpe(_texts(files), args.vocab_size, args.output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {tokenizer.vocab_size} tokens (asked for {args.vocab_size})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
