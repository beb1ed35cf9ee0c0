"""Exporters: a (pruned) model directory -> the file an inference engine runs, and the proof that it says the same."""
