"""vlmlab: a Hydra + PyTorch Lightning lab for how vision should meet language."""

__version__ = "0.1.0"
