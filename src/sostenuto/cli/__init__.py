"""The command line: one file for each command, all of them in :data:`COMMANDS`."""

from __future__ import annotations

import logging
import sys
import traceback

try:
    import tyro
except ModuleNotFoundError:  # here and not in main: the commands' own files need it as well
    sys.exit("sostenuto: the command line needs tyro: pip install 'sostenuto[cli]', or 'sostenuto[demo]' for all of it")

from sostenuto.cli.analyze import Analyze
from sostenuto.cli.bench import Bench
from sostenuto.cli.calibrate import Calibrate
from sostenuto.cli.common import ModelChoice
from sostenuto.cli.demo import Demo
from sostenuto.cli.evaluate import Evaluate
from sostenuto.cli.examine import Inspect, Verify
from sostenuto.cli.generate import Generate
from sostenuto.cli.methods import Methods
from sostenuto.cli.models import Models
from sostenuto.cli.studio import Studio
from sostenuto.cli.tune import Advise, Tune
from sostenuto.distributed.world import apart, joined
from sostenuto.errors import SostenutoError

__all__ = ["COMMANDS", "ModelChoice", "main"]

# Where torchao is installed, they say at diffusers' import what of it doesn't fit this torch; no command needs it.
_QUIET = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")

COMMANDS = {
    "demo": Demo,
    "generate": Generate,
    "calibrate": Calibrate,
    "tune": Tune,
    "advise": Advise,
    "evaluate": Evaluate,
    "analyze": Analyze,
    "bench": Bench,
    "inspect": Inspect,
    "verify": Verify,
    "methods": Methods,
    "models": Models,
    "studio": Studio,
}


def main(args: list[str] | None = None) -> int:
    """Run a command; returns 0, or 1 with a one-line reason on standard error (``--debug`` for the traceback).

    Under ``accelerate launch`` or ``torchrun`` a command whose class says ``shared`` is run by all processes; any other one by
    the first process alone, while the others end at once.
    """
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    for name in () if debug else _QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="sostenuto",
        description="Faster sampling for diffusion transformers. With --debug an error shows where it comes from.",
        args=words,
    )
    try:
        with joined() as world:
            if getattr(command, "shared", False):
                command.run()
            elif world.is_main:
                with apart():
                    command.run()
    except KeyboardInterrupt:
        print("sostenuto: interrupted", file=sys.stderr)
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ModuleNotFoundError) and not isinstance(error, SostenutoError):
            reason = f"this needs the package {error.name}: pip install 'sostenuto[demo]' brings what most commands use"
        print(f"sostenuto: {reason}", file=sys.stderr)
        return 1
    return 0
