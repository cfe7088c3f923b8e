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


def test_masked_matrices_are_built_once_for_a_task_and_not_for_a_token(monkeypatch):
    calls, unpack = [], module.SubExperts.unpack
    monkeypatch.setattr(module.SubExperts, "unpack", lambda *x: calls.append(1) or unpack(*x))
    mose = learn(attach(), "a")
    calls.clear()
    mose.set_task("a")
    mose.model.generate(data("a"), max_new_tokens=5)
    assert len(calls) == len(mose.layers)
    mose.begin_task("b")
    assert not any(layer.in_force for layer in mose.layers)  # dropped when training
    mose.model(data("a"))
    assert len(calls) > len(mose.layers)  # control: an open task's change at every step
