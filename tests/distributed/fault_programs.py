"""What the ranks of a test run when something is to go wrong on the way."""

import json
import os
import random
import signal
import threading
import time

from megatron_dynmix.checkpoint.checkpointer import Checkpointer
from megatron_dynmix.errors import StoppedOnRequest, TrainingStopped
from megatron_dynmix.lease import LOCK
from megatron_dynmix.training.reweighting import Reweighting
from megatron_dynmix.training.step import PassRunner
from megatron_dynmix.training.trainer import Trainer
from tests.distributed import programs

PLACES = {
    "iteration": (PassRunner, "_pass"),
    "update": (Reweighting, "update"),
    "save": (Checkpointer, "save"),
}


def before(place, iteration, rank, act):
    """On `rank`, call `act()` once, as iteration `iteration` reaches the place."""
    reached = {"iteration": 0}
    step = Trainer.train_step

    def counting_step(trainer, stop):
        reached["iteration"] = trainer.progress.iteration + 1
        return step(trainer, stop)

    Trainer.train_step = counting_step
    owner, name = PLACES[place]
    original, acted = getattr(owner, name), []

    def acting(*args, **kwargs):
        here = reached["iteration"] == iteration and os.environ["RANK"] == str(rank)
        if here and not acted:
            acted.append(True)
            act()
        return original(*args, **kwargs)

    setattr(owner, name, acting)


def train(run_yaml, flags, run_dir, resume="no"):
    """A run and how it ended: `done`, `stopped` or `requested`, with its results or message."""
    try:
        return "done", programs.train(run_yaml, flags, run_dir, resume=resume)
    except TrainingStopped as stopped:
        return "stopped", str(stopped)
    except StoppedOnRequest as stopped:
        return "requested", str(stopped)


def train_signalled(run_yaml, flags, run_dir, place, iteration, rank, *signals):
    """A run in which one rank is sent signals; `start`: before it has joined the others."""

    def act():
        for number in signals:
            os.kill(os.getpid(), number)

    if place != "start":
        before(place, iteration, rank, act)
    elif os.environ["RANK"] == str(rank):
        from megatron_dynmix.training import run

        join = run.join_job

        def signalled_join(*args):
            act()
            return join(*args)

        run.join_job = signalled_join
    return train(run_yaml, flags, run_dir)


def train_with_group_signalled(run_yaml, flags, run_dir, iteration):
    """A run whose every process, those that write the shards too, gets SIGTERM again and again in a save."""

    saved = threading.Event()
    stop = Trainer._stop_on_request

    def send():
        while not saved.is_set():
            os.killpg(os.getpgrp(), signal.SIGTERM)
            time.sleep(0.01)

    sender = threading.Thread(target=send, daemon=True)

    def stop_after_the_last_signal(trainer):
        saved.set()  # the handlers go when the run ends
        if sender.is_alive():
            sender.join()
        stop(trainer)

    Trainer._stop_on_request = stop_after_the_last_signal
    before("save", iteration, 0, sender.start)
    return train(run_yaml, flags, run_dir)


def train_and_lose_the_directory(run_yaml, flags, run_dir, iteration):
    """A run whose lock holds the token of another job from some iteration on; what it held then."""
    lock, there = run_dir / LOCK, {}

    def lose():
        content = json.loads(lock.read_text())
        lock.write_text(json.dumps({**content, "token": "of another job"}))
        there.update(files_of(run_dir))

    before("iteration", iteration, 0, lose)
    return *train(run_yaml, flags, run_dir, "auto"), there, files_of(run_dir)


def files_of(run_dir):
    """What a run has written: all but the curves, which have a file for each process, and drafts."""
    files = [path for path in run_dir.rglob("*") if path.is_file() and ".iter" not in str(path)]
    return {path: path.read_bytes() for path in files if path.parent.name != "tensorboard"}


def train_with_nan(run_yaml, flags, run_dir, iterations, rank, resume="no"):
    """A run in which one rank finds NaN among its gradients in some iterations."""
    original = PassRunner._pass
    step = Trainer.train_step
    now = {}

    def counting_step(trainer, stop):
        now["iteration"] = trainer.progress.iteration + 1
        return step(trainer, stop)

    def spoiled(runner, micro_batches, *, forward_only):
        stats = original(runner, micro_batches, forward_only=forward_only)
        if not forward_only and now["iteration"] in iterations and os.environ["RANK"] == str(rank):
            runner.chunks[0].buffers[0].grad_data[0] = float("nan")
        return stats

    Trainer.train_step, PassRunner._pass = counting_step, spoiled
    return train(run_yaml, flags, run_dir, resume)


def train_with_wild_clock(run_yaml, flags, run_dir):
    """A run whose clock jumps to and fro, and whose ranks sleep now and then."""
    generator, clock = random.Random(os.environ["RANK"]), time.time
    time.time = lambda: clock() + generator.uniform(-1e6, 1e6)
    original = PassRunner._pass

    def slow(*args, **kwargs):
        time.sleep(generator.choice([0, 0, 0.3]))
        return original(*args, **kwargs)

    PassRunner._pass = slow
    return train(run_yaml, flags, run_dir)


def never_join(rank, run_yaml, flags, run_dir):
    """A run that one rank never comes to."""
    if os.environ["RANK"] == str(rank):
        time.sleep(600)
    return train(run_yaml, flags, run_dir)


def miss_the_others(run_yaml, flags, run_dir):
    """A run whose second rank looks for the first where it is not."""
    if os.environ["RANK"] == "1":
        os.environ["MASTER_PORT"] = "1"
    return train(run_yaml, flags, run_dir)


def train_with_bug(run_yaml, flags, run_dir):
    """A run in which a rank makes an error of its own."""
    before("iteration", 2, 1, lambda: 1 / 0)
    return train(run_yaml, flags, run_dir)


def expert_bias_after(run_yaml, flags, run_dir, iterations):
    """The buffers of a trained model, some of whose batches were spoiled."""
    from megatron_dynmix.training import run

    build, built = run.build_trainer, []
    run.build_trainer = lambda *args, **kwargs: built.append(build(*args, **kwargs)) or built[0]
    train_with_nan(run_yaml, flags, run_dir, iterations, 0)
    buffers = built[0].run.chunks[0].named_buffers()
    return {name: buffer.numpy().copy() for name, buffer in buffers if "expert_bias" in name}
