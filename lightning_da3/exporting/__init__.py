"""Inference and training steps as files for runtimes without Python."""
