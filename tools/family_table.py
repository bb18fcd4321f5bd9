"""Write the page of the families of models from the code that converts them.

python tools/family_table.py docs/families.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_dynmix.families import FAMILIES, known_as

HEAD = """# Families of models

What `convert`, `model.load_hf` and `model.preset` take, by the `model_type` of config.json. What is said of
all under [what is converted](convert.md#what-is-converted) is not repeated here.

This page is written by `python tools/family_table.py docs/families.md`.
"""


def page() -> str:
    """Return the whole page as Markdown."""
    rows = [("models", "`model_type`", "since", "logits compared with", "refused, and why")]
    rows += [("-",) * len(rows[0])]
    for model_type, family in FAMILIES.items():
        alias, own = known_as(model_type), family.dialect.defaults is not None
        compared = "nothing" if own else "`transformers`" + (f", as `{alias}`" if alias != model_type else "")
        refused = [
            f"`{name}` other than `{only.value}`: {only.why}" for name, only in family.dialect.must.items()
        ]
        refused += [f"{what}: {why}" for what, why in family.refused.items()]
        rows.append(
            (family.title, f"`{model_type}`", family.since, compared, "; ".join(refused) or "nothing else")
        )
    return HEAD + "\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("output", type=Path)
    parser.parse_args().output.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
