"""The version of fastft."""

__version__ = "0.2.0"
