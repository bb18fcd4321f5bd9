"""What ranks with Transformer Engine run."""

from megatron_dynmix import platform
from tests.distributed import programs
from tests.te import stand_in


def in_float32(program, *args, **kwargs):
    """A program in a rank that attends in float32."""
    assert platform.start() is stand_in.HERE
    stand_in.allow_float32()
    return program(*args, **kwargs)


def one_step(run_yaml, flags, run_dir):
    return in_float32(programs.count_one_step, run_yaml, flags, run_dir)
