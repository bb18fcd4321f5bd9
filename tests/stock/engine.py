"""Runs stock Megatron-LM on the CPU: each job in freshly forked ranks that have everything loaded."""

import json
import multiprocessing
import os
import re
import runpy
import sys
import time
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from unittest import mock

from tests.distributed.ranks import run_ranks

HERE = Path(__file__).parent
FLAGS = [
    *("--num-layers", "2", "--hidden-size", "32", "--ffn-hidden-size", "48", "--num-attention-heads", "4"),
    *("--seq-length", "64", "--max-position-embeddings", "64", "--swiglu", "--disable-bias-linear"),
    *("--num-experts", "8", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "48"),
    *("--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", "1e-2"),
    *("--moe-token-dispatcher-type", "allgather", "--transformer-impl", "local"),
    *("--normalization", "LayerNorm", "--position-embedding-type", "rope", "--no-rope-fusion"),
    *("--untie-embeddings-and-output-weights", "--no-persist-layer-norm"),
    *("--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion", "--no-bias-swiglu-fusion"),
    *("--micro-batch-size", "2", "--global-batch-size", "8", "--train-iters", "6", "--seed", "1234"),
    *("--lr", "3e-3", "--min-lr", "3e-4", "--lr-decay-style", "cosine", "--clip-grad", "1.0"),
    *("--hidden-dropout", "0", "--attention-dropout", "0", "--no-create-attention-mask-in-dataloader"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", "256", "--distributed-backend", "gloo"),
    *("--split", "90,10,0", "--num-workers", "0", "--log-interval", "1", "--eval-iters", "1"),
    *("--eval-interval", "4", "--save-interval", "1000", "--distributed-timeout-minutes", "2"),
]
"""A model of two layers and eight experts, and what stock needs to run on a CPU."""
FOLDER = "DYNMIX_MEGATRON_LM"


@dataclass
class Run:
    """What the ranks of a job printed."""

    texts: list[str]

    @property
    def printed(self):
        """Every number that stock prints of iterations and evaluations, without its times."""
        lines = "\n".join(self.texts).splitlines()
        told = [line for line in lines if re.search(r" iteration +\d+/|validation loss at", line)]
        return [re.sub(r"\[[^]]*\]|elapsed time per iteration \(ms\): [\d.]+", "", line) for line in told]

    @property
    def losses(self):
        """The losses of the iterations."""
        return [float(number) for number in re.findall(r"lm loss: (\S+)", "\n".join(self.texts))]


def records(run_dir, name="mixing"):
    """Return the lines of a record file."""
    return [json.loads(line) for line in (Path(run_dir) / f"{name}.jsonl").read_text().splitlines()]


def updates_of(run_dir):
    """What was counted and decided, without wall times."""
    return [{key: line[key] for key in line if key != "seconds"} for line in records(run_dir)]


def find_stock():
    """Put the folder of a checked-out Megatron-LM on the path, if there is one."""
    folder = os.environ.get(FOLDER)
    if folder and folder not in sys.path:
        sys.path.append(folder)
    return util.find_spec("megatron.training") is not None


def import_stock():
    """Import its loop; 0.16.1 needs triton for kernels that are never called, and CPU builds lack it."""
    if util.find_spec("triton") is None:
        absent = ("triton", "triton.language")
        sys.modules.update((name, mock.MagicMock()) for name in absent)
        from megatron.core.transformer.custom_layers import batch_invariant_kernels  # noqa: F401

        for name in absent:
            del sys.modules[name]
    import megatron.training.training  # noqa: F401


def run_stock(world_size, argv, log, *, env=None, mixed=True, **kwargs):
    """Run the script with these flags and return what each rank printed."""
    flags = list(FLAGS)
    if "--step-batch-size-schedule" in argv:  # it says the batch size, which must not be said twice
        at = flags.index("--global-batch-size")
        del flags[at : at + 2]
    if "--dynmix-packed-rows" in argv:  # their mask says where conversations begin
        flags.remove("--no-create-attention-mask-in-dataloader")
    return run_ranks(world_size, _rank, [*flags, *argv], log, env=env or {}, mixed=mixed, **kwargs)


def _take_turns(mine, other):
    """Have two jobs of one rank train an iteration each in turn; print what they have taken of the CPU.

    Where they go together a busy machine is as busy for one as for the other. `mine` and `other` are named
    pipes; one of them holds the byte that says whose turn it is. A job that has ended hands over for good.
    """
    import megatron.training.training as training

    report, iterations = training.training_log, 0
    take, give = (os.open(path, os.O_RDWR) for path in (mine, other))

    def training_log(*given, **named):
        nonlocal iterations
        told = report(*given, **named)
        print(f"cpu seconds: {time.process_time()}")
        if iterations:
            os.write(give, b".")
        iterations += 1
        if iterations < training.get_args().train_iters:
            os.read(take, 1)
        return told

    training.training_log = training_log


def _rank(argv, log, *, env, mixed, turns=None):
    path = f"{log}.{os.environ['RANK']}"
    out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(env, CUDA_DEVICE_MAX_CONNECTIONS="1", LOCAL_WORLD_SIZE=os.environ["WORLD_SIZE"])
    multiprocessing.set_start_method("fork", force=True)  # as in a process that no fork server made
    find_stock()
    from tests.stock import stand_ins

    stand_ins.install()
    if turns is not None:
        _take_turns(*turns)
    tagged = Path(os.environ.get(FOLDER, "/nowhere")) / "pretrain_gpt.py"
    script, launcher = (str(tagged), mixed) if tagged.exists() else (str(HERE / "pretrain_gpt.py"), False)
    if mixed and not launcher:
        os.environ["MIXED"] = "1"
    sys.path.insert(0, str(Path(script).parent))
    argv = [*argv, "--legacy-tokenizer"] if tagged.exists() else argv
    sys.argv = ["stock", script, *argv] if launcher else [script, *argv]
    code = 0
    try:
        if launcher:
            from megatron_dynmix.stock.__main__ import main

            main()
        else:
            runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    sys.stdout.flush()
    sys.stderr.flush()
    return code, Path(path).read_text()
