"""A recipe of Megatron-Bridge 0.6 that mixes: torchrun --nproc-per-node 8 pretrain.py PREFIX PREFIX PREFIX.

Each PREFIX is a pre-training `.bin/.idx` of one source; the recipe is Megatron-Bridge's own.
"""

import sys
from dataclasses import replace
from pathlib import Path

from megatron.bridge.recipes.qwen import qwen3_30b_a3b_pretrain_config
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset

from megatron_dynmix.bridge import mix


def main(prefixes: list[str]) -> None:
    """Train on the sources, one epoch of each at hand, and change their shares every 100 iterations."""
    config = qwen3_30b_a3b_pretrain_config()
    config.validation.eval_iters = 0
    blend = config.dataset

    def sources(context):
        found = {}
        for prefix in prefixes:
            alone = replace(blend, blend=([prefix], None), tokenizer=context.tokenizer)
            alone.finalize()
            builder = BlendedMegatronDatasetBuilder(GPTDataset, [None] * 3, lambda: True, alone)
            found[Path(prefix).name] = builder.build()[0]
        return found

    mixing = {"strategy": "gate-load", "interval": 100, "eta": 10.0}
    step, callback = mix(config, forward_step, mixing, sources=sources, run_dir="runs/bridge")
    pretrain(config, step, callbacks=[callback])


if __name__ == "__main__":
    main(sys.argv[1:])
