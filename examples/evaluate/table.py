"""The paper's numbers out of the results of lm-evaluation-harness, one line for each model.

Usage: table.py OUTPUT...   where paper.sh has written the results of one model into each folder.
"""

import json
import sys
from pathlib import Path

COLUMNS = {
    "MMLU": [("mmlu", "acc,none")],
    "BBH": [("bbh_fewshot", "exact_match,none")],
    "GSM8K": [("gsm8k_cot", "exact_match,strict-match")],
    "QA": [("arc_easy", "acc_norm,none"), ("arc_challenge", "acc_norm,none"), ("boolq", "acc,none")],
}
"""Column -> the tasks whose mean it is, and the metric of each. What the harness now calls `strict-match`,
the number after "The answer is", was `get-answer` in the one that the paper used."""


def read_results(output: Path) -> dict[str, dict[str, float]]:
    """Task -> metric -> value; of a task that was run twice, the newest run's."""
    found: dict[str, dict[str, float]] = {}
    for path in sorted(output.rglob("results_*.json"), key=lambda path: path.name):
        results = json.loads(path.read_text(encoding="utf-8"))
        found.update(results["results"])
        found.update(results.get("groups", {}))
    return found


def percent(results: dict[str, dict[str, float]], column: str) -> str:
    """Mean of a column's tasks; a dash if one of them has not been run."""
    values = [results.get(task, {}).get(metric) for task, metric in COLUMNS[column]]
    if any(value is None for value in values):
        return "-"
    return f"{100 * sum(values) / len(values):.2f}"


def main() -> int:
    """Print the table; returns the exit code."""
    outputs = [Path(name) for name in sys.argv[1:]]
    if not outputs or not all(output.is_dir() for output in outputs):
        print(__doc__, file=sys.stderr)
        return 2
    print("| model | " + " | ".join(COLUMNS) + " |")
    print("|---" * (1 + len(COLUMNS)) + "|")
    for output in outputs:
        results = read_results(output)
        print(f"| {output.name} | " + " | ".join(percent(results, column) for column in COLUMNS) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
