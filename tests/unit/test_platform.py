import os
import subprocess
import sys

import pytest

LOOK = """
from torch.utils import cpp_extension  # torch's CUDA build looks at import, its CPU build when asked
cpp_extension._find_cuda_home()
cpp_extension.logger.warning("another warning")
"""
LINE = "No CUDA runtime is found, using CUDA_HOME="


@pytest.mark.parametrize(
    ("first", "heard"), [("", True), ("from megatron_dynmix import platform; platform.start()", False)]
)
def test_a_compiler_without_a_device_is_not_warned_of(first, heard, tmp_path):
    environment = {**os.environ, "CUDA_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", first + LOOK],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (LINE in done.stderr) is heard, done.stderr
    assert "another warning" in done.stderr
