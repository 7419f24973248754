"""The host of upstream's training script: the only part of this package that imports `mace`.

Order of reading: `upstream` (what we substitute, and the check that it is there), `models`
(foundation models in and out), `checks` (labels and frames), `session` (one run, as a model is
built), `training` (its epochs), `saving` (its end), `run` (all of it together), `mini` (the
embedded foundation model).
"""
