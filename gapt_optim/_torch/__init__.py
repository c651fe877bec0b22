"""Being a ``torch.optim.Optimizer``: several optimizers as one, and the shell around them."""
