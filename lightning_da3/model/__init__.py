"""The converted network and its domains."""
