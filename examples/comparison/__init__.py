"""What compare.py is made of: data, networks, methods, training, measuring, and reports."""
