"""Imported once by the fork server: stock's loop, where there is one, so that ranks start with it."""

import tests.distributed.preload  # noqa: F401
from tests.stock import engine

if engine.find_stock():
    engine.import_stock()
