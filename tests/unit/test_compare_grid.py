"""What `compare` is given: variants as text and as YAML, seeds."""

from types import SimpleNamespace

import pytest
from config_fixtures import good_settings, load

from megatron_dynmix import platform
from megatron_dynmix.compare.grid import (
    Grid,
    Variant,
    check_distinct,
    parse_seeds,
    variants_from_file,
    variants_from_text,
)
from megatron_dynmix.errors import InputError
from megatron_dynmix.training import setup
from megatron_dynmix.training.setup import CheckedRun

platform.start()
from megatron_dynmix.compare import comparison  # noqa: E402
from megatron_dynmix.compare.cell import Cell  # noqa: E402


def test_strategies_with_and_without_options():
    variants = variants_from_text("uniform,gate-load:signal=train,interval=50,my.rules:Rule,fixed:lr=1e-3")
    assert variants == [
        Variant("uniform", (("strategy", "uniform"),)),
        Variant(
            "gate-load_signal=train_interval=50",
            (("strategy", "gate-load"), ("signal", "train"), ("interval", "50")),
        ),
        Variant("my.rules_Rule", (("strategy", "my.rules:Rule"),)),
        Variant("fixed_lr=1e-3", (("strategy", "fixed"), ("lr", "1e-3"))),
    ]


def test_options_of_a_strategy_of_ones_own():
    (variant,) = variants_from_text("my.rules:Rule:interval=5")
    assert variant.settings == (("strategy", "my.rules:Rule"), ("interval", "5"))


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "belongs to no strategy"),
        ("uniform,,fixed", "belongs to no strategy"),
        ("interval=5", "belongs to no strategy"),
        ("gate-load:intervall=5", "did you mean interval"),
        ("gate-load:seed=5", "given by --seeds"),
    ],
)
def test_strategies_that_cannot_be_read(text, complaint):
    with pytest.raises(InputError, match=complaint):
        variants_from_text(text)


def test_a_grid_file_holds_any_setting_and_the_seed_fills_in(tmp_path):
    path = tmp_path / "GRID.yaml"
    path.write_text(
        "wide: {strategy: gate-load, layers: [0, 2], bf16: false, lr: 1.0e-3}\n"
        "after: {strategy: fixed, pretrained_checkpoint: 'runs/seed-{seed}/checkpoints'}\n"
    )
    wide, after = variants_from_file(path)
    assert wide.flags(3) == [
        *("--strategy=gate-load", "--layers=[0, 2]", "--bf16=false", "--lr=0.001", "--seed=3")
    ]
    assert after.flags(7)[1] == "--pretrained-checkpoint=runs/seed-7/checkpoints"


def test_flags_of_a_grid_are_read_as_the_same_values(tmp_path):
    from megatron_dynmix.config.load import parse_flags

    path = tmp_path / "GRID.yaml"
    path.write_text(
        "wide: {strategy: gate-load, rampup_batch_size: [2, 2, 8], bf16: false, lr: 1.0e-3, min_lr: 0}\n"
    )
    (wide,) = variants_from_file(path)
    parsed = parse_flags(wide.flags(3))
    assert parsed == {
        **{
            "strategy": "gate-load",
            "rampup_batch_size": (2, 2, 8),
            "bf16": False,
            "lr": 1e-3,
            "min_lr": 0.0,
            "seed": 3,
        }
    }


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("[uniform]", "variants by name"),
        ("", "variants by name"),
        ("a: uniform", "must hold settings"),
        ("a b: {strategy: uniform}", "cannot be a folder's name"),
        ("../a: {strategy: uniform}", "cannot be a folder's name"),
        ("1: {strategy: uniform}", "in quotes"),
        ("a: {strategi: uniform}", "did you mean strategy"),
        ("a: {strategy: uniform}\na: {strategy: fixed}", "twice"),
        ("a: {", "cannot be read"),
    ],
)
def test_grid_files_that_cannot_be_used(tmp_path, content, complaint):
    path = tmp_path / "GRID.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=complaint):
        variants_from_file(path)


def test_a_missing_grid_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        variants_from_file(tmp_path / "no.yaml")


def test_two_variants_of_one_name():
    with pytest.raises(InputError, match="uniform is given twice"):
        check_distinct(variants_from_text("uniform,uniform"))


def test_seeds():
    assert parse_seeds("1, 2,30") == (1, 2, 30)
    for text in ("", "1,", "a", "-1", "1.5"):
        with pytest.raises(InputError, match="whole numbers"):
            parse_seeds(text)
    with pytest.raises(InputError, match="a seed twice"):
        parse_seeds("1,1")


def cell(folder, name, seed=1, **mixing):
    content = good_settings(folder)
    content["mixing"] |= mixing
    grid = Grid(
        run_yaml=folder / "RUN.yaml",
        output=folder / "out",
        flags=(),
        nproc=1,
    )
    return Cell(grid=grid, variant=Variant(name, ()), seed=seed, config=load(folder, content))


def read_once(monkeypatch):
    """Data of three sources, which may be read once; returns what is asked of `check_before_start`."""
    asked, data = [], [SimpleNamespace(train=[range(20)] * 3, reports=["of all"])]

    def check_before_start(config, *, fresh):
        asked.append(fresh)
        return CheckedRun(config, None, {})

    monkeypatch.setattr(comparison, "check_run", lambda config, world_size: None)
    monkeypatch.setattr(comparison, "check_before_start", check_before_start)
    monkeypatch.setattr(setup, "read_data", lambda config, tokenizer: data.pop())
    return asked


@pytest.mark.filterwarnings("ignore:moe_ffn_hidden_size")
def test_a_variant_without_first_weights_is_refused_before_any_cell_is_started(tmp_path, monkeypatch):
    """All variants have the same data, which are read for the first of them only."""
    read_once(monkeypatch)
    cells = [cell(tmp_path, "even", strategy="uniform"), cell(tmp_path, "few", strategy="unimax")]
    with pytest.raises(InputError, match=r"variant few: mixing: the run draws 160 rows"):
        comparison._check(cells)


@pytest.mark.filterwarnings("ignore:moe_ffn_hidden_size")
@pytest.mark.parametrize("begun", [0, 1, 2])
def test_what_runs_begin_with_is_asked_of_a_variant_only_while_one_begins(begun, tmp_path, monkeypatch):
    asked = read_once(monkeypatch)
    cells = [cell(tmp_path, "even", seed, strategy="uniform") for seed in (1, 2)]
    for one in cells[:begun]:
        checkpoints = one.run_dir / "checkpoints"
        checkpoints.mkdir(parents=True)
        (checkpoints / "latest_checkpointed_iteration.txt").write_text("5")
    comparison._check(cells)
    assert asked == [begun < 2]
