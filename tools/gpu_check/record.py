"""Put on record what a GPU is compared with: `python -m tools.gpu_check.record` on a CPU writes cpu.json."""

import json
import sys
import tempfile
from pathlib import Path

from tools.gpu_check import small
from tools.gpu_check.supervise import Job


def main() -> int:
    """Run the command line; return the exit code."""
    if small.HERE.device.type != "cpu":
        print("error: this machine has a GPU; hide it (CUDA_VISIBLE_DEVICES=)", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        job = Job(data=Path(name) / "data", scratch=Path(name), carried=Path(name), tiny=True)
        record = {precision: small.eight_iterations(job, precision) for precision in small.TOLERANCE}
        record["counts_HDLE"] = small.first_counts(job)[0].tolist()
    small.RECORD.write_text(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
