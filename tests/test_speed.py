"""What makes it fast stays so: one graph, no synchronisation with the host, nothing recompiled."""

import torch

import mose as module
from test_mose import attach, data, learn, snapshot

graphs = torch._dynamo.utils.counters["stats"]


def compiled(mose):
    """The model in one graph, or an error: a value that the host waits for would break it."""
    torch._dynamo.reset()
    graphs.clear()
    return torch.compile(mose.model, backend="eager", fullgraph=True)


def test_twenty_switches_of_task_recompile_nothing():
    names = [f"t{i}" for i in range(20)]
    mose = learn(attach(), *names, steps=1)
    with torch.no_grad():
        switch_and_compare(mose, compiled(mose), names)


def switch_and_compare(mose, model, names):
    for name in names:
        mose.set_task(name)
        assert torch.allclose(model(data("a")).logits, snapshot(mose, name)[0], atol=1e-5)
    assert graphs["unique_graphs"] == 1
    mose.set_task(names[:4])  # control: another kind of state is another graph
    model(data("a"))
    assert graphs["unique_graphs"] == 2


def test_training_is_one_graph_too():
    mose = learn(attach(), "a", end=False)
    model, optimizer = compiled(mose), torch.optim.AdamW(mose.trainable_parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        loss = model(input_ids=data("a"), labels=data("a")).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and graphs["unique_graphs"] == 1


def test_a_block_may_be_compiled_alone():
    """Nothing is handed from one hook to another, so no graph needs what another has made."""
    mose = learn(attach(), *"abc", steps=1)
    expected = snapshot(mose, *"abc")
    torch._dynamo.reset()
    graphs.clear()
    mose.model.model.layers[0].compile(backend="eager", fullgraph=True)
    assert torch.allclose(snapshot(mose, *"abc"), expected, atol=1e-5)
    assert graphs["unique_graphs"] == 1  # for all tasks
    falls = []
    learn(mose, "d", falls=falls)
    assert falls[0] > 0 and graphs["unique_graphs"] == 2  # control: training is another graph
    assert torch.allclose(snapshot(mose, *"abc"), expected, atol=1e-5)


def test_masked_matrices_are_built_once_for_a_task_and_not_for_a_token(monkeypatch):
    calls, matrices = [], module.SubExperts.matrices
    monkeypatch.setattr(module.SubExperts, "matrices", lambda *x: calls.append(1) or matrices(*x))
    mose = learn(attach(), "a")
    calls.clear()
    mose.set_task("a")
    mose.model.generate(data("a"), max_new_tokens=5)
    assert len(calls) == len(mose.layers)
    mose.begin_task("b")
    assert all(layer.in_force == [(None, None)] for layer in mose.layers)  # made in each pass
    mose.model(data("a"))
    mose.model(data("a"))
    assert len(calls) == 3 * len(mose.layers)  # control: an open task's change at every step


def test_the_experts_of_a_layer_cost_two_products_with_its_tokens(monkeypatch):
    """x [A | to_logits], and what comes of it times B: not one product for each expert or gate."""
    mose, sizes = learn(attach(num_experts=8, rank=2), "a"), []

    class Products(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, given=(), kwargs=None):
            if function in (torch.Tensor.matmul, torch.Tensor.__matmul__, torch.matmul):
                sizes.append(tuple(given[1].shape))
            return function(*given, **kwargs or {})

    layer, x = mose.layers[0], torch.randn(2, 3, 32)
    with Products():
        layer.delta(x, layer.in_force[0][1])
        assert sizes == [(32, 8 * 2 + 8), (8 * 2, 32)]
        sizes.clear()
        layer.matrices(*(torch.zeros(len(layer.owner)), layer.routers[1]))
        assert sizes == [(16, 8)]  # control: made once for a task, and seen by what counts here
