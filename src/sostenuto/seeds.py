"""Which seed does each image of a run have?"""

from __future__ import annotations

import numpy as np

OWN_SAMPLES = 1 << 30
"""Index from which on the noise of samples is that stand for real data: none that anything is measured with."""

CALIBRATED = OWN_SAMPLES + 1
"""Index of the noise that is calibrated on where the same call measures what was calibrated."""

BENCHMARKED = 1 << 29
"""Index from which on the noise of benchmarks is: none that a tuning or calibration with a seed like theirs looked at."""

_BITS = 32  # of a seed that torch's CPU generator looks at


def noise_seed(seed: int, index: int) -> int:
    """The seed of the noise of image ``index`` in a run with ``seed``, from 0 to 2³²−1.

    Within a run no two images share one (torch's CPU generator knows 2³² seeds, so that seeds drawn at random would coincide
    among a million images); runs with other seeds begin somewhere else.

    Args:
        seed: of the run, 0 or more.
        index: of the image, from 0 to 2³²−1.
    """
    start = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return (start + index) % 2**_BITS
