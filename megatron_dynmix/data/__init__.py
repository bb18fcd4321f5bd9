"""From JSONL to packed rows, and from rows to the blend that changes while it is drawn from."""
