"""Decides what becomes of every node of a traced network."""
