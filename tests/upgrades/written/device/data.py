import torch

from fed_dpsat.data import Examples


def examples():
    labels = torch.arange(20) % 2
    return Examples(inputs=labels.float().view(20, 1, 1).repeat(1, 1, 2), labels=labels, mean=(0.0,), std=(1.0,))
