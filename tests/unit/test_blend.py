"""The blend as a pure function of weights and lengths. Axes: D sources, N samples."""

import numpy as np
import pytest
from blend_fixtures import chunks_of, sources
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig

from megatron_dynmix.data import blend
from megatron_dynmix.data.blend import Cursor, build_chunk, largest_remainder, order_seed, rows_of


@st.composite
def runs(draw, pauses=True):
    """Stages of at least 20 rows per source, where every source that is drawn at all is due a row."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_sources = draw(st.integers(2, 64))
    concentration = draw(st.sampled_from([0.3, 1.0, 10.0]))
    stages = []
    for _ in range(draw(st.integers(1, 8))):
        length = int(rng.integers(20, 41)) * num_sources
        weights_D = rng.dirichlet(np.full(num_sources, concentration))
        if pauses and draw(st.booleans()):  # some, never all
            weights_D[rng.random(num_sources) < 0.3] = 0.0
            weights_D[int(rng.integers(num_sources))] += 0.1
        weights_D /= weights_D.sum()
        active = weights_D > 0
        floor = 1.0 / length
        weights_D = np.where(active, floor + (1 - active.sum() * floor) * weights_D, 0.0)
        stages.append((weights_D / weights_D.sum(), length))
    return stages


def worst_prefix(chunk) -> float:
    """Largest distance of any source's draws from weight x samples, over all prefixes of a chunk."""
    num_samples = len(chunk.dataset_index_N)
    drawn_ND = np.cumsum(chunk.dataset_index_N[:, None] == np.arange(len(chunk.weights_D)), axis=0)
    return float(np.abs(drawn_ND - np.arange(1, num_samples + 1)[:, None] * chunk.weights_D).max())


@settings(max_examples=100)
@given(runs())
def test_I5_no_prefix_of_a_stage_strays_by_two_rows(stages):
    assert max(worst_prefix(chunk) for chunk in chunks_of(stages)) < 2


def test_I5_nor_does_one_whose_chunk_has_to_be_drawn_by_deadline(monkeypatch):
    drawn_by_deadline = []
    by_deadline = blend._draw_by_deadline
    monkeypatch.setattr(
        blend, "_draw_by_deadline", lambda *args: drawn_by_deadline.append(1) or by_deadline(*args)
    )
    rng = np.random.default_rng(0)
    stages = []
    for _ in range(1500):
        weights_D = 1 / 300 + (1 - 12 / 300) * rng.dirichlet(np.full(12, 0.3))
        stages.append((weights_D / weights_D.sum(), 300))
    assert max(worst_prefix(chunk) for chunk in chunks_of(stages)) < 2
    assert drawn_by_deadline, "no chunk needed it: the test proves nothing"


@settings(max_examples=20)
@given(runs(pauses=False))
def test_I5_drawing_by_deadline_never_is_a_row_off(stages):
    """At every sample of a chunk what was drawn is within one row of what is due, old debts included."""
    owed_D = np.zeros(len(stages[0][0]))
    for weights_D, length in stages:
        ids_N = blend._draw_by_deadline(weights_D, owed_D, length)
        drawn_ND = np.cumsum(ids_N[:, None] == np.arange(len(weights_D)), axis=0)
        owed_ND = owed_D + weights_D * np.arange(1, length + 1)[:, None] - drawn_ND
        assert np.abs(owed_ND[-1]).max() < 1
        assert owed_ND.min() > -1
        owed_D = owed_ND[-1]


def strayed_from_the_run(stages) -> float:
    """Rows an active source is off the sum of weight x stage length, at worst, at a stage's end."""
    due_D, worst = np.zeros(len(stages[0][0])), 0.0
    for chunk, (weights_D, length) in zip(chunks_of(stages), stages, strict=True):
        due_D += weights_D * length
        end = chunk.cursor_at(chunk.end_sample)
        assert end.owed_D == pytest.approx(due_D - end.drawn_D, abs=1e-6)
        assert end.drawn_D.sum() == end.sample
        worst = max(worst, np.abs(end.owed_D)[weights_D > 0].max())
    return float(worst)


@settings(max_examples=60)
@given(runs(pauses=False))
def test_I5_over_a_run_each_source_stays_within_one_row(stages):
    assert strayed_from_the_run(stages) < 1


@settings(max_examples=60)
@given(runs())
def test_I5_pauses_cost_the_other_sources_no_more_than_a_row(stages):
    """What a paused source is owed waits for it, and the others share that: one row beside their own."""
    assert strayed_from_the_run(stages) < 2


def test_I5_a_heavy_source_does_not_bear_alone_what_paused_ones_are_owed():
    """Sixty sources are due 1.4 rows each; those that got one and are owed 0.4 are paused."""
    first_D = np.array([0.29, 0.29] + [0.007] * 60)
    (chunk,) = chunks_of([(first_D, 200)])
    then_D = np.where(chunk.cursor_at(200).owed_D > 0.1, 0.0, first_D)
    assert np.count_nonzero(then_D) == 26
    assert strayed_from_the_run([(first_D, 200), (then_D / then_D.sum(), 520)]) < 2


def test_I5_small_sources_are_drawn_however_short_the_chunks():
    """A source due 0.3 rows per chunk: restarting the greedy would never draw it."""
    weights_D = np.array([0.97, 0.03])
    chunks = chunks_of([(weights_D, 10)] * 100)
    end = chunks[-1].cursor_at(1000)
    assert end.drawn_D.tolist() == [970, 30]


@settings(max_examples=40)
@given(runs())
def test_a_paused_source_is_never_drawn(stages):
    for chunk in chunks_of(stages):
        assert (chunk.weights_D[chunk.dataset_index_N] > 0).all()


@pytest.mark.parametrize("weights", [[0, 1], [1, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0, 0, 1]])
def test_a_paused_source_is_never_drawn_at_either_end_of_the_list(weights):
    (chunk,) = chunks_of([(weights, 64)])
    counts = np.bincount(chunk.dataset_index_N, minlength=len(weights))
    assert counts.tolist() == [weight * 64 for weight in weights]


def test_a_paused_source_comes_back_where_it_was():
    first, pause, back = chunks_of([([0.5, 0.5], 10), ([0, 1], 10), ([0.5, 0.5], 10)])
    assert first.cursor_at(10).drawn_D.tolist() == [5, 5]
    assert pause.cursor_at(20).drawn_D.tolist() == [5, 15]
    assert sorted(back.ordinal_N[back.dataset_index_N == 0].tolist()) == [5, 6, 7, 8, 9]


@settings(max_examples=40)
@given(runs())
def test_ordinals_of_a_source_are_contiguous_over_chunks_and_stages(stages):
    chunks = chunks_of(stages)
    ids_N = np.concatenate([chunk.dataset_index_N for chunk in chunks])
    ordinals_N = np.concatenate([chunk.ordinal_N for chunk in chunks])
    for dataset_id in range(len(stages[0][0])):
        ordinals = ordinals_N[ids_N == dataset_id]
        assert ordinals.tolist() == list(range(len(ordinals)))


@settings(max_examples=40)
@given(runs(), st.data())
def test_a_cursor_inside_a_chunk_counts_what_was_drawn_before_it(stages, data):
    chunk = chunks_of(stages)[-1]
    used = data.draw(st.integers(0, len(chunk.dataset_index_N)))
    cursor = chunk.cursor_at(chunk.start.sample + used)
    after = build_chunk(cursor, chunk.weights_D, 50)
    for dataset_id, ordinal in zip(after.dataset_index_N, after.ordinal_N, strict=True):
        assert ordinal >= cursor.drawn_D[dataset_id]
    assert cursor.drawn_D.sum() == cursor.sample


@settings(max_examples=100)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=12))
def test_from_a_fresh_cursor_it_is_the_stock_blend_bit_for_bit(counts):
    """Megatron-Core's `BlendedDataset` over the same datasets, whole numbers of rows due."""
    size = sum(counts)
    weights_D = np.array(counts) / size
    config = BlendedMegatronDatasetConfig.__new__(BlendedMegatronDatasetConfig)
    config.defer_npy_index_mmap, config.path_to_cache = False, None
    stock = BlendedDataset(sources(*counts), weights_D.tolist(), size, config)
    ours = build_chunk(Cursor.start(len(counts)), weights_D, size)
    assert ours.dataset_index_N.tolist() == stock.dataset_index.tolist()
    assert ours.ordinal_N.tolist() == stock.dataset_sample_index.tolist()
    assert ours.dataset_index_N.dtype == stock.dataset_index.dtype


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=40), st.integers(1, 10**5))
def test_largest_remainder_keeps_the_sum_and_stays_within_one(parts, total):
    share_D = np.array(parts, float) + (sum(parts) == 0)
    due_D = share_D * (total / share_D.sum())
    counts_D = largest_remainder(due_D)
    assert counts_D.sum() == total
    assert np.abs(counts_D - due_D).max() < 1
    assert not counts_D[due_D == 0].any()


def test_largest_remainder_gives_ties_to_the_lowest_index():
    assert largest_remainder(np.array([1.5, 0.5, 1.5, 0.5])).tolist() == [2, 1, 1, 0]


def test_I4_every_row_once_per_epoch_before_any_twice():
    sizes_D = np.array([7, 16, 1])
    chunks = chunks_of([([0.3, 0.5, 0.2], 40), ([0.6, 0.4, 0.0], 40), ([0.1, 0.8, 0.1], 40)])
    drawn: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for chunk in chunks:
        rows_N = rows_of(chunk.dataset_index_N, chunk.ordinal_N, sizes_D, [5, 6, 7])
        for dataset_id, row in zip(chunk.dataset_index_N.tolist(), rows_N.tolist(), strict=True):
            drawn[dataset_id].append(row)
    for dataset_id, rows in drawn.items():
        size = int(sizes_D[dataset_id])
        epochs = [rows[start : start + size] for start in range(0, len(rows), size)]
        assert len(epochs) > 3
        for epoch in epochs[:-1]:
            assert sorted(epoch) == list(range(size))
        assert len(set(epochs[-1])) == len(epochs[-1])


def test_I4_the_first_epoch_keeps_the_order_and_later_ones_are_reshuffled_differently():
    size, epochs = 50, 4
    ids_N = np.zeros(size * epochs, np.int16)
    rows_N = rows_of(ids_N, np.arange(size * epochs), np.array([size]), [5])
    orders = [tuple(order) for order in rows_N.reshape(epochs, size).tolist()]
    assert orders[0] == tuple(range(size))
    assert len(set(orders)) == epochs
    other_seed = rows_of(ids_N, np.arange(size * epochs), np.array([size]), [6])
    assert (other_seed[:size] == rows_N[:size]).all()
    assert (other_seed[size:] != rows_N[size:]).any()


def test_I4_a_source_keeps_its_shuffles_when_its_index_changes():
    """Its seed stays; under another one the epoch in hand would repeat rows and leave others out."""
    ordinals_N = np.arange(150)
    alone_N = rows_of(np.zeros(150, np.int16), ordinals_N, np.array([50]), [3])
    second_N = rows_of(np.ones(150, np.int16), ordinals_N, np.array([9, 50]), [8, 3])
    other_N = rows_of(np.ones(150, np.int16), ordinals_N, np.array([9, 50]), [8, 1])
    assert second_N.tolist() == alone_N.tolist() != other_N.tolist()


def test_seed_and_name_decide_the_order_of_a_source():
    names = ["math", "math-again", "Math", "1", "", "数学"]
    seeds = {order_seed(seed, name) for seed in (0, 1, 11, 2**63) for name in names}
    assert len(seeds) == 4 * len(names) and order_seed(1, "1x") != order_seed(11, "x")
    assert all(0 <= seed < 2**60 for seed in seeds)
    assert order_seed(1234, "math") == 1074304245634521961, (
        "frozen: another one changes the order of every run"
    )
