"""Domains on disk and on the Hub."""
