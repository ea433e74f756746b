"""The user's model to graphs."""
