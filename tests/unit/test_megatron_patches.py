"""What is corrected in Megatron-Core gives its numbers where they are right. T positions of packed rows."""

import types

import pytest
import torch

from megatron_dynmix import platform

platform.start()
from megatron.core.models.common.embeddings import rope_utils  # noqa: E402

from megatron_dynmix.model.gpt import finalize_gradients  # noqa: E402
from megatron_dynmix.platform.megatron_patches import rotate_packed_rows_on_the_device  # noqa: E402

ALONE = types.SimpleNamespace(size=lambda: 1, rank=lambda: 0)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_are_rotated_as_megatron_core_does_without_reading_values_back(
    interleaved, latent, dtype, monkeypatch
):
    generator = torch.Generator().manual_seed(1)
    cu_seqlens = torch.tensor([0, 3, 4, 9, 9, 16, 16, 16], dtype=torch.int32)
    t = torch.randn(16, 2, 12, generator=generator).to(dtype)
    freqs = torch.randn(10, 1, 1, 8, generator=generator)
    stock = rope_utils._apply_rotary_pos_emb_thd
    monkeypatch.setattr(rope_utils, "_apply_rotary_pos_emb_thd", stock)
    arguments = {"rotary_interleaved": interleaved, "multi_latent_attention": latent, "mscale": 1.3}
    # of segments without a position stock 0.19 cannot rotate pairs
    expected = stock(t, cu_seqlens.unique(), freqs, cp_group=ALONE, **arguments)
    rotate_packed_rows_on_the_device()
    with monkeypatch.context() as patched:
        for reader in ("tolist", "item", "__bool__"):
            patched.setattr(torch.Tensor, reader, lambda *_: pytest.fail("a value is read back"))
        ours = rope_utils._apply_rotary_pos_emb_thd(t, cu_seqlens, freqs, cp_group=ALONE, **arguments)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_gradients_are_divided_by_the_trained_tokens_without_asking_whether_there_are_any(
    tokens, monkeypatch
):
    from megatron.core import parallel_state

    monkeypatch.setattr("megatron_dynmix.model.gpt.finalize_model_grads", lambda chunks, **_: None)
    for name in ("broadcast", "all_reduce"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: None)
    for name in dir(parallel_state):
        if name.startswith(("get_pipeline", "get_data_parallel_group")):
            monkeypatch.setattr(parallel_state, name, lambda **_: None)
    gradients = [torch.tensor([2.0, -3.0]), torch.tensor([0.1])]
    chunks = [types.SimpleNamespace(scale_gradients=gradient.mul_) for gradient in gradients]
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "__bool__", lambda _: pytest.fail("a value is read back"))
        finalize_gradients(chunks, torch.tensor(tokens, dtype=torch.int))
    scale = 1.0 / torch.tensor(max(tokens, 1))
    assert torch.equal(gradients[0], torch.tensor([2.0, -3.0]) * scale)
    assert torch.equal(gradients[1], torch.tensor([0.1]) * scale)
