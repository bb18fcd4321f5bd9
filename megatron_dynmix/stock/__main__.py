"""`python -m megatron_dynmix.stock pretrain_gpt.py FLAGS`: a script that may not be edited, with mixing."""

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the script as it would run itself, but for the `pretrain` that it imports."""
    if len(sys.argv) < 2 or not sys.argv[1].endswith(".py"):
        print(
            f"usage: torchrun ... -m megatron_dynmix.stock SCRIPT.py FLAGS, not {sys.argv[1:]}",
            file=sys.stderr,
        )
        sys.exit(2)
    script = Path(sys.argv[1])
    if not script.is_file():
        print(f"{script}: there is no such script; give the path of a pretrain_gpt.py", file=sys.stderr)
        sys.exit(2)
    from megatron_dynmix.platform.megatron_lm import wrap_pretrain
    from megatron_dynmix.stock.entry import mixed

    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(script.parent.absolute()))  # where the script looks for its neighbors
    wrap_pretrain(mixed)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
