"""Gradients as a CUDA graph: the kernels of a step are recorded once, and then all started by one call.

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
"""What was drawn, and the progress -> the loss, (), and its parts in each micro-batch; leaves gradients behind."""


class Graph(Protocol):
    """Records what a function does, to do it again."""

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run a function as it is, where its capture will be."""

    def capture(self, function: Callable[[], None]) -> None:
        """Record a function, with no effect on any tensor that was there before; raises what it raises."""

    def replay(self) -> None:
        """Do what was recorded, with what the same tensors hold now."""


class CUDAGraph:
    """A `torch.cuda.CUDAGraph`, with the stream beside the usual one on which warm-up and capture have to be.

    The memory between its kernels, such as that of activations, is its own as long as it lives. Dropout differs in each
    replay: it is what `torch.manual_seed` before it says.
    """

    def __init__(self, device: torch.device):
        self.device, self.stream, self.graph = device, torch.cuda.Stream(device), torch.cuda.CUDAGraph()

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run a function as it is, on the stream of the capture."""
        usual = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(usual)
        with torch.cuda.stream(self.stream):
            function()
        usual.wait_stream(self.stream)

    def capture(self, function: Callable[[], None]) -> None:
        """Record a function: nothing is computed."""
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
        """Start all kernels, on the usual stream."""
        self.graph.replay()


def graph_on(device: torch.device) -> Graph | None:
    """The graph that can replay steps on a device; None where the start of kernels takes no time worth saving."""
    return CUDAGraph(device) if device.type == "cuda" else None


class Replayed:
    """Gradients, computed as they are in the first steps, and from then on by the replay of a graph.

    The first steps are the warm-up, and count like any other. A capture computes nothing: where it fails nothing has
    changed, and the step is taken without it, as are all that follow.

    Args:
        gradients: depends on what was drawn, and on tensors that are changed in place, alone.
        graph: None for gradients as they are, always.
    """

    def __init__(self, gradients: Gradients, graph: Graph | None):
        self.gradients, self.graph = gradients, graph
        self.eager: str | None = None  # why the graph was given up
        self.steps = 0
        self.read: Drawn | None = None  # what the graph reads, and what it writes: the same tensors in each replay
        self.written: tuple[Tensor, list[Losses]]

    def __call__(self, drawn: Drawn, progress: float) -> tuple[Tensor, list[Losses]]:
        """As `gradients`."""
        self.steps += 1
        if self.graph is not None and self.steps <= WARM_UP:
            self.graph.warm_up(lambda: self._write(drawn, progress))
            return self.written
        if self.graph is not None and self.read is None:
            self._capture(self.graph, drawn, progress)
        if self.graph is None or self.read is None:
            return self.gradients(drawn, progress)
        for held, new in zip(self.read.tensors(), drawn.tensors(), strict=True):
            held.copy_(new)
        self.graph.replay()
        return tree_map(torch.clone, self.written)  # which are looked at some steps later, too

    def _write(self, drawn: Drawn, progress: float) -> None:
        self.written = self.gradients(drawn, progress)

    def _capture(self, graph: Graph, drawn: Drawn, progress: float) -> None:
        """Record the gradients of tensors into which each step's are copied; where that fails give the graph up."""
        read = drawn.rows(torch.clone)
        try:
            graph.capture(lambda: self._write(read, progress))
        except Exception as error:  # a look at a value, too little memory: torch has many classes for it
            first: BaseException = error
            while first.__context__ is not None:  # ending a capture that is broken is an error more
                first = first.__context__
            self.graph, self.eager = None, (str(first).strip() or type(first).__name__).splitlines()[0]
        else:
            self.read = read
