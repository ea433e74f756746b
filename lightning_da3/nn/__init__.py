"""Modules with state that a rewritten graph calls."""
