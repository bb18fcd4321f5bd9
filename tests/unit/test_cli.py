"""The command line: exit codes, one line on stderr, and what it prints."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from config_fixtures import good_settings, write
from data_fixtures import (  # noqa: F401
    sharegpt,
    tokenizer_dir_fixture,
    tokenizer_fixture,
    varied_rows,
    write_jsonl,
)

import megatron_dynmix
from megatron_dynmix.cli import main

GOLDEN_LOADS = {
    "A": [20, 15, 14, 13, 12, 10, 9, 7],
    "B": [10, 22, 8, 16, 12, 12, 10, 10],
    "C": [13, 13, 12, 13, 12, 13, 12, 12],
    "D": [14, 12, 13, 12, 13, 12, 12, 12],
}
"""Gate loads on which the official implementation of the paper was run; its numbers are below."""


def json_file(folder: Path, name: str, content: object) -> str:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def refused(capsys, *argv: str) -> str:
    """The one line on stderr of a command that ends with 2."""
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and re.match(r"megatron-dynmix( \(rank \d+\))?: ", captured.err), (
        captured.err
    )
    return captured.err


def fresh_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(megatron_dynmix.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_help_in_a_process_of_its_own():
    done = fresh_python("-m", "megatron_dynmix", "--help")
    assert done.returncode == 0 and done.stderr == ""
    for command in ("quickstart", "prepare", "train", "update"):
        assert command in done.stdout


def test_the_command_line_and_update_do_not_import_torch(tmp_path):
    load = json_file(tmp_path, "load.json", GOLDEN_LOADS)
    program = (
        "import sys; from megatron_dynmix.cli import main\n"
        "early = sorted({'torch', 'numpy', 'megatron.core'} & sys.modules.keys())\n"
        f"code = main(['update', '--load', {load!r}])\n"
        "sys.exit(f'{early} {code}' if early or code or 'torch' in sys.modules else 0)"
    )
    done = fresh_python("-c", program)
    assert done.returncode == 0, done.stderr


def test_help_of_a_command_waits_for_its_own_module_only_and_not_for_torch():
    program = """
import contextlib, sys
from megatron_dynmix.cli import COMMANDS, main

def asked(name):
    with contextlib.suppress(SystemExit):
        main([name, "--help"])
    return {each for each in COMMANDS if f"megatron_dynmix.commands.{each}" in sys.modules}

assert asked("verify") == {"verify"}
assert all(name in asked(name) for name in COMMANDS if name != "update")  # which is NumPy throughout
assert not {"torch", "numpy", "megatron.core"} & sys.modules.keys()
"""
    done = fresh_python("-c", program)
    assert done.returncode == 0, done.stderr


def test_update_reaches_at_most_25_files_but_for_the_strategies(tmp_path):
    """One NumPy step must stay readable as one: no model, no data, no records of a run."""
    load = json_file(tmp_path, "load.json", GOLDEN_LOADS)
    program = (
        "import sys; from megatron_dynmix.cli import main\n"
        f"main(['update', '--load', {load!r}])\n"
        "print(*sorted(name for name in sys.modules if name.startswith('megatron_dynmix')), file=sys.stderr)"
    )
    loaded = fresh_python("-c", program).stderr.split()
    reached = [name for name in loaded if ".mixing.strategies." not in name]
    assert "megatron_dynmix.mixing.controller" in reached and len(reached) <= 25, reached


def test_prepare_says_nothing_but_what_is_wrong_in_a_process_of_its_own(tmp_path):
    done = fresh_python("-m", "megatron_dynmix", "prepare", str(tmp_path / "gone.yaml"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "there is no such file" in done.stderr


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.strip() == megatron_dynmix.__version__


@pytest.mark.parametrize("argv", [[], ["tarin"], ["train", "x.yaml"], ["train", "--run-dir", "x"]])
def test_wrong_usage_exits_with_2(capsys, argv):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "megatron-dynmix" in capsys.readouterr().err


@pytest.mark.parametrize("nproc", [(), ("--nproc-per-node", "2")])
def test_train_without_its_file(capsys, tmp_path, nproc):
    line = refused(capsys, "train", str(tmp_path / "no.yaml"), "--run-dir", str(tmp_path / "run"), *nproc)
    assert "no.yaml: there is no such file; give the path of a RUN.yaml" in line


@pytest.mark.parametrize("command", [("train", "--run-dir", "run"), ("prepare",)])
def test_an_unknown_flag_is_answered_with_the_nearest(capsys, tmp_path, command):
    path = write(tmp_path, good_settings(tmp_path))
    name, *options = command
    line = refused(capsys, name, str(path), *options, "--train-itres", "5")
    assert "--train-itres is an unknown flag; did you mean --train-iters?" in line


def test_train_refuses_a_number_of_ranks_that_cannot_be(capsys, tmp_path, monkeypatch):
    path = str(write(tmp_path, good_settings(tmp_path)))
    run = ["--run-dir", str(tmp_path / "run")]
    assert "is 0; it must be 1 or more" in refused(capsys, "train", path, *run, "--nproc-per-node", "0")
    line = refused(capsys, "train", path, *run, "--nproc-per-node", "3")
    assert "3 ranks cannot hold expert TP x EP x PP = 2; start a multiple of 2 ranks" in line
    monkeypatch.setenv("RANK", "0")
    line = refused(capsys, "train", path, *run, "--nproc-per-node", "2")
    assert "--nproc-per-node 2 is given, but this is a rank of a started job; leave it out" in line


@pytest.fixture(name="run_yaml")
def run_yaml_fixture(tmp_path, tokenizer_dir):
    """A run of three tiny sources that passes every check."""
    content = good_settings(tmp_path)
    content["data"] |= {"tokenizer": str(tokenizer_dir), "template": "vicuna"}
    for seed, source in enumerate(content["data"]["sources"].values()):
        write_jsonl(tmp_path / source["path"], varied_rows(4, seed))
        write_jsonl(tmp_path / source["probe"], varied_rows(2, seed + 10))
    return write(tmp_path, content)


@pytest.mark.parametrize("sign", ["metrics.jsonl", "checkpoints/latest_checkpointed_iteration.txt"])
def test_a_run_directory_that_holds_a_run_is_refused(capsys, tmp_path, run_yaml, sign):
    run_dir = tmp_path / "run"
    (run_dir / sign).parent.mkdir(parents=True, exist_ok=True)
    (run_dir / sign).touch()
    line = refused(capsys, "train", str(run_yaml), "--run-dir", str(run_dir), "--nproc-per-node", "2")
    assert f"{run_dir} holds a run already; give another --run-dir" in line and "--resume auto" in line
    assert "holds a run already" in refused(capsys, "quickstart", "--run-dir", str(run_dir))


def test_resume_must_needs_a_checkpoint(capsys, tmp_path, run_yaml):
    run = ["--run-dir", str(tmp_path / "run"), "--nproc-per-node", "2", "--resume", "must"]
    line = refused(capsys, "train", str(run_yaml), *run)
    assert "holds no checkpoint; check the path, or start a new run with --resume auto" in line


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--layers", "[0, 7]"], "mixing: layer 7 was chosen, but the model has 2 MoE layers"),
        (["--eta", "-1"], "mixing: eta"),
        (["--metric", "l3"], "mixing: metric 'l3' is unknown"),
        (["--vocab-size", "128"], "model.vocab_size is 128"),
    ],
)
def test_train_refuses_settings_before_a_rank_starts(capsys, tmp_path, run_yaml, flags, part):
    run = ["--run-dir", str(tmp_path / "run"), "--nproc-per-node", "2"]
    assert part in refused(capsys, "train", str(run_yaml), *run, *flags)
    assert not (tmp_path / "run").exists() and not (tmp_path / "prepared").exists()


def test_prepare_one_source(capsys, tmp_path, tokenizer_dir):
    rows = [sharegpt("hello", "good day"), "no json", sharegpt("two plus two", "four")]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    prefix = tmp_path / "out" / "chat"
    argv = ["prepare", "--input", str(path), "--output", str(prefix), "--tokenizer", str(tokenizer_dir)]
    assert main([*argv, "--template", "vicuna"]) == 0
    out = capsys.readouterr().out
    assert "chat" in out and f"broken: {path}:2: " in out
    assert Path(f"{prefix}.bin").is_file() and Path(f"{prefix}.idx").is_file()


def test_prepare_the_sources_of_a_run(capsys, tmp_path, run_yaml):
    assert main(["prepare", str(run_yaml)]) == 0
    out = capsys.readouterr().out
    for name in ("chat", "math", "code"):
        assert name in out and f"{name} (probe)" in out
        assert (tmp_path / "prepared" / f"{name}.probe.idx").is_file()


def test_prepare_takes_tokenizer_and_template_beside_a_run(capsys, tmp_path, tokenizer_dir, run_yaml):
    content = yaml.safe_load(run_yaml.read_text())
    del content["data"]["tokenizer"], content["data"]["template"]
    path = write(tmp_path, content)
    assert main(["prepare", str(path), "--tokenizer", str(tokenizer_dir), "--template", "vicuna"]) == 0
    assert "chat (probe)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["RUN.yaml", "--input", "a"], "give either RUN.yaml or --input and --output, not both"),
        (["RUN.yaml", "--output", "a"], "give either RUN.yaml or --input and --output, not both"),
        ([], "--input is missing; give RUN.yaml, or --input, --output and --tokenizer"),
        (["--input", "a", "--output", "b"], "--tokenizer is missing"),
        (["--input", "a", "--output", "b", "--tokenizer", "c", "--bf16"], "unknown arguments: --bf16"),
    ],
)
def test_prepare_refuses_half_a_form_and_both(capsys, argv, part):
    assert part in refused(capsys, "prepare", *argv)


def test_prepare_names_an_input_that_is_not_there(capsys, tmp_path, tokenizer_dir):
    out = ["--output", str(tmp_path / "out"), "--tokenizer", str(tokenizer_dir)]
    assert "gone.jsonl" in refused(capsys, "prepare", "--input", str(tmp_path / "gone.jsonl"), *out)


@pytest.mark.parametrize(
    ("flags", "delta", "weights"),
    [
        (
            [],
            [0.084239559, 0.0961045814, 0.0589625462, 0.0615180174],
            [0.2693003759, 0.3016510626, 0.211943085, 0.2171054765],
        ),
        (["--aggregate", "max"], None, [0.2780621807, 0.2780621807, 0.2036734972, 0.2402021415]),
        (
            ["--metric", "cos"],
            [0.0361905666, 0.0456106462, 0.0213243181, 0.0239618726],
            [0.259539766, 0.2839424415, 0.225413682, 0.2311041105],
        ),
    ],
)
def test_I8_update_prints_the_numbers_of_the_official_implementation(capsys, tmp_path, flags, delta, weights):
    assert main(["update", "--load", json_file(tmp_path, "load.json", GOLDEN_LOADS), *flags]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert list(answer["weights"]) == list(GOLDEN_LOADS)
    np.testing.assert_allclose(list(answer["weights"].values()), weights, rtol=0, atol=1e-9)
    if delta is not None:
        np.testing.assert_allclose(list(answer["delta"].values()), delta, rtol=0, atol=1e-9)
    assert answer["note"] is None


def test_update_starts_from_given_weights_by_name(capsys, tmp_path):
    load = json_file(tmp_path, "load.json", GOLDEN_LOADS)
    weights = json_file(tmp_path, "weights.json", {"D": 4, "C": 3, "B": 2, "A": 1})
    assert main(["update", "--load", load, "--weights", weights, "--strategy", "fixed"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["weights"] == pytest.approx({"A": 0.1, "B": 0.2, "C": 0.3, "D": 0.4})


@pytest.mark.parametrize(
    ("loads", "flags", "part"),
    [
        ('{"A": [1, 2', [], "cannot be read: not JSON"),
        ([1, 2], [], "it must hold an object"),
        ({}, [], "it must hold an object"),
        ({"A": [1, 2], "B": [2, 1]}, [], "needs at least 3 sources, got 2"),
        ({"A": [1, 2], "B": [2, 1], "C": [1]}, [], "the same number of experts"),
        ({"A": [1, 2], "B": [[2, 1], [2, 1]], "C": [1, 2]}, [], "the same number of experts, and of layers"),
        ({name: [[1, 2], [1, 2, 3]] for name in "ABC"}, [], "the same number of experts"),
        ({"A": 1, "B": 2, "C": 3}, [], "load.json: source 'A' has 1; give each expert a number"),
        (
            {"A": [1, 2], "B": ["x", 1], "C": [1, 1]},
            [],
            "what is no finite number for expert 0: 'x'",
        ),
        (
            {"A": [1, 2], "B": [1, "20"], "C": [1, 1]},
            [],
            "'B' has what is no finite number for expert 1",
        ),
        ({"A": [1, 2], "B": [2, True], "C": [1, 1]}, [], "for expert 1: True"),
        ({"A": [1, 2], "B": [2, None], "C": [1, 1]}, [], "for expert 1: None"),
        ({"A": [1, 2], "B": [2, 10**399], "C": [1, 1]}, [], "for expert 1: 1000"),
        ({"A": [1, 2], "B": [2, -(10**399)], "C": [1, 1]}, [], "for expert 1: -1000"),
        (f'{{"A": [1, 2], "B": [2, 1{"0" * 5000}], "C": [1, 1]}}', [], "cannot be read: "),
        ('{"A": [1, 2], "B": [2, 1e400], "C": [1, 1]}', [], "for expert 1: inf"),
        (
            {"A": [1, 2], "B": [1e308, 1e308], "C": [1, 1]},
            [],
            "'B' has loads that are too large to be added",
        ),
        (
            {name: [[1, 2], [1, True]] for name in "ABC"},
            [],
            "source 'A', layer 1, has what is no finite",
        ),
        (
            {name: [[[1, 2]]] for name in "ABC"},
            [],
            "source 'A', layer 0, has what is no finite",
        ),
        ({name: [] for name in "ABC"}, [], "source 'A' has []; give each expert a number"),
        ({name: [[1, 2], []] for name in "ABC"}, [], "source 'A', layer 1, has no loads"),
        ({name: {"0": 1} for name in "ABC"}, [], "source 'A' has {'0': 1}; give each expert"),
        ({"A": [1, 2], "B": [-2, 1], "C": [1, 1]}, [], "source 'B' has a negative"),
        ('{"A": [1, 2], "B": [NaN, 1], "C": [1, 1]}', [], "NaN is no JSON value"),
        (GOLDEN_LOADS, ["--eta", "-1"], "eta"),
        (GOLDEN_LOADS, ["--smoothing", "2"], "smoothing"),
    ],
)
def test_update_refuses(capsys, tmp_path, loads, flags, part):
    line = refused(capsys, "update", "--load", json_file(tmp_path, "load.json", loads), *flags)
    assert part in line


@pytest.mark.parametrize(
    ("weights", "part"),
    [
        ({"A": -1, "B": 1, "C": 1, "D": 1}, "negative"),
        ({"A": 1, "B": 1, "C": 1}, "missing ['D']"),
        ({"A": 0, "B": 0, "C": 0, "D": 0}, "at least one must be > 0"),
        ({"A": "1", "B": 1, "C": 1, "D": 1}, "the weight of A is '1'; give a finite number"),
        ({"A": 1, "B": True, "C": 1, "D": 1}, "the weight of B is True"),
        ({"A": 1, "B": 1, "C": 10**399, "D": 1}, "the weight of C is 1000"),
        ({"A": 1, "B": 1, "C": 1, "D": [1]}, "the weight of D is [1]"),
        ('{"A": 1, "B": 1, "C": 1, "D": 1e400}', "infinite"),
        ("{", "cannot be read: not JSON"),
    ],
)
def test_update_refuses_weights_and_names_their_file(capsys, tmp_path, weights, part):
    load = json_file(tmp_path, "load.json", GOLDEN_LOADS)
    line = refused(
        capsys, "update", "--load", load, "--weights", json_file(tmp_path, "weights.json", weights)
    )
    assert part in line and "weights.json" in line and "load.json" not in line


def test_names_that_an_encoding_lacks_end_no_command(monkeypatch):
    program = "from megatron_dynmix.job.streams import secure_output as secure; secure(goes_on=True); "
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    done = fresh_python("-c", program + "print('数学')")
    assert done.returncode == 0 and done.stdout == "\\u6570\\u5b66\n"


@pytest.mark.parametrize("loss", ["1.5", True, None, 10**399, -1, [1.5]])
def test_update_refuses_losses_that_are_no_numbers(capsys, tmp_path, loss):
    given = json_file(tmp_path, "loss.json", {"A": 1.0, "B": loss, "C": 1.0})
    line = refused(capsys, "update", "--loss", given, "--strategy", "loss-softmax")
    assert "loss.json: the loss of source B is " in line and len(line) < 300


def test_update_names_a_file_that_is_not_there(capsys, tmp_path):
    assert "gone.json: there is no such file" in refused(
        capsys, "update", "--load", str(tmp_path / "gone.json")
    )


def test_srun_tasks_must_be_told_where_to_meet(capsys, tmp_path, monkeypatch):
    path = str(write(tmp_path, good_settings(tmp_path)))
    for name, value in {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    line = refused(capsys, "train", path, "--run-dir", str(tmp_path / "run"))
    assert "one of 2 tasks of srun, but MASTER_ADDR and MASTER_PORT are not set; export" in line
