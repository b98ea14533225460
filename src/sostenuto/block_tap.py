"""The tap of a range of whole blocks, skipped by plan or by a decision taken when it is reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from sostenuto import compat
from sostenuto.attachment import replace_forward, runs
from sostenuto.errors import AnatomyError, EngineError, MethodError
from sostenuto.features import Feature, versions
from sostenuto.plan import Action, Op
from sostenuto.sites import Block, Site, anatomy_of, blocks_of, inspect
from sostenuto.source import accepts, argument_names
from sostenuto.tap import Tap, Watched, first_argument

_IN_THE_BLOCKS = ("modulated-input", "front-residual")
Decide = Callable[[torch.Tensor], Op]


class BlocksTap(Tap):
    """Skips the blocks ``first … last``: all but the last hand on what they are given, the last returns what stands in.

    So what the network adds between the blocks (a ControlNet's residuals, hints) is part of the range: it is in the kept
    feature, and is not added a second time.

    What the range adds is told from its input laid out as its output is. Lists that run in turn, over space and over time,
    take the tokens of a video in two orders; and where the last blocks have one stream for the several of the first, the
    network has joined those along their tokens in between, in the order in which blocks return them.

    With a ``watch`` the engine may give it the op ``DECIDE``: it then measures the signal and asks ``decide``.

    Args:
        site: the range.
        denoiser: the network.
        watch: ``"modulated-input"``, what the first attention of the range is given (normalised and modulated by the timestep);
            ``"front-residual"``, what the blocks in front of the range add to their input; or the path of a module in front of
            the blocks, whose output it is, as that of the timestep's embedding.
    """

    def __init__(self, site: Site, denoiser: nn.Module, watch: str | None = None) -> None:
        super().__init__(site)
        assert site.last_block is not None
        self.decide: Decide | None = None
        places = blocks_of(denoiser)
        members = places[site.block : site.last_block + 1]
        self.blocks = [denoiser.get_submodule(member.path) for member in members]
        self._streams = [_Streams(member, module) for member, module in zip(members, self.blocks, strict=True)]
        self._is_one_list = members[0].place is members[-1].place
        self._turns = site.residual and anatomy_of(denoiser).interleaved and not self._is_one_list
        self._in_place = any(place.place.in_place for place in places[: site.last_block + 1])
        front = next((place for place in places[: site.block] if place.place.whole), None)
        if watch == "front-residual":
            if front is None:
                raise EngineError(f"{site.id} has no blocks in front of it whose residual could be watched")
            if anatomy_of(denoiser).interleaved and front.place is not members[0].place:
                raise EngineError(
                    f"{site.id} begins in another list of blocks than the network, whose streams are laid out in another "
                    "way: let as many blocks of each list be in front of it"
                )
        self._front = denoiser.get_submodule(front.path) if front is not None and watch == "front-residual" else None
        self._front_streams = None if front is None or self._front is None else _Streams(front, self._front)
        self._attention = _first_branch(denoiser, site) if watch == "modulated-input" else None
        self._source = None if watch is None or watch in _IN_THE_BLOCKS else denoiser.get_submodule(watch)
        self._beginning: torch.Tensor | None = None  # what the first of all blocks was given, or the source has made
        self._entry: dict[str, Any] = {}  # what the range was given, stream by stream
        self._entry_version = 0
        self._entered = False
        self._standing_in: Feature = None

    def watched(self) -> Watched:
        """The first and the last block."""
        return Watched(self.blocks[0], self.blocks[-1])

    def replacements(self) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """All blocks of the range, and what is watched in front of it: the first of all blocks, or another module."""
        found = []
        if self._source is not None:
            found.append((self._source, self._take_down(runs(self._source))))
        if self._front is not None:
            found.append((self._front, self._remember(runs(self._front))))
        for index, block in enumerate(self.blocks):
            found.append((block, self._block(runs(block), index)))
        return found

    def can(self, action: Action) -> bool:
        """All but a part of the tokens."""
        return action is not Action.PARTIAL and super().can(action)

    def sample_of(self, feature: Feature) -> torch.Tensor:
        """The sample's stream of what the range keeps, which blocks of two streams return along with the text's."""
        return self._streams[-1].of_sample(feature)

    def begin(self, op: int) -> None:
        """Get ready for a denoiser call."""
        super().begin(op)
        self._entered = False

    def reset(self) -> None:
        """Let go of everything that belongs to a call."""
        super().reset()
        self.decide = self._beginning = self._standing_in = None
        self._entered = False
        self._entry = {}

    def _remember(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.op == Op.DECIDE:
                assert self._front_streams is not None
                self._beginning = self._as_it_is(self._front_streams.main(args, kwargs))
            return compute(*args, **kwargs)

        return forward

    def _take_down(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = compute(*args, **kwargs)
            if self.op == Op.DECIDE:
                self._beginning = output
            return output

        return forward

    def _block(self, compute: Callable[..., Any], index: int) -> Callable[..., Any]:
        streams, is_first, is_last = self._streams[index], index == 0, index == len(self.blocks) - 1

        def forward(*args: Any, **kwargs: Any) -> Any:
            if is_first:
                self._enter(compute, streams, args, kwargs)
            if is_last and not torch.compiler.is_dynamo_compiling():
                if not self._entered:
                    return compute(*args, **kwargs)  # a pass that leaves out the first block: the range isn't reached
                self.reach()
            op = self.op
            if op == Op.OUTSIDE:
                return self.outside_of_call(compute, args, kwargs)
            if op == Op.COMPUTE or op == Op.SKIP:  # what is skipped here is skipped by the tap of a range around it
                return compute(*args, **kwargs)
            if op == Op.STORE:
                output = compute(*args, **kwargs)
                return self._keep(streams, output) if is_last else output
            if not is_last:
                return streams.handed_on(args, kwargs)
            standing_in, self._standing_in = self._standing_in, None
            return standing_in

        return forward

    def _enter(
        self, compute: Callable[..., Any], streams: _Streams, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """The range is reached: decide, remember what it is given, make what stands in for its output."""
        if self.op == Op.DECIDE and self._source is not None and not isinstance(self._beginning, torch.Tensor):
            what = "did not run in front of the blocks" if self._beginning is None else "returns no tensor"
            raise MethodError(f"the module that is watched as the signal {what}: watch another, or 'modulated-input'")
        if self.op == Op.DECIDE and self._attention is None and self._beginning is None:
            self.op = int(Op.COMPUTE)  # a pass that leaves out what is in front has no signal
            return
        if not torch.compiler.is_dynamo_compiling():
            self._entered = True
        if self.op == Op.DECIDE:
            assert self.decide is not None
            self.op = int(self.decide(self._signal(compute, streams, args, kwargs)))
        op = self.op
        if op == Op.COMPUTE or op == Op.SKIP or op == Op.OUTSIDE:
            return
        given = streams.given(args, kwargs)
        self._entry = self._streams[-1].joined(streams, given) if self.site.residual else given
        if op == Op.STORE:
            if self.site.residual:
                self._entry = {name: self._as_it_is(stream) for name, stream in self._entry.items()}
            if not torch.compiler.is_dynamo_compiling():
                self._entry_version = versions(tuple(self._entry.values()))
        else:
            # Made now: the network may write into the streams that are handed on.
            self._standing_in = self._streams[-1].each(self.filled(op), self._entry, self._add)
            self._entry = {}

    def _keep(self, streams: _Streams, output: Feature) -> Feature:
        watched = self.site.residual and not torch.compiler.is_dynamo_compiling()
        if watched and versions(tuple(self._entry.values())) != self._entry_version:
            raise EngineError(
                f"the network writes into the input of {self.site.id}, so that its residual is lost: say so in its anatomy, "
                "BlockList(…, in_place=True)"
            )
        self.store(streams.each(output, self._entry, self._subtract))
        self._entry = {}
        return output

    def _as_it_is(self, stream: Any) -> Any:
        """A stream as it is now, also when a block writes into it: of an inference tensor nothing would tell."""
        if not isinstance(stream, torch.Tensor):
            return stream
        if self._in_place or (not torch.compiler.is_dynamo_compiling() and stream.is_inference()):
            return stream.clone()
        return stream

    def _subtract(self, output: Any, entry: Any) -> Any:
        entry = self._turned(entry, output)
        if self._has_residual(output, entry):
            return output - entry
        if self.site.residual and self._is_one_list and _both_tensors(output, entry):
            raise EngineError(
                f"{self.site.id} is given a stream {list(entry.shape)} and returns {list(output.shape)}, which is no sum with "
                "it: let the streams of its BlockList name the arguments that a block changes and hands on"
            )
        return output

    def _add(self, filled: Any, entry: Any) -> Any:
        if filled is None:  # a last block that leaves out a stream which nobody reads any more
            return entry
        entry = self._turned(entry, filled)
        if self._has_residual(filled, entry):
            return entry + filled
        return filled.clone() if self.op == Op.REUSE else filled  # the network may write into what a block returns

    def _turned(self, entry: Any, output: Any) -> Any:
        """The range's input in the order of its output, where the first blocks run over space and the last over time.

        ``[batch · frames, tokens, channels]`` becomes ``[batch · tokens, frames, channels]``, or the other way round.
        """
        if not self._turns or not _both_tensors(entry, output) or not entry.ndim == output.ndim == 3:
            return entry
        rows, tokens, channels = entry.shape
        frames = output.shape[1]
        if rows % frames or output.shape[0] != rows // frames * tokens:
            return entry
        return entry.reshape(-1, frames, tokens, channels).transpose(1, 2).reshape(-1, frames, channels)

    def _has_residual(self, output: Any, entry: Any) -> bool:
        """Whether a stream is kept as a residual: not where the range changes its shape in another way than those above."""
        return self.site.residual and _both_tensors(output, entry) and output.shape == entry.shape

    def _signal(
        self, compute: Callable[..., Any], streams: _Streams, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        if self._attention is None:
            beginning, self._beginning = self._beginning, None
            assert beginning is not None
            return beginning if self._source is not None else streams.main(args, kwargs) - beginning
        # Run the block as far as its first attention: the same normalisation and modulation in every family of networks.
        assert self._attention is not None

        def stop(*inner: Any, **named: Any) -> Any:
            raise _ReachedError(first_argument(inner, named))

        restore = replace_forward(self._attention, stop)
        if compat.is_compiled(self.blocks[0]):
            compute = self.blocks[0].forward  # without its graph, which nothing can leave in the middle
        try:
            compute(*args, **kwargs)
        except _ReachedError as reached:
            return reached.hidden_states
        finally:
            restore()
        raise EngineError(
            f"the first block of {self.site.id} never reached its attention: nothing can be measured there"
        )


def _both_tensors(one: Any, other: Any) -> bool:
    return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)


class _Streams:
    """What a block is given and returns of the streams that run through the network."""

    def __init__(self, block: Block, module: nn.Module) -> None:
        self._streams: tuple[str, ...] = block.place.streams
        self._returns: tuple[str, ...] = block.place.returns or block.place.streams
        self._names = argument_names(type(module))
        self._path = block.path
        unknown = [name for name in (*self._streams, *self._returns) if not accepts(type(module), name)]
        if unknown:
            raise AnatomyError(
                f"{block.path}.forward has no argument {unknown[0]!r}, only {', '.join(self._names)}: correct the streams of "
                f"its list, BlockList({block.path.rpartition('.')[0]!r}, …, streams=…), with sostenuto.register_anatomy"
            )

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Each stream that the block is given."""
        return {name: self._argument(name, args, kwargs) for name in self._streams}

    def main(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """The first stream: the sample's."""
        return self._argument(next(iter(self._streams)), args, kwargs)

    def of_sample(self, output: Any) -> torch.Tensor:
        """The first stream of what a block returns."""
        return output if len(self._returns) == 1 else output[self._returns.index(self._streams[0])]

    def handed_on(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What a block that changes nothing returns."""
        streams = [self._argument(name, args, kwargs) for name in self._returns]
        return tuple(streams) if len(streams) > 1 else streams[0]

    def joined(self, first: _Streams, given: dict[str, Any]) -> dict[str, Any]:
        """What the first block of a range was given, joined where this one, the last, has one stream for its several."""
        if len(self._streams) > 1 or len(first._returns) == 1:
            return given
        parts = [
            part for name in first._returns if isinstance(part := given.get(name), torch.Tensor) and part.ndim == 3
        ]
        if len(parts) < len(first._returns) or len({part.shape[2] for part in parts}) > 1:
            return given
        return {next(iter(self._streams)): torch.cat(parts, 1)}

    def each(self, output: Any, entry: Mapping[str, Any], function: Callable[[Any, Any], Any]) -> Any:
        """``function`` of each stream of an output and of what the range was given of it."""
        single = len(self._returns) == 1
        if (
            not isinstance(output, torch.Tensor)
            if single
            else not (isinstance(output, tuple) and len(output) == len(self._returns))
        ):
            raise EngineError(
                f"{self._path} returns {_shape(output)} where its anatomy says {', '.join(self._returns)}: correct streams and "
                "returns of its BlockList with sostenuto.register_anatomy"
            )
        if single:
            return function(output, entry.get(self._returns[0]))
        return tuple(function(part, entry.get(name)) for part, name in zip(output, self._returns, strict=True))

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if name in kwargs:
            return kwargs[name]
        place = self._names.index(name) if name in self._names else len(args)
        return args[place] if place < len(args) else None


def _shape(output: Any) -> str:
    return f"{len(output)} values" if isinstance(output, tuple) else f"a {type(output).__name__}"


class _ReachedError(Exception):
    """Carries what an attention was about to be given out of its block."""

    def __init__(self, hidden_states: torch.Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states


def _first_branch(denoiser: nn.Module, site: Site) -> nn.Module:
    """The first attention of a range, or what holds it."""
    branch = next(branch for branch in inspect(denoiser) if branch.block == site.block)
    paths = [*branch.hollow, branch.id]
    return denoiser.get_submodule(paths[0])
