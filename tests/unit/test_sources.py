"""The order in which a run draws the examples of each source. Axes: D sources."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from data_fixtures import tokenizer_dir_fixture, varied_rows, write_jsonl  # noqa: F401

from megatron_dynmix.config.load import load_config
from megatron_dynmix.data.sources import build_rows, plan_blend, prepare_sources
from megatron_dynmix.data.tokenizer.load import load_tokenizer

EPOCHS = 3


def order_of(folder: Path, tokenizer_dir: Path, sources: dict[str, str], **settings) -> dict[str, list[int]]:
    """Name -> its examples in the order drawn, in three epochs of the smallest source."""
    for file in set(sources.values()):
        write_jsonl(folder / file, varied_rows(60, seed=len(file)))
    content = {
        "data": {
            "tokenizer": str(tokenizer_dir),
            "seq_length": 256,
            "prepared_dir": str(folder / "prepared"),
            "packing": settings.get("packing", True),
            "sources": {name: {"path": str(folder / file)} for name, file in sources.items()},
        },
        "mixing": {"strategy": "uniform", "interval": 2},
        "training": {"train_iters": 8, "global_batch_size": 8, "seed": settings.get("seed", 1234)},
    }
    (folder / "RUN.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    config, tokenizer = load_config(folder / "RUN.yaml", []), load_tokenizer(tokenizer_dir)
    assert len(list(prepare_sources(config, tokenizer, workers=1))) == len(sources)
    rows = build_rows(config, tokenizer, probe=False)
    samples = EPOCHS * min(map(len, rows)) * len(rows)
    blend = plan_blend(config, rows, np.full(len(rows), 1 / len(rows)))
    drawn: dict[str, list[int]] = {name: [] for name in sources}
    for dataset_id, row, _ in blend.draws(0, samples):
        drawn[list(sources)[dataset_id]] += rows[dataset_id].examples_of(row)
    return drawn


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "one a row"])
@pytest.mark.parametrize("seed", [0, 1234])
def test_copies_of_a_source_are_not_drawn_in_step(tmp_path, tokenizer_dir, packing, seed):
    copies = {"math": "math.jsonl", "again": "math.jsonl", "third": "math.jsonl"}
    orders = order_of(tmp_path, tokenizer_dir, copies, packing=packing, seed=seed)
    assert all(sorted(order[:60]) == list(range(60)) for order in orders.values()), "each example once"
    for a, b in (("math", "again"), ("math", "third"), ("again", "third")):
        in_step = np.mean([x == y for x, y in zip(orders[a], orders[b], strict=True)])
        assert in_step < 0.1, f"{in_step:.0%} of the examples of {a} and {b} are drawn in step"


def test_an_order_depends_on_no_other_source_and_on_no_place(tmp_path, tokenizer_dir):
    files = {"chat": "a.jsonl", "math": "math.jsonl", "again": "math.jsonl"}
    whole = order_of(tmp_path, tokenizer_dir, files)
    turned = order_of(tmp_path, tokenizer_dir, dict(reversed(files.items())))
    fewer = order_of(tmp_path, tokenizer_dir, {"again": "math.jsonl", "law": "b.jsonl"})
    renamed = order_of(tmp_path, tokenizer_dir, {"again": "math.jsonl", "maths": "math.jsonl"})
    for name in files:
        length = min(len(whole[name]), len(turned[name]))
        assert length > 120 and whole[name][:length] == turned[name][:length], f"{name} keeps its order"
    length = min(len(whole["again"]), len(fewer["again"]))
    assert whole["again"][:length] == fewer["again"][:length]
    assert renamed["maths"][:60] != whole["math"][:60], "another name, another order"


def test_held_out_rows_of_copies_are_read_alike(tmp_path, tokenizer_dir):
    """What a probe measures of two copies differs by nothing."""
    write_jsonl(tmp_path / "math.jsonl", varied_rows(60))
    source = {"path": str(tmp_path / "math.jsonl"), "probe": str(tmp_path / "math.jsonl")}
    content = {
        "data": {
            "tokenizer": str(tokenizer_dir),
            "seq_length": 256,
            "prepared_dir": str(tmp_path / "prepared"),
            "sources": {"math": source, "again": source},
        },
        "training": {"train_iters": 8, "global_batch_size": 8},
    }
    (tmp_path / "RUN.yaml").write_text(yaml.safe_dump(content))
    config, tokenizer = load_config(tmp_path / "RUN.yaml", []), load_tokenizer(tokenizer_dir)
    assert list(prepare_sources(config, tokenizer, workers=1))
    first, second = build_rows(config, tokenizer, probe=True)
    assert len(first) > 3
    assert all(first.examples_of(row) == second.examples_of(row) for row in range(len(first)))
