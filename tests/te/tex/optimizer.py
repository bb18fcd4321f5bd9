"""The fused optimizer and what goes with it: lists of tensors in, changed in place."""

import torch


def multi_tensor_scale(chunk_size, is_infinite, tensor_lists, scale):
    for given, scaled in zip(*tensor_lists, strict=True):
        scaled.copy_(given.float() * scale)
        if not bool(torch.isfinite(given).all()):
            is_infinite.fill_(1)


def multi_tensor_l2norm(chunk_size, noop_flag, tensor_lists, per_tensor=False):
    norms = torch.stack([tensor.float().norm() for tensor in tensor_lists[0]])
    return norms.norm().view(1), norms if per_tensor else torch.zeros(1)


def multi_tensor_adam(
    chunk_size, noop_flag, tensor_lists, lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay
):
    """Adam (mode 0) or AdamW (1); lists of gradients, parameters, both moments and perhaps master weights."""
    masters = tensor_lists[4] if len(tensor_lists) == 5 else tensor_lists[1]
    for grad, parameter, first, second, master in zip(*tensor_lists[:4], masters, strict=True):
        stepped = _step(
            *(grad.float(), master.float(), first, second, lr, beta1, beta2, epsilon, int(step)),
            *(mode, bias_correction, weight_decay),
        )
        master.copy_(stepped)
        parameter.copy_(stepped)


def _step(grad, master, first, second, lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay):
    if not mode:
        grad = grad + weight_decay * master
    first.copy_(first.float() * beta1 + grad * (1 - beta1))
    second.copy_(second.float() * beta2 + grad.square() * (1 - beta2))
    share1, share2 = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    update = (first.float() / share1) / ((second.float() / share2).sqrt() + epsilon)
    return master - lr * (update + weight_decay * master if mode else update)
