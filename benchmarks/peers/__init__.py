"""The same training step by the book's code, transformers, TRL and fastft, each in a process of its own."""
