"""The models, data and loops that experiments train. A task has `Settings` and `train(settings) -> result`."""
