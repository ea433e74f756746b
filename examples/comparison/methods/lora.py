"""LoRA on convolutions, by peft: low-rank updates beside frozen weights.

Hu et al., "LoRA: low-rank adaptation of large language models" (2021); peft carries it over to
convolutions. Every linear layer and every convolution without groups gets one, but for the head,
which trains whole. Batch norm stays as pretrained. (An update of a depthwise convolution would be
larger than the convolution.)
"""

from __future__ import annotations

from torch import nn

from comparison.methods.plain import head_of, linear_probe

RANK = 8


def lora(network: nn.Module) -> nn.Module:
    """Updates of rank 8, scaled by 1, and the head train."""
    from peft import LoraConfig, inject_adapter_in_model

    linear_probe(network)
    head, _ = head_of(network)
    hosts = [
        name
        for name, module in network.named_modules()
        if name != head
        and (type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1))
    ]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=hosts, modules_to_save=None)
    adapted: nn.Module = inject_adapter_in_model(config, network)
    head_of(adapted)[1].requires_grad_(True)
    return adapted.eval()


def merged(network: nn.Module) -> nn.Module:
    """With every update added to its weight, as one uses what was learned."""
    for module in list(network.modules()):
        if hasattr(module, "lora_A"):
            module.merge()
    return network
