"""Imported once by the fork server, so that ranks start with Megatron-Bridge."""

import tests.distributed.preload  # noqa: F401
from tests.bridge import stand_ins

stand_ins.import_bridge()
