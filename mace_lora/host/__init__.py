"""The host of upstream's training script: the only part of this package that imports `mace`.

Order of reading: `upstream` (what we substitute, and the check that it is there), `models`
(foundation models in and out), `checks` (labels and frames), `session` (what happens during a run),
`run` (all of it together), `mini` (the embedded foundation model).
"""
