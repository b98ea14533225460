"""What the tests of tuning share: a quick setting, and what a plan of the tiny network does."""

import sostenuto
from conftest import sample, sample_loop
from sostenuto import EBCache, TuneOptions, tune

STEPS = 10
QUICK = TuneOptions(speedups=(1.3, 2.0), trial_samples=2, refinements=1, tilts=(0.0,), kinds=("stack",), published=())


def tuned(model, options=QUICK, **kwargs):
    given = dict(num_inference_steps=STEPS, speedup=2.0, num_samples=8, scheduler=model.scheduler_for_test)
    return tune(model, sample, options=options, **(given | kwargs))


def speedup_of(model, method):
    with sostenuto.enable(model, method, scheduler=model.scheduler_for_test) as handle:
        sample_loop(model, model.scheduler_for_test, STEPS)
        return handle.stats.ideal_speedup


def error_of(model, table, seed=7):
    wanted, _ = sample_loop(model, model.scheduler_for_test, STEPS, seed=seed)
    with sostenuto.enable(model, EBCache(table, eps_scale=1.0), scheduler=model.scheduler_for_test):
        made, _ = sample_loop(model, model.scheduler_for_test, STEPS, seed=seed)
    return (made - wanted).square().mean().item()


def norm(images):
    return images.norm().item()
