"""Gradients as a CUDA graph: the kernels of a step are recorded once, then launched together by one call.

A small network keeps a GPU waiting for Python, which starts a few thousand kernels a step, one by one. Losses and
backward pass are nearly all of them. What differs from step to step stays outside, and is started while the GPU is at
work: what is drawn, whose generators are new each time; and clipping, optimizer and averages, a few kernels that take
the step's rate and decay as numbers.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ddpm.training.task import Drawn, Losses

WARM_UP = 3  # steps before a capture, in which libraries choose their kernels: as many as torch's documentation takes

Gradients = Callable[[Drawn, float], tuple[Tensor, list[Losses]]]
"""(draws, progress) -> the loss, (), and its parts in each micro-batch; writes the gradients."""


class Graph(Protocol):
    """The interface of a graph that records a function and replays it."""

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run a function eagerly, in the place of its later capture."""

    def capture(self, function: Callable[[], None]) -> None:
        """Record a function, with no effect on any existing tensor; raises what the function raises."""

    def replay(self) -> None:
        """Replay the recorded function with the present values of the same tensors."""


class CUDAGraph:
    """A `torch.cuda.CUDAGraph`, with the separate stream that warm-up and capture require.

    The memory between its kernels, such as that of activations, is its own as long as it lives. Dropout differs in each
    replay, and follows `torch.manual_seed` called before it.
    """

    def __init__(self, device: torch.device):
        self.device, self.stream, self.graph = device, torch.cuda.Stream(device), torch.cuda.CUDAGraph()

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run a function eagerly, on the stream of the capture."""
        usual = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(usual)
        with torch.cuda.stream(self.stream):
            function()
        usual.wait_stream(self.stream)

    def capture(self, function: Callable[[], None]) -> None:
        """Record a function without computing anything."""
        generator = torch.cuda.default_generators[self.stream.device_index]
        before = generator.clone_state()
        try:
            # the outer context gives the usual stream back where the inner one breaks while it ends the capture
            with torch.cuda.stream(self.stream), torch.cuda.graph(self.graph, stream=self.stream):
                function()
        except BaseException:
            generator.graphsafe_set_state(before)  # torch leaves it within the capture, where nothing can be drawn
            raise

    def replay(self) -> None:
        """Launch all recorded kernels, on the current stream."""
        self.graph.replay()


def graph_on(device: torch.device) -> Graph | None:
    """Return a graph that can replay steps on a device; None where launching kernels costs no time worth saving."""
    return CUDAGraph(device) if device.type == "cuda" else None


class Replayed:
    """Gradients that are computed eagerly in the first steps, and by replaying a graph from then on.

    The first steps are the warm-up, and count like any other. A capture computes nothing: where it fails nothing has
    changed, and the step is taken without it, as are all that follow.

    Args:
        gradients: a function of the draws, and of tensors that are changed in place, alone.
        graph: None for eager gradients, always.
    """

    def __init__(self, gradients: Gradients, graph: Graph | None):
        self.gradients, self.graph = gradients, graph
        self.eager: str | None = None  # why the graph was given up
        self.steps = 0
        self.read: Drawn | None = None  # the graph's inputs, and its outputs: the same tensors in each replay
        self.written: tuple[Tensor, list[Losses]]

    def __call__(self, drawn: Drawn, progress: float) -> tuple[Tensor, list[Losses]]:
        """Return what `gradients` returns."""
        self.steps += 1
        if self.graph is not None and self.steps <= WARM_UP:
            self.graph.warm_up(lambda: self._write(drawn, progress))
            return self.written
        if self.graph is not None and self.read is None:
            self._capture(self.graph, drawn, progress)
        if self.graph is None or self.read is None:
            return self.gradients(drawn, progress)
        for static, new in zip(self.read.tensors(), drawn.tensors(), strict=True):
            static.copy_(new)
        self.graph.replay()
        return tree_map(torch.clone, self.written)  # as they are also read some steps later

    def _write(self, drawn: Drawn, progress: float) -> None:
        self.written = self.gradients(drawn, progress)

    def _capture(self, graph: Graph, drawn: Drawn, progress: float) -> None:
        """Record the gradients on static copies of the inputs; on failure give the graph up."""
        read = drawn.rows(torch.clone)
        try:
            graph.capture(lambda: self._write(read, progress))
        except Exception as error:  # a tensor's value read, too little memory: torch has many classes for it
            first: BaseException = error
            while first.__context__ is not None:  # ending a capture that is broken is an error more
                first = first.__context__
            self.graph, self.eager = None, (str(first).strip() or type(first).__name__).splitlines()[0]
        else:
            self.read = read
