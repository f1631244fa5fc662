"""The averaged generator equals PyTorch's average, and reads the state of version 0.1.0."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from stages.models.average import AverageNetwork


def test_weights_and_buffers_are_those_of_pytorchs_average() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    expected = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average = AverageNetwork(network, 0.9)
    for step in range(4):
        network(torch.randn(2, 3, 5, 5))  # changes the running statistics
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        expected.update_parameters(network)
        average.update(network, first=step == 0)
    parameters = zip(average.module.parameters(), expected.module.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in parameters)
    for ours, now in zip(average.module.buffers(), network.buffers(), strict=True):
        assert torch.equal(ours, now)

    restored = AverageNetwork(network, 0.9)
    restored.load_state_dict(expected.state_dict())  # as version 0.1.0 saved it
    parameters = zip(restored.module.parameters(), expected.module.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in parameters)
