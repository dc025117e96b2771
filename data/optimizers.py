"""The optimizers: torch's own AdamW and Adafactor, for weights in fp32 or in bfloat16.

Knows nothing of models, losses and schedules.
"""

import torch


def make_optimizer(parameters, name, weight_decay):
    """AdamW, the paper's, or Adafactor (Shazeer and Stern, 2018, arXiv 1804.04235), which keeps of the second moments
    only a mean of each row and column. Adafactor's learning rate is relative to each matrix's root mean square."""
    if name == "adafactor":
        return torch.optim.Adafactor(parameters, weight_decay=weight_decay)
    return torch.optim.AdamW(parameters, weight_decay=weight_decay, fused=True)  # needs no further memory


@torch.no_grad()
def optimizer_step(optimizer):
    """optimizer.step(), where weights are in bfloat16 in fp32, one parameter after the other.

    A bfloat16 has 8 significant bits: rounding to the nearest would drop every change below 0.2% of a weight, which is
    most of them. Rounded stochastically, up or down with a chance in proportion to the distance, small changes add up.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if parameters[0].dtype == torch.float32:
        optimizer.step()
        return
    gradients = [p.grad for p in parameters]
    optimizer.zero_grad()  # the optimizer passes over what has no gradient
    for p, gradient in zip(parameters, gradients):
        if gradient is None:
            continue
        weight = p.data
        p.data = weight.float()
        p.grad = gradient.float()
        optimizer.step()
        weight.copy_(stochastic_round(p.data))
        p.data, p.grad = weight, None


def stochastic_round(x):
    """fp32 -> bfloat16, its upper 16 bits, one up with the probability that the lower 16 are of one."""
    bits = x.view(torch.int32)
    return (bits + torch.randint_like(bits, 1 << 16)).bitwise_and_(-1 << 16).view(torch.float32).bfloat16()


def optimizer_bytes(parameters, optimizer):
    """fp32 state: AdamW's two moments of each parameter; Adafactor's one number a row and a column of each matrix."""
    if optimizer == "adamw":
        return sum(8 * p.numel() for p in parameters)
    return sum(4 * (sum(p.shape) if p.dim() > 1 else p.numel()) for p in parameters)
