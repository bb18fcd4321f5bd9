"""What ranks with Transformer Engine run."""

import functools

import numpy as np

from megatron_dynmix import platform
from megatron_dynmix.errors import InputError
from megatron_dynmix.model import gpt
from megatron_dynmix.training import run as training_run
from tests.distributed import layouts
from tests.distributed import programs as plain
from tests.te import stand_in


def in_float32(program):
    """A program in a rank that attends in float32."""

    @functools.wraps(program)
    def run(*args, **kwargs):
        assert platform.start() is stand_in.HERE
        stand_in.allow_float32()
        return program(*args, **kwargs)

    return run


@in_float32
def one_step(run_yaml, flags, run_dir):
    """A step, and the names of the classes that the model is made of."""
    classes = set()
    build = training_run.build_model

    def looked_at(*args):
        chunks = build(*args)
        classes.update(type(module).__name__ for chunk in chunks for module in chunk.modules())
        return chunks

    training_run.build_model = looked_at
    return {**plain.count_one_step(run_yaml, flags, run_dir), "classes": classes}


def save_and_step(run_yaml, flags, layout, run_dir):
    """Flags that begin with the weights that are saved here, and a step from them."""
    plain.save_initial_weights(run_yaml, [*flags, *layout], run_dir)
    layouts.start_anew()
    start = [*flags, "--pretrained-checkpoint", str(run_dir / "checkpoints")]
    return start, plain.count_one_step(run_yaml, [*start, *layout], run_dir / "step")


@in_float32
def train(run_yaml, flags, run_dir, **options):
    return plain.train(run_yaml, flags, run_dir, **options)


def whole_and_resumed(run_yaml, flags, run_dir):
    """See `layouts.whole_and_resumed`, in the precision that the kernels have."""
    assert platform.start() is stand_in.HERE
    return layouts.whole_and_resumed(run_yaml, flags, run_dir, "train")


def refusal(run_yaml, flags, run_dir):
    """Why a step, with all that a checkpoint has of it, is refused, if it is."""
    try:
        step = plain.count_one_step(run_yaml, flags, run_dir)
    except InputError as error:
        return str(error)
    assert np.isfinite(step["grad_norm"]) and step["grad_norm"] > 0
    return None


def scales_around_a_probe(run_yaml, flags, run_dir):
    """Histories and scales of every layer after a probe of the new model, a step, and another probe."""
    trainer = plain.build(run_yaml, flags, run_dir)

    def seen():
        states = gpt._scaling_states(trainer.run.chunks)
        return [(state.amax_history.clone().numpy(), state.scale.clone().numpy()) for state in states]

    probe = trainer.mixed.reweighting.probe
    probe.measure({}, 0)
    fresh = seen()
    trainer.run(trainer.loader.step(0, plain.training_run_num_micro_batches()), forward_only=False)
    stepped = seen()
    probe.measure({}, 0)
    return fresh, stepped, seen()
