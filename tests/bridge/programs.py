"""What ranks run: the recipe of the examples, in Megatron-Bridge's own loop."""

import functools
import os
import sys
from types import ModuleType

from tests.bridge import stand_ins
from tests.distributed.bridge_programs import load_example
from tests.distributed.loop_programs import written
from tests.stock import stand_ins as stock

VOCABULARY = 256


def small(folder, **settings):
    """Return a recipe that a CPU can train, made of Megatron-Bridge's own parts."""
    from megatron.bridge.models.gpt_provider import GPTModelProvider, local_layer_spec
    from megatron.bridge.training import config as parts
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.transformer.enums import AttnBackend

    config = parts.ConfigContainer(
        model=GPTModelProvider(
            num_layers=2,
            hidden_size=32,
            ffn_hidden_size=48,
            num_attention_heads=4,
            num_moe_experts=8,
            moe_router_topk=2,
            moe_ffn_hidden_size=48,
            moe_token_dispatcher_type="alltoall",
            moe_router_load_balancing_type="aux_loss",
            moe_aux_loss_coeff=1e-2,
            add_bias_linear=False,
            seq_length=64,
            vocab_size=VOCABULARY,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            transformer_layer_spec=local_layer_spec,
            attention_backend=AttnBackend.local,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            gradient_accumulation_fusion=False,
            masked_softmax_fusion=False,
            cross_entropy_loss_fusion=False,
            bias_dropout_fusion=False,
            apply_rope_fusion=False,
            persist_layer_norm=False,
        ),
        train=parts.TrainingConfig(train_iters=6, global_batch_size=8, micro_batch_size=2),
        validation=parts.ValidationConfig(eval_iters=0, eval_interval=1000),
        optimizer=parts.OptimizerConfig(optimizer="adam", lr=1e-3, min_lr=1e-4),
        scheduler=parts.SchedulerConfig(lr_decay_iters=100, start_weight_decay=0.0, end_weight_decay=0.0),
        ddp=DistributedDataParallelConfig(),
        dataset=parts.GPTDatasetConfig(
            random_seed=1234,
            seq_length=64,
            reset_attention_mask=False,
            reset_position_ids=False,
            eod_mask_loss=False,
            split="100,0,0",
            path_to_cache=str(folder / "cache"),
            dataloader_type="single",
            num_workers=0,
        ),
        logger=parts.LoggerConfig(log_interval=1),
        tokenizer=parts.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCABULARY - 1),
        checkpoint=parts.CheckpointConfig(save=None, load=None, async_save=False),
        rng=parts.RNGConfig(seed=1234),
        dist=parts.DistributedInitConfig(distributed_backend="gloo", disable_jit_fuser=True),
    )
    for name, value in settings.items():
        part, _, field = name.partition("__")
        setattr(getattr(config, part), field, value)
    return config


def train(folder, prefixes, *, log, mixed=True, lora=None, **settings):
    """Run the example, or its recipe without a mix; return the exit code and what was recorded.

    The recipe is a small one, with settings as `checkpoint__save`, and LoRA on the modules named in `lora`.
    """
    out = os.open(f"{log}.{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    stand_ins.import_bridge()
    install()
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    config, code = small(folder, **settings), 0
    if lora:
        from megatron.bridge.peft.lora import LoRA

        config.peft = LoRA(target_modules=lora, dim=4)
    for name in ("recipes", "recipes.qwen"):  # its own ones bring every model with them
        sys.modules[f"megatron.bridge.{name}"] = ModuleType(name)
    sys.modules["megatron.bridge.recipes.qwen"].qwen3_30b_a3b_pretrain_config = lambda: config
    try:
        if mixed:
            load_example(interval=2).main(prefixes)
        else:
            config.dataset.blend = (prefixes, None)
            pretrain(config, forward_step)
    except SystemExit as stop:
        code = stop.code
    return code, written(folder / "runs/bridge") if mixed and not code else None


def install():
    """Let its start-up pass without CUDA; called once in each rank."""
    stock.install()
    import megatron.bridge.training.initialize as initialize
    import megatron.bridge.training.setup as setup
    import megatron.bridge.training.train as training

    setup.initialize_megatron = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
    setup.set_jit_fusion_options = lambda *_: None
    initialize.compile_helpers = lambda: None  # the wheel has them
    training.get_tensor_shapes_adjust_fn_for_distillation = lambda *_, **__: None  # modelopt's
