"""torch.compile: the same for machines without Triton, and for float64."""
