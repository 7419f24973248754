"""Imported first by everything that needs e3nn.

e3nn 0.4.4 reads its constants with `torch.load`, which since torch 2.6 refuses the pickled `slice`
objects in them. Allow-listing that one harmless type is the narrow cure; mace-torch's is a global
environment switch that turns the protection off for every file.
"""

import torch

if hasattr(torch.serialization, "add_safe_globals"):
    torch.serialization.add_safe_globals([slice])
