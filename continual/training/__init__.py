"""One stage in training: the LightningModule, torch.compile and CUDA graphs."""
