"""Ways to compute a training step, and which one a run takes.

A way makes the model itself faster for the length of a block: `with way.active(model):` the same
call gives the same numbers, with the same gradients, sooner. Loss and metrics stay mace-torch's
own, clipping, optimiser and averages too unless they are captured, so that every option of theirs
works with every way.

    eager      mace-torch's own operations; effective weights computed once per step, no TorchScript
    fused      CPU: kernels for the products of MACE, no TorchScript; any shapes, no waiting
    compile    fused, and the rest of the step as one graph through inductor; few fixed shapes
    cudagraph  CUDA: whole steps captured once per shape and replayed, but for the loss
"""
