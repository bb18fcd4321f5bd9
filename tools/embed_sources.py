"""One vector per source for the `sent-emb` strategy: the mean sentence embedding of its first conversations.

Needs `pip install -e '.[embed]'` and a sentence-transformers model on disk, or its hub name.
"""

import argparse
import sys
from itertools import islice
from pathlib import Path

import numpy as np

from megatron_dynmix.data.prepare.formats import read_conversations
from megatron_dynmix.errors import InputError


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--source", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--model", required=True, metavar="DIR", help="sentence-transformers model")
    parser.add_argument(
        "--rows", type=int, default=1000, metavar="N", help="first rows of each source (1000)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.npz")
    args = parser.parse_args()
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        print("error: sentence-transformers is not installed; pip install -e '.[embed]'", file=sys.stderr)
        return 2
    try:
        files = dict(_named(pair) for pair in args.source)
        model = SentenceTransformer(args.model)
        vectors = {}
        for name, path in files.items():
            texts = [
                "\n".join(turn.text for turn in conversation.turns if turn.text)
                for conversation in islice(read_conversations(path), args.rows)
            ]
            if not texts:
                raise InputError(f"{path}: no row of source {name} can be read; there is nothing to embed")
            vectors[name] = np.asarray(model.encode(texts), dtype=np.float64).mean(axis=0)
            print(f"{name}: mean of {len(texts)} rows, {vectors[name].size} numbers")
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    np.savez(args.output, **vectors)
    return 0


def _named(pair: str) -> tuple[str, Path]:
    name, equals, path = pair.partition("=")
    if not (name and equals and path):
        raise InputError(f"--source {pair}: give NAME=FILE")
    return name, Path(path)


if __name__ == "__main__":
    sys.exit(main())
