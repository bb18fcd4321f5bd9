"""Imported once by the fork server of these tests: its ranks have Transformer Engine and everything else."""

from tests.te import stand_in

stand_in.install()

import tests.distributed.preload  # noqa: E402, F401
