"""What a training step costs: bytes and FLOPs, node by node, beside those of fine-tuning."""
