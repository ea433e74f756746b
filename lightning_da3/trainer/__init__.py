"""Domains inside a Lightning Trainer."""
