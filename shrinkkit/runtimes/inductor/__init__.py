"""torch.compile's inductor as a runtime."""
