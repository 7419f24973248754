"""Backends: how a model computes a training step, an evaluation or a prediction.

A backend makes the model itself faster for the length of a block: `with backend.active(model):`
the same call gives the same numbers, with the same gradients, sooner. Loss, metrics, clipping,
optimiser and averages stay mace-torch's own, so that every option of theirs works with every
backend.

`registry` lists the backends, one file each; `choice` picks one. The other files are parts: `csrc`,
`library`, `kernels`, `products`, `activations`, `radial` and `blocks` of the fused ones,
`plain_layers` and `replacing` of every backend that does without TorchScript, `padding` of those
that need fixed shapes.
"""
