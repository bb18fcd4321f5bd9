"""Where data, MoE, mixing and monitoring meet: model, optimizer, loop, probe, checkpoint."""
