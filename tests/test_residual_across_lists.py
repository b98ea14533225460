"""What a range of blocks adds, where it ends in another list of blocks, which lays its streams out in another way."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import sostenuto
from sostenuto import CacheTable, EBCache, StepState
from sostenuto.zoo import TINY_MODELS

LISTS = {  # the first block and the module behind the last one
    "LatteTransformer3DModel": ("transformer_blocks.0", "norm_out"),  # over space and over time in turn
    "ChromaTransformer2DModel": ("transformer_blocks.0", "norm_out"),  # text and image, then both as one
    "BriaFiboTransformer2DModel": ("transformer_blocks.0", "norm_out"),
    "AuraFlowTransformer2DModel": ("joint_transformer_blocks.0", "norm_out"),
    "Flux2Transformer2DModel": ("transformer_blocks.0", "norm_out"),
    "HiDreamImageTransformer2DModel": ("double_stream_blocks.0", "final_layer"),
}
TABLE = CacheTable((StepState.COMPUTE, StepState.COMPUTE, StepState.REUSE_BOTH), fill="stack")


@pytest.mark.parametrize("name", LISTS)
def test_a_skipped_stack_hands_on_its_own_input_and_what_was_added_before(name):
    tiny = TINY_MODELS[name]
    model, scheduler = tiny.build(), FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.3])
    seen = {place: [] for place in LISTS[name]}

    def watch(place):
        def hook(module, args, kwargs):
            seen[place].append((args[0] if args else kwargs["hidden_states"]).clone())

        return hook

    hooks = [model.get_submodule(p).register_forward_pre_hook(watch(p), with_kwargs=True) for p in seen]
    with torch.no_grad(), sostenuto.enable(model, EBCache(TABLE), scheduler=scheduler):
        for step, timestep in enumerate(scheduler.timesteps.tolist()):
            inputs = tiny.inputs(timestep, torch.Generator().manual_seed(0))
            latents = next(iter(inputs))
            moved = tiny.inputs(timestep, torch.Generator().manual_seed(step))[latents]
            model(**{**inputs, latents: moved})
    for hook in hooks:
        hook.remove()
    before, after = seen.values()
    assert len(after) == 3
    assert not torch.equal(before[1], before[2])
    torch.testing.assert_close(after[2], before[2] + after[1] - before[1], rtol=1e-4, atol=1e-4)
