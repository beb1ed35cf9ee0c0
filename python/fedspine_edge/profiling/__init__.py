"""Measurements of exported models: speed, latency, memory."""
