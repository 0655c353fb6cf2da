"""fastft instruction-tunes GPT-2 exactly as the reference PyTorch path would, and faster."""

__version__ = "0.1.0"
