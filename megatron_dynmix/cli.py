"""The console script: one small function per subcommand.

Exit codes: 0 done, 1 failed, 2 wrong usage or bad input, 75 saved and stopped on request, 130 interrupted.
Heavy imports wait inside the functions, so that `--help` and `update` answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dynmix import __version__
from megatron_dynmix.commands.compare import compare_arguments, evaluate_arguments, run_compare, run_evaluate
from megatron_dynmix.commands.convert import convert_arguments, run_convert
from megatron_dynmix.commands.doctor import doctor_arguments, run_doctor
from megatron_dynmix.commands.launch import join_srun, launch_arguments, run_launch
from megatron_dynmix.commands.prepare import prepare_arguments, run_prepare
from megatron_dynmix.commands.report import report_arguments, run_report
from megatron_dynmix.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_REFUSED,
    EXIT_STOPPED,
    CommandFailed,
    InputError,
    StoppedOnRequest,
    TrainingStopped,
)

if TYPE_CHECKING:
    from megatron_dynmix.training.resume import Resume


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    if "" not in sys.path:
        sys.path.append("")  # strategies of your own may lie in the current folder, as for `python -m`
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not arguments.takes_flags:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    try:
        return int(arguments.command(arguments, rest))
    except InputError as error:
        return _end(EXIT_REFUSED, str(error))
    except CommandFailed as error:
        return _end(EXIT_FAILED, str(error))
    except TrainingStopped as error:
        return _end(EXIT_FAILED, f"stopped: {error}" if str(error) else "")
    except StoppedOnRequest as error:
        return _end(EXIT_STOPPED, _once(str(error)))
    except KeyboardInterrupt:
        message = "interrupted"
        if arguments.command is train:
            message += ", not saved; --resume auto goes on from the last checkpoint, or begins anew"
        if sys.stderr.isatty() and "RANK" not in os.environ:
            print(file=sys.stderr)  # the terminal shows ^C in the line that is being written
        return _end(EXIT_INTERRUPTED, _once(message))


def _end(code: int, message: str) -> int:
    """Say it, and from which rank; of several ranks that end together, one has something to say."""
    rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
    if message:
        print(f"megatron-dynmix{rank}: {message}", file=sys.stderr)
    return code


def _once(message: str) -> str:
    """What all ranks would say alike, on one of them."""
    return message if os.environ.get("RANK", "0") == "0" else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-dynmix", description="Dynamic data mixing for MoE fine-tuning."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Any, summary: str, *, takes_flags: bool = False) -> Any:
        sub = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.set_defaults(command=function, takes_flags=takes_flags)
        return sub

    sub = command("quickstart", quickstart, "train a tiny MoE on four generated sources, on two ranks")
    sub.add_argument("--run-dir", type=Path, default=Path("runs/quickstart"))

    sub = command("prepare", prepare, "turn sources into tokens on disk", takes_flags=True)
    prepare_arguments(sub)

    sub = command("train", train, "train; a setting of RUN.yaml is a flag of Megatron-LM", takes_flags=True)
    _add_train(sub)

    sub = command(
        "plan", plan, "check a layout and reckon memory, tokens and updates, without a GPU", takes_flags=True
    )
    _add_plan(sub)

    sub = command("doctor", doctor, "check this machine, with the remedy for what is wrong", takes_flags=True)
    doctor_arguments(sub)

    sub = command("verify", verify, "prove from a run's directory that it drew what its weights call for")
    sub.add_argument("run_dir", type=Path, metavar="RUN")

    sub = command("launch", launch, "check a run and write its job script", takes_flags=True)
    launch_arguments(sub)

    sub = command("report", report, "explain a run, or several side by side, on one HTML page")
    report_arguments(sub)

    sub = command("compare", compare, "run strategies x seeds, and set them side by side", takes_flags=True)
    compare_arguments(sub)

    sub = command("evaluate", evaluate, "held-out loss of each source of a run")
    evaluate_arguments(sub)

    sub = command("convert", run_convert, "weights of Hugging Face folders in and out, with a verdict")
    convert_arguments(sub)

    sub = command("inspect", inspect, "show an example, a packed row or a batch as text", takes_flags=True)
    _add_inspect(sub)

    sub = command("update", update, "one weight update on given loads or losses, no model", takes_flags=True)
    _add_update(sub)
    return parser


def _add_train(sub: Any) -> None:
    sub.add_argument("run_yaml", type=Path, metavar="RUN.yaml")
    sub.add_argument("--run-dir", type=Path, required=True, help="where everything is written")
    sub.add_argument("--nproc-per-node", type=int, help="start this many ranks here")
    sub.add_argument("--resume", choices=["no", "must", "auto"], default="no")
    sub.add_argument(
        "--allow-source-change", action="store_true", help="resume although the data are not what they were"
    )


def _add_update(sub: Any) -> None:
    sub.add_argument("--load", type=Path, metavar="FILE", help='JSON: {"source": [load per expert], ...}')
    sub.add_argument("--loss", type=Path, metavar="FILE", help='JSON: {"source": loss in nats, ...}')
    sub.add_argument(
        "--weights", type=Path, metavar="FILE", help='JSON: {"source": weight, ...}; default uniform'
    )


def launch(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Write the job script of a run for a scheduler."""
    from megatron_dynmix import platform

    platform.start()
    return run_launch(arguments, rest)


def report(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Write the page."""
    return run_report(arguments)


def compare(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Run a grid of variants and seeds; exit 1 if a run failed."""
    from megatron_dynmix import platform

    platform.start()
    return run_compare(arguments, rest)


def evaluate(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Evaluate a run's newest checkpoint on the held-out rows of its sources."""
    from megatron_dynmix import platform

    platform.start()
    return run_evaluate(arguments)


def quickstart(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Generate, prepare, train, and say what to open."""
    from megatron_dynmix import platform

    platform.start()
    from megatron_dynmix.commands.quickstart import make_quickstart
    from megatron_dynmix.training.resume import check_run_dir

    run_dir = arguments.run_dir
    check_run_dir(run_dir, "no")
    run_yaml = make_quickstart(run_dir / "data")
    code = _start_ranks(run_yaml, run_dir, 2, "no", [])
    if code == 0:
        print(
            f"\nDone. What to open:\n"
            f"  {_command('megatron-dynmix')} report {run_dir}    explains the run: {run_dir}/report.html\n"
            f"  {run_dir}/mixing.jsonl    every weight update: loads, distances, old and new weights\n"
            f"  {run_dir}/metrics.jsonl   loss of each source over time\n"
            f"  {_command('tensorboard')} --logdir {run_dir}/tensorboard\n"
            f"  {run_yaml}    the run: change it and train again:\n"
            f"  {_command('megatron-dynmix')} train {run_yaml} --run-dir runs/mine --nproc-per-node 2"
        )
    return code


def _command(name: str) -> str:
    """How to call a program that was installed beside this one, from here."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        return name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def prepare(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Prepare the sources of a RUN.yaml, or one source from files."""
    from megatron_dynmix import platform

    platform.start()
    return run_prepare(arguments, rest)


def train(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Train on this rank, or start the ranks of this machine."""
    from megatron_dynmix.job.launch import end_with_launcher
    from megatron_dynmix.job.signals import stopping_at_once

    end_with_launcher()
    with stopping_at_once():
        return _train(arguments, rest)


def _train(arguments: argparse.Namespace, rest: list[str]) -> int:
    nproc = arguments.nproc_per_node
    if nproc is None:
        join_srun()
    joined = "RANK" in os.environ
    if nproc is not None and joined:
        raise InputError(
            f"--nproc-per-node {nproc} is given, but this is a rank of a started job; leave it out"
        )
    if nproc is not None and nproc < 1:
        raise InputError(f"--nproc-per-node is {nproc}; it must be 1 or more")
    if not joined:
        return _start_ranks(
            arguments.run_yaml,
            arguments.run_dir,
            nproc or 1,
            arguments.resume,
            rest,
            allow_source_change=arguments.allow_source_change,
        )
    return _train_here(
        arguments.run_yaml,
        arguments.run_dir,
        arguments.resume,
        rest,
        allow_source_change=arguments.allow_source_change,
    )


def _train_here(
    run_yaml: Path, run_dir: Path, resume: Resume, flags: list[str], *, allow_source_change: bool
) -> int:
    from megatron_dynmix import platform

    platform.start()
    from megatron_dynmix.config.load import load_config
    from megatron_dynmix.training import run

    config = load_config(run_yaml, flags)
    run.train(config, run_dir, resume=resume, allow_source_change=allow_source_change)
    return 0


def _start_ranks(
    run_yaml: Path,
    run_dir: Path,
    nproc: int,
    resume: Resume,
    flags: list[str],
    *,
    allow_source_change: bool = False,
) -> int:
    """Check everything here, where it can be refused in one message, then start the ranks.

    One rank trains in this process.
    """
    from megatron_dynmix import platform

    platform.start()
    from megatron_dynmix.config.load import load_config
    from megatron_dynmix.convert.export_hf import check_save_hf
    from megatron_dynmix.job.launch import launch_ranks
    from megatron_dynmix.training import run
    from megatron_dynmix.training.resume import begins, check_resume, check_run_dir

    config = load_config(run_yaml, flags)
    tokenizer = run.check_before_start(config, nproc, fresh=begins(run_dir, resume))
    check_run_dir(run_dir, resume)
    check_save_hf(config, run_dir)
    data = run.read_data(config, tokenizer)
    check_resume(config, data.reports, run_dir, resume, allow_source_change=allow_source_change)
    if nproc == 1:
        return _train_here(run_yaml, run_dir, resume, flags, allow_source_change=allow_source_change)
    command = [
        *(sys.executable, "-m", "megatron_dynmix", "train", str(run_yaml), "--run-dir", str(run_dir)),
        *("--resume", resume, *(["--allow-source-change"] if allow_source_change else []), *flags),
    ]
    return launch_ranks(command, nproc)


def _add_plan(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run_yaml", type=Path, metavar="RUN.yaml")
    sub.add_argument(
        "--world-size", type=int, required=True, metavar="N", help="ranks: the GPUs of all nodes"
    )
    sub.add_argument("--gpu-memory-gb", type=float, metavar="GB", help="of each GPU; default 80")
    sub.add_argument(
        "--host",
        choices=["te", "cuda", "cpu"],
        help="what the ranks have: CUDA with Transformer Engine (default with bf16), CUDA without, or a CPU "
        "(default in float32)",
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def plan(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Print what a run would be on so many ranks."""
    from megatron_dynmix import platform

    platform.start()
    from megatron_dynmix.commands.plan import run_plan

    return run_plan(arguments, rest)


def doctor(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Check this machine; exit 1 if anything is a problem."""
    join_srun()
    return run_doctor(arguments, rest)


def verify(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Replay a run from its directory; exit 1 if what was drawn is not what its weights call for."""
    from megatron_dynmix import platform

    platform.start()
    from megatron_dynmix.verify.verdict import verdict_text
    from megatron_dynmix.verify.verify import verify as verify_run

    verdict = verify_run(arguments.run_dir)
    print(verdict_text(verdict))
    return 0 if verdict.proven else EXIT_FAILED


def _add_inspect(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("target", type=Path, metavar="PREFIX|RUN.yaml|RUN_DIR")
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--example", metavar="N", help="of a prepared PREFIX; SOURCE:N of a run")
    what.add_argument("--row", metavar="SOURCE:N", help="packed row N of a source")
    what.add_argument("--batch", type=int, metavar="ITERATION", help="the global batch of an iteration")
    sub.add_argument("--tokenizer", type=Path, metavar="DIR")
    sub.add_argument("--plain", action="store_true", help="marks instead of colours")


def inspect(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Print an example, a row or a batch: in colours on a terminal, with marks elsewhere."""
    from megatron_dynmix import platform

    platform.start()
    from megatron_dynmix.commands.inspect import inspect as inspect_target
    from megatron_dynmix.data.row_text import show

    given = {name: getattr(arguments, name) for name in ("tokenizer", "example", "row", "batch")}
    show(inspect_target(arguments.target, rest, **given), in_colour=not arguments.plain)
    return 0


def update(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Print the weights and deltas of one update as JSON."""
    from megatron_dynmix.commands.update import update_once

    answer = update_once(rest, load=arguments.load, loss=arguments.loss, weights=arguments.weights)
    print(json.dumps(answer, indent=2))
    return 0
