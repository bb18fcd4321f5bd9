"""Tables of very many rows show the foremost."""

import math

import numpy as np
import pytest
from config_fixtures import good_settings, load

from megatron_dynmix import platform
from megatron_dynmix.data.packed import PackingReport
from megatron_dynmix.records.text_table import first_of, foremost, foremost_rows, table

platform.start()
from megatron_dynmix.training.data_tables import packed_table, share_table  # noqa: E402
from megatron_dynmix.training.start_report import settings_text  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:moe_ffn_hidden_size")


def test_the_foremost_stand_in_their_order_and_unknown_ones_last():
    assert foremost([1, 5, math.nan, 3, 5], 3) == [1, 3, 4]
    assert foremost([math.nan, math.nan, 1], 2) == [0, 2]
    assert foremost([1, 2], None) == foremost([1, 2], 2) == foremost([1, 2], 9) == [0, 1]


def test_a_table_says_how_many_rows_it_leaves_out():
    rows = [[name, number] for name, number in zip("abc", (3, 1, 2), strict=True)]
    assert foremost_rows(["x", "n"], rows, [3, 1, 2], 2).splitlines() == [
        "x  n",
        "a  3",
        "c  2",
        "  ... and 1 more (see --log-sources)",
    ]
    assert foremost_rows(["x", "n"], rows, [3, 1, 2], None) == table(["x", "n"], rows)
    assert first_of(["a", "b"], 1) == ["a", "  ... and 1 more (see --log-sources)"]
    assert first_of(["a", "b"], None) == first_of(["a", "b"], 2) == ["a", "b"]


class Source:
    """A packed source, half of whose examples were lost; its number says how many rows it has."""

    mean_examples_per_row = 2.0

    def __init__(self, number):
        self.name = f"source_{number:03d}"
        self.packing_report = PackingReport(
            examples=50,
            dropped_overlong=50,
            truncated=0,
            untrained=0,
            rows=number,
            tokens=9,
            useful_token_share=1,
        )


@pytest.mark.parametrize("most, shown", [(None, 300), (300, 300), (20, 20), (1, 1)])
def test_tables_of_packed_sources_are_as_long_as_they_may(most, shown):
    sources = [Source(number) for number in range(1, 301)]
    lines = packed_table(sources, most).splitlines()
    assert len(lines) == 1 + 2 * shown + 2 * (shown < 300)
    assert lines[shown].split()[:2] == ["source_300", "300"]
    shares_D = np.arange(300) / sum(range(300))
    lines = share_table(sources, shares_D, most).splitlines()
    assert len(lines) == 1 + shown + (shown < 300) and lines[shown].startswith("source_300")


def test_the_settings_of_very_many_sources_are_shown_in_part(tmp_path):
    content = good_settings(tmp_path)
    source = next(iter(content["data"]["sources"].values()))
    content["data"]["sources"] = {f"source_{number:03d}": source for number in range(300)}
    config = load(tmp_path, content)
    assert config.logging.most_of(config.data.sources) == 20
    text = settings_text(config, 20)
    assert "source_019:" in text and "source_020:" not in text
    assert text.endswith("# of 300 sources the first 20; config.yaml has all")
    assert settings_text(config, None).count("source_") == 300
    asked = load(tmp_path, content, ["--log-sources", "300"])
    assert asked.logging.most_of(asked.data.sources) is None
