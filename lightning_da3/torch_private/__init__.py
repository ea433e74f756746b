"""All that this package uses of PyTorch without PyTorch's promise that it stays.

Each part stands here under a name that says what it gives. Where a version of PyTorch lacks it, the
public function that does the same, more slowly, stands in its place; where there is none, using it
raises a `DA3Error`, and importing it does not.
"""
