"""longwave: models of very long sequences, the same answer in parallel, in chunks or one token at a time."""

__version__ = "0.1.0"
