"""Tensors in, tensors out: autograd Functions that keep less for the backward pass."""
