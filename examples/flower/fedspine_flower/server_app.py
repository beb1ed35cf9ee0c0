"""What SuperLink runs."""

from fedspine_server.flower_server import app

__all__ = ["app"]
