"""Notice of SIGTERM, which asks the trainer to save and leave."""

from .hook import StopRequest

__all__ = ["StopRequest"]
