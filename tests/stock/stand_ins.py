"""What `megatron.training` needs on a CPU, beside the stand-ins of `platform/cpu.py`: for tests only."""

import functools
import multiprocessing
import types

import torch


def install():
    """Let stock's own start-up pass without CUDA; called once in each rank."""
    import megatron.core.dist_checkpointing.strategies.filesystem_async as writing
    import megatron.core.transformer.torch_norm as torch_norm
    import megatron.training.initialize as initialize
    import megatron.training.training as training

    capable = types.SimpleNamespace(major=9, minor=0, total_memory=2**34)
    torch.cuda.device_count = lambda: 1  # model parallelism is set up only where there are devices
    torch.cuda.set_device = lambda *_: None
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: capable
    torch.cuda.memory_stats = lambda *_: {}
    torch.accelerator.is_available = lambda: False  # or loaders would pin memory
    initialize._compile_dependencies = lambda *_, **__: None  # CUDA kernels
    training.set_jit_fusion_options = lambda *_, **__: None
    training.initialize_megatron = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
    torch_norm.WrappedTorchNorm.__new__ = _norm
    # at the first save its process would be spawned, and import everything again
    writing._results_queue = multiprocessing.get_context("fork").Manager().Queue()


def _norm(cls, config, hidden_size, eps=1e-5, **_):
    """Make torch's own norm, marked for sequence parallelism instead of refused."""
    layer = torch.nn.LayerNorm(hidden_size, eps)
    for parameter in layer.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return layer
