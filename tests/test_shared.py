"""What all blocks compute of the timestep alone is computed once a call, to the same bits, and never a stale one."""

import pytest
import torch
from diffusers.models.embeddings import Timesteps
from torch import nn

import sostenuto
from conftest import build_tiny, sample_loop
from sostenuto import FORA
from sostenuto.shared import SharedTimesteps


@pytest.fixture
def embedded(monkeypatch):
    """Every call that any of them computes."""
    calls, compute = [], Timesteps.forward
    monkeypatch.setattr(Timesteps, "forward", lambda self, given: calls.append(1) or compute(self, given))
    return calls


@pytest.mark.parametrize("method", ["none", FORA(2)])
def test_a_dit_embeds_its_timestep_once_a_call(method, scheduler, embedded):
    model = build_tiny()
    assert sum(isinstance(module, Timesteps) for module in model.modules()) > 1
    stock = sample_loop(model, scheduler)[0]
    embedded.clear()
    with sostenuto.enable(model, method, scheduler=scheduler):
        latents = sample_loop(model, scheduler)[0]
        assert len(embedded) == 6  # one a step
        embedded.clear()
        for _ in range(2):  # outside of a call nothing is shared
            model.transformer_blocks[0].norm1.emb.time_proj(torch.ones(2))
        assert len(embedded) == 2
    assert (method != "none") or torch.equal(latents, stock)
    embedded.clear()
    assert torch.equal(sample_loop(model, scheduler)[0], stock)
    assert len(embedded) > 6
    assert all("forward" not in vars(module) for module in model.modules())


class Pair(nn.Module):
    def __init__(self, *others):
        super().__init__()
        self.parts = nn.ModuleList([Timesteps(8, True, 0), Timesteps(8, True, 0), *others])


@pytest.fixture
def pair():
    """Two alike and one of another kind, with the sharing in place and a call under way."""
    model = Pair(Timesteps(8, False, 0))
    shared = SharedTimesteps(model, is_compiled=False)
    shared.attach()
    shared.begin()
    yield [*model.parts, shared]
    shared.detach()


def test_others_writing_into_timestep_or_output_is_noticed(pair):
    one, two, other, shared = pair
    given = torch.tensor([1.0, 2.0])
    first = one(given)
    assert two(given) is first
    assert not torch.equal(other(given), first)
    assert torch.equal(two(given + 1), Timesteps(8, True, 0)(given + 1))
    first = one(given)
    first.zero_()
    assert torch.equal(two(given), Timesteps(8, True, 0)(given))
    given.mul_(3)
    assert torch.equal(one(given), Timesteps(8, True, 0)(given))
    shared.leave()
    assert one(given) is not one(given)


def test_where_writing_can_not_be_noticed_nothing_is_shared(pair):
    one, two, *_ = pair
    with torch.inference_mode():
        given = torch.tensor([1.0])
        assert one(given) is not two(given)
        assert torch.equal(one(given), two(given))


def test_a_compiled_network_is_left_to_its_compiler():
    whole, blocks = Pair(), Pair(nn.Linear(1, 1))
    blocks.parts[2].compile(backend="eager")
    assert SharedTimesteps(whole, is_compiled=True).replacements() == []
    assert SharedTimesteps(blocks, is_compiled=False).replacements() == []
    assert len(SharedTimesteps(whole, is_compiled=False).replacements()) == 2
