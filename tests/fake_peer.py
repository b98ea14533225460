"""A peer that skips the network at every odd step, small networks, and settings for few repeats."""

from contextlib import contextmanager

import pytest

import sostenuto
from sostenuto.bench import sides
from sostenuto.bench.cases import Settings

DIT = "dit:layers=2,width=64,tokens=16"
FLUX = "flux:double=1,single=1,width=64,tokens=16,text=4"
QUICK = Settings(repeats=2, warmup=0, batch_size=4)


class FakePeer:
    """Skips the network at every odd step; leaves nothing behind."""

    name, library, settings = "fake", "fakelib", {"every": 2}

    def version(self):
        return "1.2"

    def problem(self, pipe):
        return None

    @contextmanager
    def attached(self, pipe_or_denoiser, num_inference_steps):
        denoiser = getattr(pipe_or_denoiser, "transformer", pipe_or_denoiser)
        compute, calls, last = denoiser.forward, iter(range(10**6)), []

        def forward(*args, **kwargs):
            if next(calls) % 2 == 0:
                last[:] = [compute(*args, **kwargs)]
            return last[0]

        denoiser.forward = forward
        try:
            yield
        finally:
            del denoiser.forward


@pytest.fixture(name="peers")
def fake_peers(monkeypatch):
    """The only peers there are."""
    known = {"fake": FakePeer()}

    def peer(name):
        if name not in known:
            raise sostenuto.InputError(f"there is no peer {name!r}; there are {', '.join(known)}")
        return known[name]

    monkeypatch.setattr(sides, "peer", peer)
    return known
