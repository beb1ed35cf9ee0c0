"""Pruned models in the form that transformers loads: a config with their widths, and a model class where none fits."""
