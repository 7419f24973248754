"""Ways to compute a training step, and which one a run takes.

A way makes the model itself faster for the length of a block: `with way.active(model):` the same
call gives the same numbers, with the same gradients, sooner. Loss, clipping, optimiser, averages
and metrics stay mace-torch's own, so that every option of theirs works with every way.

    eager      mace-torch's own operations; effective weights computed once per step
    fused      CPU: kernels for the products of MACE, no TorchScript; any shapes, no waiting
    compile    fused, and the rest of the step as one graph through inductor; few fixed shapes
    cudagraph  CUDA: forward and backward captured once per shape and replayed
"""
