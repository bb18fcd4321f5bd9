"""Packed rows of prepared conversations in stock's loop: whole, masked, and what the flags change."""

import re

import pytest

from megatron_dynmix.cli import main
from megatron_dynmix.data.tokenizer.fast import train_bpe
from megatron_dynmix.data.tokenizer.load import load_tokenizer
from tests.stock.engine import records
from tests.stock.test_stock import LAYOUTS, save_initial
from tests.unit.data_fixtures import TEXTS, prepare_files, varied_rows, write_jsonl

GATE_LOAD = ("--dynmix-strategy", "gate-load", "--dynmix-interval", "2", "--dynmix-eta", "50")


@pytest.fixture(scope="session")
def conversations(tmp_path_factory):
    """Flags that name two prepared sources."""
    folder = tmp_path_factory.mktemp("conversations")
    train_bpe(TEXTS, 400, folder)
    tokenizer = load_tokenizer(folder)
    words = []
    for seed, name in enumerate(("chat", "math", "code")):
        rows = write_jsonl(folder / f"{name}.jsonl", varied_rows(150, seed))
        prepare_files(tokenizer=tokenizer, name=name, inputs=[rows], prefix=folder / name)
        words += ["1", str(folder / name)]
    longer = ("--seq-length", "128", "--max-position-embeddings", "128")
    return ("--data-path", *words, *longer, "--vocab-size", "512", "--dynmix-packed-rows")


@pytest.fixture(scope="session")
def begin(prefixes, cache, tmp_path_factory):
    """Weights that every layout begins from."""
    return save_initial(tmp_path_factory.mktemp("packed_initial"), prefixes, cache, "--vocab-size", "512")


def test_conversations_are_whole_and_padding_is_counted_nowhere(stock, conversations, begin, tmp_path):
    run_dir = tmp_path / "run"
    run = stock(1, *begin, *conversations, *GATE_LOAD, "--dynmix-run-dir", str(run_dir))
    assert run.losses[-1] < run.losses[0]
    updates = records(run_dir)
    assert len(updates) == 3 and [sum(line["rows"]) for line in updates] == [16, 32, 48]
    assert 0 < sum(updates[0]["tokens"]) < 16 * 128, "only answers are trained on"
    assert main(["verify", str(run_dir)]) == 0


def test_middle_stages_attend_within_conversations_where_that_is_asked_for(
    stock, conversations, begin, tmp_path
):
    flags = (*begin, *conversations, *GATE_LOAD)
    one = stock(1, *flags, "--dynmix-run-dir", str(tmp_path / "one"))
    stages = ("--pipeline-model-parallel-size", "4")
    four = stock(4, *flags, *stages, "--dynmix-packed-attention", "--dynmix-run-dir", str(tmp_path / "four"))
    assert four.losses == pytest.approx(one.losses, abs=2e-5)
    assert validation(four) == pytest.approx(validation(one), abs=2e-5)
    assert records(tmp_path / "four")[0]["tokens"] == records(tmp_path / "one")[0]["tokens"]
    stock(4, *flags, *stages, code=2)


def validation(run):
    return [float(number) for number in re.findall(r"lm loss value: (\S+)", "\n".join(run.texts))]


def balance(run):
    return [float(number) for number in re.findall(r"load_balancing_loss: (\S+)", "\n".join(run.texts))]


def test_padding_is_left_out_of_the_balance_loss_where_that_is_asked_for(stock, conversations, begin):
    flags = (*begin, *conversations, *GATE_LOAD, "--train-iters", "2", "--moe-aux-loss-coeff", "1")
    counted, left_out = stock(1, *flags), stock(1, *flags, "--dynmix-padding-mask")
    assert balance(counted)[0] != balance(left_out)[0]
    assert counted.losses[0] == left_out.losses[0]


PADDED = {name: LAYOUTS[name] for name in ("ep2 full recompute", "pp2 vpp2")}
PADDED["tp2 sp pp2"] = (4, (*LAYOUTS["tp2 sp"][1], *LAYOUTS["pp2"][1]))


@pytest.mark.slow
@pytest.mark.parametrize("layout", PADDED)
def test_every_layout_leaves_out_the_same_padding(stock, conversations, begin, layout):
    ranks, more = PADDED[layout]
    asked = ("--train-iters", "2", "--moe-aux-loss-coeff", "1", "--dynmix-padding-mask")
    flags = (*begin, *conversations, *GATE_LOAD, *asked, "--dynmix-packed-attention")
    one, run = stock(1, *flags), stock(ranks, *flags, *more)
    assert run.losses == pytest.approx(one.losses, abs=2e-5)
    assert balance(run) == pytest.approx(balance(one), rel=1e-4)


def test_losses_by_source_add_up_to_stocks_own(stock, tmp_path):
    run = stock(2, "--expert-model-parallel-size", "2", "--dynmix-source-loss", "--dynmix-strategy", "fixed")
    text = run.texts[0]
    assert len(re.findall("dynmix: training loss by source", text)) == 6
    lines = re.findall(r"dynmix: validation loss by source at iteration \d+: (.+)", text)
    assert len(lines) == 2
    losses = {name: float(loss) for name, loss in re.findall(r"(\w+) (\S+)(?: \||$)", lines[0])}
    assert set(losses) <= {"web", "code", "math"}
    assert min(losses.values()) - 1e-5 <= validation(run)[0] <= max(losses.values()) + 1e-5
