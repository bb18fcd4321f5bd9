"""A training loop that is nobody's, over `MixedRun`, with the trainer's model: the trainer is its oracle.

Axes: B rows of a micro-batch, D sources.
"""

import contextlib
import io
import json
import os
import runpy
import sys

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.router import TopKRouter

from megatron_dynmix import MixedRun
from megatron_dynmix.config.load import load_config
from megatron_dynmix.model.lr_schedule import set_learning_rate
from megatron_dynmix.records.jsonl import read_records
from megatron_dynmix.training.batch import to_batch
from megatron_dynmix.training.reweighting import MixingError
from megatron_dynmix.training.step import set_batch_size
from megatron_dynmix.training.trainer import seed_iteration
from tests.distributed import programs


class Loop:
    """Knows the run's model, optimizer and rows, and of mixing what `MixedRun` tells it."""

    def __init__(self, run_yaml, flags, run_dir):
        self.config = config = load_config(run_yaml, flags)
        self.trainer = programs.build(run_yaml, flags, run_dir.with_name(f"{run_dir.name}-{os.getpid()}"))
        self.chunks, rows = self.trainer.run.chunks, self.trainer.loader.sources
        self.mixed = MixedRun.of(
            dict(zip(config.data.sources, map(len, rows), strict=True)),
            config.mixing,
            train_iters=config.training.train_iters,
            batch_sizes=config.training.global_batch_size,
            micro_batch_size=config.training.micro_batch_size,
            seq_length=config.data.seq_length,
            seed=config.training.seed,
            weights={name: source.weight for name, source in config.data.sources.items()}
            if all(source.weight for source in config.data.sources.values())
            else None,
            run_dir=run_dir,
        )
        self.mixed.attach(self.chunks)
        self.rows, self.optimizes = rows, True
        self.batches = [self.mixed.batches(rows) for _ in self.chunks]

    def masks(self, draws):
        drawn = [self.rows[source][row] for source, row, _ in draws]
        padding_BS = torch.stack([torch.from_numpy(row["padding_mask"]) for row in drawn])
        return padding_BS, torch.stack([torch.from_numpy(row["loss_mask"]) for row in drawn]) > 0

    def forward_step(self, batches, model):
        batch = to_batch(next(batches), torch.device("cpu"), join_rows=False)
        self.mixed.announce(chunk=self.chunks.index(model), rows=self.masks)
        loss = model(
            batch.tokens,
            batch.position_ids,
            batch.attention_mask,
            labels=batch.labels,
            loss_mask=batch.loss_mask,
            padding_mask=batch.padding_mask,
        )
        return loss, lambda loss: self.trainer.run._loss(loss, batch)

    def forward_backward(self, batches=None):
        set_batch_size(self.config, self.mixed.batch_size)
        seed_iteration(self.config.training.seed, self.mixed.iteration)
        set_learning_rate(self.trainer.checkpointer.scheduler, self.mixed.consumed_samples)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.trainer.optimizer.zero_grad()
        several = len(self.chunks) > 1
        batches = batches or self.batches
        get_forward_backward_func()(
            forward_step_func=self.forward_step,
            data_iterator=batches if several else batches[0],
            model=self.chunks if several else self.chunks[0],
            num_microbatches=self.mixed.num_micro_batches,
            seq_length=self.config.data.seq_length,
            micro_batch_size=self.config.training.micro_batch_size,
            forward_only=False,
        )

    def step(self, **end):
        """One iteration."""
        mixed = self.mixed
        mixed.begin_step()
        self.forward_backward()
        grad_norm = self.trainer.optimizer.step()[1] if self.optimizes else 0.0
        return mixed.end_step(mixed.consumed_samples + mixed.batch_size, grad_norm=grad_norm, **end)


def train(run_yaml, flags, run_dir):
    """A whole run of the loop; what it wrote."""
    loop = Loop(run_yaml, flags, run_dir)
    with loop.mixed:
        for _ in range(loop.config.training.train_iters):
            loop.step()
    torch.distributed.barrier()
    return written(run_dir)


def written(run_dir):
    """The records, without what is measured in seconds."""
    records = programs.records_of(run_dir)
    return {
        "mixing": [{**update, "seconds": None, "block": None} for update in records["mixing"]],
        "losses": [
            (record["lm_loss"], record["source_loss"], record["tokens"]) for record in records["metrics"]
        ],
        "samples": [line for line in read_records(run_dir / "ledger.jsonl") if line["kind"] == "samples"],
    }


def trained(run_yaml, flags, run_dir):
    """The same by our own trainer."""
    programs.train(run_yaml, flags, run_dir)
    return written(run_dir)


def train_disturbed(run_yaml, flags, run_dir):
    """A run whose passes and steps are repeated, in every way that a loop may; what it wrote."""
    loop = Loop(run_yaml, flags, run_dir)
    mixed = loop.mixed
    with mixed:
        loop.step()
        mixed.begin_step()  # a pass that is left in the middle
        mixed.announce(rows=loop.masks)
        mixed.begin_step()  # and one that ends without a step
        kept = [next(loop.batches[0]) for _ in range(mixed.num_micro_batches)]
        loop.forward_backward([iter(kept)])
        before = mixed.state_dict()["progress"]
        mixed.begin_step()
        loop.forward_backward()
        assert mixed.end_step(mixed.consumed_samples) is None
        assert mixed.state_dict()["progress"] == before
        mixed.begin_step()
        kept = [next(loop.batches[0]) for _ in range(mixed.num_micro_batches)]
        for _ in range(2):  # the loop repeats a pass by itself
            loop.forward_backward([iter(kept)])
        _, grad_norm, _ = loop.trainer.optimizer.step()
        mixed.end_step(grad_norm=grad_norm)
        loop.step()
        loop.step()
    return written(run_dir)


def skip(run_yaml, flags, run_dir):
    """Per interval of two iterations, one of them not applied: counts of the other, and what was recorded."""
    loop, answers = Loop(run_yaml, flags, run_dir), []
    mixed, loop.optimizes = loop.mixed, False
    with mixed:
        loop.step()
        answers.append(mixed.state_dict()["mix"]["interval_counts"])
        mixed.begin_step()  # drawn and not trained on, as by --iterations-to-skip
        mixed.end_step(applied=False)
        loop.step(applied=False)
        mixed.begin_step()
        loop.forward_backward()
        mixed.observe(torch.full((2, 128), torch.nan))
        mixed.end_step()
    updates, metrics = programs.updates_of(run_dir), read_records(run_dir / "metrics.jsonl")
    found = [update.counts["half_counts"].tolist() for update in updates]
    tokens = [update.tokens for update in updates]
    return *answers, found, tokens, [(r["skipped_iterations"], r["consumed_samples"]) for r in metrics]


def stop(run_yaml, flags, run_dir, iterations, state=None):
    """Iterations of a model that stays as it is, from a state; the state after them, and the updates."""
    loop = Loop(run_yaml, flags, run_dir)
    loop.optimizes = False
    if state is not None:
        loop.mixed.load_state_dict(json.loads(json.dumps(state)))
    with loop.mixed:
        for _ in range(iterations):
            loop.step()
        state = loop.mixed.state_dict()
    torch.distributed.barrier()
    return state, written(run_dir)


def misuse(run_yaml, flags, run_dir):
    """What each wrong call is told."""
    loop = Loop(run_yaml, flags, run_dir)
    mixed, told = loop.mixed, {}

    def wrong(name, call):
        try:
            call()
        except ValueError as error:
            told[name] = str(error)

    wrong("attached twice", lambda: mixed.attach(loop.chunks))
    wrong("ended, not begun", mixed.end_step)
    wrong("announced, not begun", mixed.announce)
    wrong("read, not begun", lambda: next(mixed.batches(loop.rows)))
    wrong("other rows", lambda: mixed.batches(loop.rows[:2]))
    state = mixed.state_dict()
    names = list(state["fingerprints"])
    for name, other in {
        "no state": {"a": 1},
        "other sources": {**state, "fingerprints": {key: ["8 rows"] for key in reversed(names)}},
        "other seed": {**state, "mix": {**state["mix"], "blend": {**state["mix"]["blend"], "seed": 99}}},
        "other model": {**state, "mix": {**state["mix"], "interval_counts": [[[[1]]]]}},
    }.items():
        wrong(name, lambda other=other: mixed.load_state_dict(other))
    mixed.begin_step()
    wrong("no micro-batch", mixed.end_step)
    mixed.announce(rows=loop.masks)
    wrong("one micro-batch", mixed.end_step)
    wrong("other batch", lambda: mixed.end_step(mixed.consumed_samples + 1))
    short = torch.ones(1, 2)
    wrong("masks of other rows", lambda: mixed.announce(rows=lambda draws: (short, short)))
    wrong("losses of other rows", lambda: mixed.observe(torch.ones(3)))
    for _ in range(mixed.num_micro_batches):
        next(loop.batches[0])
    wrong("too many read", lambda: next(loop.batches[0]))
    wrong("loaded late", lambda: mixed.load_state_dict(state))
    sizes = dict(zip(names, map(len, loop.rows), strict=True))
    given = {"train_iters": 4, "batch_sizes": 8, "micro_batch_size": 2, "seq_length": 128, "seed": 1}
    for name, (mixing, changes) in {
        "probe": ({"signal": "probe"}, {}),
        "attention": ({"load_routers": "attention"}, {}),
        "strategy": ({"strategy": "nonsense"}, {}),
        "option": ({"etta": 1.0}, {}),
        "no reference": ({"strategy": "ref-loss"}, {}),
        "batch": ({}, {"batch_sizes": 7}),
        "no batch": ({}, {"batch_sizes": 0}),
        "iterations": ({}, {"train_iters": 0}),
        "weights": ({}, {"weights": {"nobody": 1.0}}),
        "uniform": ({"strategy": "uniform"}, {"weights": {name: 1 + len(name) for name in names}}),
        "caps": ({}, {"max_epochs": dict.fromkeys(names, 0.001)}),
        "cap of nobody": ({}, {"max_epochs": {"nobody": 1}}),
        "examples": ({"unit": "examples"}, {}),
    }.items():
        wrong(name, lambda mixing=mixing, changes=changes: MixedRun.of(sizes, mixing, **{**given, **changes}))
    wrong("no sources", lambda: MixedRun.of({}, **given))
    wrong("two sources", lambda: MixedRun.of({"a": 5, "b": 5}, {"strategy": "gate-load"}, **given))
    wrong("an empty source", lambda: MixedRun.of({**sizes, "c": 0}, **given))
    bare = MixedRun.of(sizes, **given)
    wrong("begun, not attached", bare.begin_step)
    wrong("asked, not attached", bare.state_dict)
    again = MixedRun.of(sizes, run_dir=run_dir, **given)
    again.attach(loop.chunks)
    wrong("records of another run", again.begin_step)
    return told


def train_unseen(run_yaml, flags, run_dir):
    """A run whose first router is called by other means than as a module; what that is told."""
    loop = Loop(run_yaml, flags, run_dir)
    routers = [module for module in loop.chunks[0].modules() if isinstance(module, TopKRouter)]
    routers[0]._forward_hooks.clear()
    try:
        for _ in range(loop.config.training.train_iters):
            loop.step()
    except MixingError as error:
        return str(error), loop.mixed.iteration


def run_page(text, run_dir):
    """Run the page's loop as a script; what it printed, and the samples on record."""
    script, said = run_dir / "loop.py", io.StringIO()
    script.write_text(text)
    sys.argv = [str(script), str(run_dir / "run")]
    with contextlib.redirect_stdout(said):
        runpy.run_path(str(script), run_name="__main__")
    torch.distributed.barrier()
    return said.getvalue(), written(run_dir / "run")
