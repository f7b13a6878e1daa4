"""Which steps are recorded, and what a replay reads and leaves; with a graph that needs no GPU.

Real ones are in `test_gpu`.
"""

from contextlib import contextmanager

import pytest
import torch

from raptor_hf.loop import StepResult, fit
from raptor_hf.loop.graphs import StepGraphs
from tests.helpers import arguments, compute_loss, noisy_network


class Graph:
    """Replays a function of what ran while it was recorded, from and into the same tensors."""

    now = None

    def replay(self):
        self.again()


@pytest.fixture
def made(monkeypatch):
    made = []

    @contextmanager
    def recording(graph, *, pool, capture_error_mode):
        made.append((graph, pool, capture_error_mode))
        Graph.now = graph
        yield
        Graph.now = None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    return made


def test_a_kind_is_recorded_once_it_is_warm_and_replayed_on_other_batches(made):
    weight = torch.nn.Parameter(torch.zeros(2))

    def backward(batch, progress):
        gradient, loss = batch["x"].mean(0) * progress, batch["x"].sum()

        def again():
            gradient.copy_(batch["x"].mean(0) * progress)
            loss.copy_(batch["x"].sum())

        if Graph.now:
            Graph.now.again = again
        weight.grad = gradient
        return StepResult(loss)

    graphs = StepGraphs(backward, lambda progress: progress, [weight])
    generator = torch.Generator().manual_seed(0)

    def check(progress, images=4):
        batch = {"x": torch.randn(images, 2, generator=generator)}
        weight.grad = None
        loss = graphs(batch, progress).loss
        torch.testing.assert_close(loss, batch["x"].sum())
        torch.testing.assert_close(weight.grad, batch["x"].mean(0) * progress)
        return len(made)

    assert [check(1) for _ in range(6)] == [0, 0, 0, 1, 1, 1]
    assert [check(2) for _ in range(5)] == [1, 1, 1, 2, 2]  # another kind
    assert check(1) == 2
    assert [check(1, images=3) for _ in range(4)] == [2, 2, 2, 3]  # another shape
    assert {(pool, mode) for _, pool, mode in made} == {("pool", "thread_local")}


def test_on_a_cpu_nothing_is_recorded(data, tmp_path, made):
    settings = arguments(tmp_path, cuda_graphs=True)
    fit(noisy_network(), data, compute_loss, settings, kind=lambda _: "always")
    assert not made
