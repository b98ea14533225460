"""What really ran at each call of a network, seen from within its branches: it knows nothing of what the engine notes."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F


@dataclass
class Ran:
    """What one branch did in one call of the network."""

    tokens: int = 0  # that its first projection was given
    keys: list[int] = field(default_factory=list)  # of every attention that was computed within it
    output: torch.Tensor | None = None  # what the block was given of it, whether it ran or not


class Watched:
    """A network to be called in the place of another; ``calls`` tells of each call what every branch did.

    What replaces the ``forward`` of a branch leaves its projections alone: they run where the branch does. A context manager
    that watches until its end.
    """

    def __init__(self, model):
        self._model, self._branch, self._hooks = model, "", ExitStack()
        self.calls: list[dict[str, Ran]] = []

    def __enter__(self):
        for name, module in self._model.named_modules():
            if found := re.fullmatch(r"(.+)\.(to_q|net\.0)", name):
                branch = self._model.get_submodule(found[1])
                self._hooks.enter_context(module.register_forward_pre_hook(partial(self._projects, found[1])))
                self._hooks.enter_context(branch.register_forward_hook(partial(self._returns, found[1])))
        attend = partial(self._attends, F.scaled_dot_product_attention)
        self._hooks.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attend))
        return self

    def __exit__(self, *_):
        self._hooks.close()

    def __call__(self, *args, **kwargs):
        self.calls.append({})
        return self._model(*args, **kwargs)

    def _of(self, branch):
        return self.calls[-1].setdefault(branch, Ran())

    def _projects(self, branch, _module, given):
        self._branch = branch
        self._of(branch).tokens = given[0].shape[:-1].numel()

    def _attends(self, attend, query, key, *args, **kwargs):
        self._of(self._branch).keys.append(key.shape[-2])
        return attend(query, key, *args, **kwargs)

    def _returns(self, branch, _module, _given, output):
        self._of(branch).output = output.clone()

    def plan(self, plan, sites, num_passes):
        """The actions ``[call][site]`` that this amounts to, named as in ``plan`` ``[step][site]``.

        How a range of blocks that did not run was filled is not seen from within it: there either name will do.
        """
        return [
            [
                self._action(index, num_passes, site, plan[index // num_passes][place])
                for place, site in enumerate(sites)
            ]
            for index in range(len(self.calls))
        ]

    def _action(self, index, num_passes, site, planned):
        everything, now = self.calls[0], self.calls[index]
        if site not in everything:  # a larger site
            ran = any(ran.tokens for branch, ran in now.items() if _within(branch, site))
            return "compute" if ran else planned if planned in ("reuse", "forecast") else "reuse"
        if site not in now:
            return "skip"
        ran = now[site]
        if not ran.tokens:
            earlier = self.calls[index - num_passes :: -num_passes]
            last = next(call[site].output for call in earlier if site in call)
            return "reuse" if torch.equal(ran.output, last) else "forecast"
        if ran.tokens < everything[site].tokens:
            return "partial"
        return "window" if ran.keys and max(ran.keys) < max(everything[site].keys) else "compute"


def _within(branch, site):
    """Whether a branch lies in a range of blocks; every branch lies in what is no range: the deep part and the output."""
    found = re.match(r"(.+)\.(\d+)-(\d+)", site)
    if not found:
        return True
    name, first, last = found.groups()
    block = re.match(rf"{re.escape(name)}\.(\d+)\.", branch)
    return block is not None and int(first) <= int(block[1]) <= int(last)
