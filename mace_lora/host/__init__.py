"""The host of upstream's training script: the only part of this package that imports `mace`.

Order of reading: `upstream` (what we substitute, and the check that it is there), `models`
(foundation models in and out), `checks` and `frames` (flags, folders, labels and frames), `session`
(one run, as a model is built), `training` (what is optimised), `steps` (each step), `loop` (its
epochs, with `order`: of the frames, `processes`: several of them, `signals`: an end from outside,
`checkpoints` and `identity`: going on), `saving` and `writing` (its end), `run` (all of it
together), `mini` (the embedded foundation model).
"""
