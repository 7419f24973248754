"""What a run changes in its process, put back for one that goes on afterwards."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mace_lora.printing import ignore_warnings
from mace_lora.training.files import random_states
from mace_lora.upstream import names as upstream


@contextmanager
def put_back() -> Iterator[None]:
    """Log, environment, working folder, precision, warnings and random numbers are as before.

    Raises:
        UnsupportedUpstream: the installed mace-torch is none that can be hosted.
    """
    upstream.check()  # imports it first: what its import sets in the environment has to stay
    root = logging.getLogger()
    log = root.level, root.handlers[:], root.filters[:]
    folder, environment = os.getcwd(), dict(os.environ)
    dtype, numbers = torch.get_default_dtype(), random_states.now()
    try:
        with warnings.catch_warnings():
            ignore_warnings()
            yield
    finally:
        new = [handler for handler in root.handlers if handler not in log[1]]
        root.setLevel(log[0])
        root.handlers[:], root.filters[:] = log[1], log[2]
        for handler in new:
            handler.close()
        os.chdir(folder)
        _restore_environment(environment)
        torch.set_default_dtype(dtype)
        random_states.restore(numbers)


def _restore_environment(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
