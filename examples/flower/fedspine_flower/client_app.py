"""What a SuperNode runs, anew for each message."""

from fedspine_edge.flower_client import app

__all__ = ["app"]
