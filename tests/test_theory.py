"""theory/moe_theory.py: closed forms, gate gradient, stopping rule, expert update, bad parameters.

Every claim has a control: the same check with the ingredient taken away, which must fail.
"""
import json
import math
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from theory import moe_theory as theory
from theory.moe_theory import Params

ROOT = Path(__file__).resolve().parent.parent


def errors_off(difference):
    """How many standard errors the mean over seeds is away from 0."""
    return abs(difference.mean()) / (difference.std(ddof=1) / len(difference)**0.5)


# ---------------------------------------------------------------- closed forms against simulation

@pytest.mark.parametrize("d, s", [(6, 2), (10, 6), (10, 9)])
@pytest.mark.parametrize("N, K", [(2, 2), (6, 3)])
@pytest.mark.parametrize("T", [2, 7, 25])
def test_one_expert_follows_the_closed_forms(T, N, K, d, s):
    # 36 numbers at 3 standard errors: about one seed in ten would trip, so it is fixed.
    p = Params(experts=1, rounds=T, tasks=N, clusters=K, dim=d, samples=s, beta=0, seeds=5000,
               seed=1)
    run = theory.simulate(p)
    F, G = theory.closed_form(p, run.pool)
    assert errors_off(run.forgetting[-1] - F) < 3
    assert errors_off(run.error[-1] - G) < 3
    # Control: without the residual terms both are far off (at T = 2 forgetting has no such term).
    F, G = theory.closed_form(p, run.pool, residual=False)
    assert errors_off(run.forgetting[-1] - F) > 10 or T == 2
    assert errors_off(run.error[-1] - G) > 10


def test_the_closed_forms_are_the_mean_over_all_orders_of_tasks():
    for T, N in ((2, 3), (5, 2), (5, 3)):
        p = Params(experts=1, rounds=T, tasks=N, clusters=N, seeds=2)
        pool = theory.draw_pool(p, np.random.default_rng(0))
        orders = [np.array([order, order]).T for order in product(range(N), repeat=T)]    # (T, 2)
        every = [theory.expected_given_routing(p, pool, order, 0 * order) for order in orders]
        assert np.allclose(np.mean(every, 0), theory.closed_form(p, pool), rtol=1e-12)
        assert not np.allclose(np.mean(every[1:], 0), theory.closed_form(p, pool))      # control
        assert not np.allclose(np.mean(every, 0)[1], theory.closed_form(p, pool, False)[1])


def test_the_signal_column_breaks_the_closed_form():
    for beta, holds in ((0, True), (2, False)):
        p = Params(experts=1, rounds=40, samples=2, seeds=2000, beta=beta, seed=3)
        run = theory.simulate(p)
        off = errors_off(run.forgetting[-1] - theory.closed_form(p, run.pool)[0])
        assert (off < 3) == holds


def test_many_experts_follow_the_form_given_the_routing():
    # A gate that stays at zero chooses by its noise alone, so the choice does not look at X.
    p = Params(experts=4, rounds=40, seeds=3000, beta=0, stop_at=0, seed=2)
    run = theory.simulate(p)
    F, G = theory.expected_given_routing(p, run.pool, run.tasks, run.choices)
    assert errors_off(run.forgetting[-1] - F) < 3
    assert errors_off(run.error[-1] - G) < 3
    # Control: as if one expert had done all the rounds.
    F, G = theory.expected_given_routing(p, run.pool, run.tasks, 0 * run.choices)
    assert errors_off(run.forgetting[-1] - F) > 3
    assert errors_off(run.error[-1] - G) > 3


def test_the_form_given_the_routing_is_the_sum_over_visits():
    p = Params(experts=3, rounds=15, seeds=2, seed=4)
    pool = theory.draw_pool(p, np.random.default_rng(0))
    tasks, choices = np.random.default_rng(1).integers(0, 3, (2, p.rounds, p.seeds))
    F, G = theory.expected_given_routing(p, pool, tasks, choices)
    r = 1 - p.samples / p.dim

    def expected(b, expert, task, t):
        """r^L |w|^2 + (1 - r) sum_j r^(L-j) |w_nj - w|^2 over the visits of the expert up to t."""
        w, visits = pool.w[b], [tasks[u, b] for u in range(t) if choices[u, b] == expert]
        L = len(visits)
        return r**L * (w[task]**2).sum() + (1 - r) * sum(
            r**(L - j) * ((w[n] - w[task])**2).sum() for j, n in enumerate(visits, 1))

    for b in range(p.seeds):
        end = [expected(b, choices[u, b], tasks[u, b], p.rounds) for u in range(p.rounds)]
        then = [expected(b, choices[u, b], tasks[u, b], u + 1) for u in range(p.rounds)]
        assert np.isclose(G[b], np.mean(end))
        assert np.isclose(F[b], np.subtract(end, then).sum() / (p.rounds - 1))


# ----------------------------------------------------------------------------------- expert update

def test_the_expert_fits_the_round_and_moves_least():
    rng = np.random.default_rng(0)
    X, w, y = (rng.standard_normal(shape) for shape in ((5, 8, 3), (5, 8), (5, 3)))
    new = theory.fit_nearest(w, X, y)
    for b in range(5):
        assert np.allclose(X[b].T @ new[b], y[b])
        assert not np.allclose(X[b].T @ w[b], y[b])                      # control: before
        least = np.linalg.lstsq(X[b].T, y[b] - X[b].T @ w[b], rcond=None)[0]
        assert np.allclose(new[b] - w[b], least)
        # Control: another point that fits the round as well, but is farther away.
        free = np.linalg.svd(X[b].T)[2][-1]
        assert np.allclose(X[b].T @ (new[b] + free), y[b])
        assert np.linalg.norm(new[b] + free - w[b]) > np.linalg.norm(new[b] - w[b])


# ----------------------------------------------------------------------------------- gate gradient

def losses(p, theta, x, m, drift, load, past, t):
    """Locality and load balance loss of one seed, as written down; past: t * P before t."""
    pi = torch.softmax(theta @ x, 0)                                                      # (M,)
    moved = torch.zeros(p.experts, dtype=torch.float64)
    moved[m] = drift
    chosen = torch.zeros(p.experts, dtype=torch.float64)
    chosen[m] = 1
    P = (past + pi * chosen) / t
    return (pi * moved).sum(), p.balance * p.experts * (load * P).sum()


def test_the_gate_gradient_is_the_one_of_autograd():
    p, t, rng = Params(experts=4, balance=0.7), 5, np.random.default_rng(0)
    theta, x = rng.standard_normal((3, 4, 6)), rng.standard_normal((3, 6))
    load, past, drift = rng.dirichlet(np.ones(4), 3), rng.uniform(size=(3, 4)), rng.uniform(size=3)
    chosen = np.array([0, 3, 1])
    scores = np.einsum("bmd,bd->bm", theta, x)
    ours = theory.gate_gradients(p, scores, chosen, drift, load[np.arange(3), chosen], t)
    for b in range(3):
        for i, mine in enumerate(ours):
            leaf = torch.tensor(theta[b], requires_grad=True)
            loss = losses(p, leaf, torch.tensor(x[b]), chosen[b], drift[b], torch.tensor(load[b]),
                          torch.tensor(past[b]), t)[i]
            grad, = torch.autograd.grad(loss, leaf)
            assert np.allclose(mine[b][:, None] * x[b], grad.numpy())
            assert not np.allclose(ours[1 - i][b][:, None] * x[b], grad.numpy())    # control


# ----------------------------------------------------------------------------------- stopping rule

def settled(p, scores, t, chosen=0):
    flags = np.zeros((1, p.experts), bool)
    theory.update_flags(p, flags, np.array([scores]), np.array([chosen]), t)
    return flags[0].tolist()


def test_no_expert_settles_before_the_exploration_ends():
    p = Params(experts=3, lr=0.4, gap=0.1)                               # T1 = ceil(7.5) = 8
    assert settled(p, [1.0, 0.0, 0.0], t=8) == [False, False, False]
    assert settled(p, [1.0, 0.0, 0.0], t=9) == [True, False, False]      # control


def test_an_expert_settles_only_by_a_lead_over_all_others():
    p = Params(experts=3, gap=0.1)
    assert settled(p, [1.0, 0.5, 0.95], t=100) == [False, False, False]
    assert settled(replace(p, gap=0.04), [1.0, 0.5, 0.95], t=100) == [True, False, False]  # control
    assert settled(p, [1.0, 0.5, 1.5], t=100) == [False, False, False]   # chosen by noise, behind
    assert settled(p, [1.0, 0.5, 1.5], t=100, chosen=2) == [False, False, True]


def test_a_settled_expert_stays_settled():
    p, flags = Params(experts=2, gap=0.1), np.array([[True, False]])
    theory.update_flags(p, flags, np.zeros((1, 2)), np.array([0]), 100)
    assert flags.tolist() == [[True, False]]


def test_the_gate_stops_in_the_round_in_which_the_last_expert_settles():
    p = Params(rounds=150, seeds=20)
    run, flags, stop = theory.simulate(p), np.zeros((20, 5), bool), np.full(20, 151)
    # Replay: the gate at the start of round t is what a run of t - 1 rounds leaves behind.
    data = np.random.default_rng([0, 0])
    theory.draw_pool(p, data)
    for t in range(1, 61):
        gate = theory.simulate(replace(p, rounds=t - 1)).gate if t > 2 else None
        x = theory.draw_round(p, run.pool, data)[1].sum(2)
        if gate is not None:
            theory.update_flags(p, flags, np.einsum("bmd,bd->bm", gate, x), run.choices[t - 1], t)
        stop[flags.all(1) & (stop > 150)] = t
    early = run.stop_round <= 60
    assert early.sum() >= 10 and (run.stop_round > 11).all()          # T1 = 10, then five winners
    assert (stop[early] == run.stop_round[early]).all()


def test_after_the_stop_the_gate_does_not_move():
    short = theory.simulate(Params(rounds=100, seeds=20))
    stopped = short.stop_round <= 100
    assert stopped.sum() >= 15
    gate = {key: theory.simulate(Params(rounds=200, seeds=20, **change)).gate for key, change in (
        ("stopped", {}), ("locality", dict(keep_locality=True)),
        ("balance", dict(keep_balance=True)))}
    assert (gate["stopped"][stopped] == short.gate[stopped]).all()       # bit for bit
    for key in ("locality", "balance"):                                  # controls: one goes on
        assert (gate[key][stopped] != short.gate[stopped]).any((1, 2)).all()


def test_a_stop_by_hand_counts_the_rounds_of_learning():
    ten = theory.simulate(Params(rounds=10, seeds=3)).gate               # too short for the rule
    assert (theory.simulate(Params(rounds=40, seeds=3, stop_at=10)).gate == ten).all()
    assert (theory.simulate(Params(rounds=40, seeds=3, stop_at=11)).gate != ten).any()   # control
    assert not theory.simulate(Params(rounds=40, seeds=3, stop_at=0)).gate.any()


# ------------------------------------------------------------------------------------ the whole run

def test_a_slow_loop_gives_the_same_run():
    """One seed at a time, autograd for the gate, least squares for the experts, F and G by name."""
    p = Params(experts=3, rounds=25, seeds=2, noise=0.05, gap=0.05, keep_balance=True, gate_std=0.2)
    run = theory.simulate(p)
    for b in range(p.seeds):
        data, own = np.random.default_rng([0, 0]), np.random.default_rng([0, 1])
        pool = theory.draw_pool(p, data)
        theta = p.gate_std * own.standard_normal((p.seeds, 3, p.dim))[b]
        w, history, settled_set, past = np.zeros((3, p.dim)), [], set(), torch.zeros(3)
        for t in range(1, p.rounds + 1):
            task, X = (array[b] for array in theory.draw_round(p, pool, data))
            noise, x = p.noise * own.uniform(size=(p.seeds, 3))[b], X.sum(1)
            m = max(range(3), key=lambda j: theta[j] @ x + noise[j])
            target, old = pool.w[b, task], w[m].copy()
            w[m] += np.linalg.lstsq(X.T, X.T @ (target - old), rcond=None)[0]
            history.append((task, m, ((w[m] - target)**2).sum(), ((old - target)**2).sum()))
            if t > math.ceil(p.experts / p.lr):
                if theta[m] @ x - max(theta[j] @ x for j in range(3) if j != m) >= p.gap:
                    settled_set.add(m)
            leaf = torch.tensor(theta, requires_grad=True)
            load = torch.tensor([sum(row[1] == j for row in history) / t for j in range(3)])
            drift = np.linalg.norm(w[m] - old)
            locality, balance = losses(p, leaf, torch.tensor(x), m, drift, load, past, t)
            going = len(settled_set) < 3
            (locality * going + balance).backward()          # keep_balance: only locality stops
            past[m] += torch.softmax(torch.tensor(theta @ x), 0)[m].float()
            theta = theta - p.lr * leaf.grad.numpy()
        end = [((w[m] - pool.w[b, n])**2).sum() for n, m, _, _ in history]
        assert [row[1] for row in history] == run.choices[:, b].tolist()
        assert np.allclose(theta, run.gate[b])
        assert np.allclose([row[3] for row in history], run.arrival[:, b])
        assert np.isclose(np.mean(end), run.error[-1, b])
        assert np.isclose(sum(e - row[2] for e, row in zip(end, history)) / (p.rounds - 1),
                          run.forgetting[-1, b])


def test_all_gates_meet_the_same_tasks_and_data():
    a, b = (theory.simulate(Params(rounds=30, seeds=4, experts=M, gate_std=std))
            for M, std in ((2, 0.0), (7, 0.3)))
    assert (a.tasks == b.tasks).all() and (a.pool.w == b.pool.w).all()
    other = theory.simulate(Params(rounds=30, seeds=4, experts=2, seed=1))
    assert (a.tasks != other.tasks).any()                                # control: another seed


def test_a_stopped_gate_specializes_and_a_learning_one_is_at_chance():
    never = dict(keep_locality=True, keep_balance=True)
    share = []
    for change in ({}, never):
        run = theory.simulate(Params(rounds=600, seeds=20, **change))
        share.append(theory.specialization(run.pool.cluster, run.tasks[-400:], run.choices[-400:]))
    assert share[0].mean() > 0.5 and abs(share[1].mean() - 1 / 3) < 0.04


def test_specialization_is_chance_for_a_blind_router_and_one_for_an_oracle():
    rng, cluster = np.random.default_rng(0), np.arange(6) % 3
    tasks = rng.integers(0, 6, (500, 50))
    blind = theory.specialization(cluster, tasks, rng.integers(0, 20, (500, 50)))
    assert abs(blind.mean() - 1 / 3) < 0.01
    assert (theory.specialization(cluster, tasks, tasks) == 1).all()
    moved = np.where(np.arange(500)[:, None] < 250, tasks, tasks + 6)    # fresh experts halfway
    assert (theory.specialization(cluster, tasks, moved) == 0).all()


# ---------------------------------------------------------------------------------- bad parameters

@pytest.mark.parametrize("bad, edge", [
    (dict(samples=10), dict(samples=9)), (dict(samples=0), dict(samples=1)),
    (dict(samples=10, dim=8), dict(samples=7, dim=8)), (dict(experts=0), dict(experts=1)),
    (dict(rounds=1), dict(rounds=2)), (dict(noise=-0.01), dict(noise=0)),
    (dict(noise=math.nan), dict(noise=0.3)), (dict(gap=-1), dict(gap=0)), (dict(lr=0), dict(lr=1)),
    (dict(tasks=11), dict(tasks=10)), (dict(clusters=0), dict(clusters=1)),
    (dict(tasks=2), dict(tasks=3)), (dict(seeds=1), dict(seeds=2)),
    (dict(sample_std=0), dict(sample_std=1)), (dict(balance=-1), dict(balance=0)),
    (dict(beta=-1), dict(beta=0)), (dict(spread=-1), dict(spread=0)),
    (dict(gate_std=-1), dict(gate_std=0)), (dict(stop_at=-1), dict(stop_at=None))])
def test_a_bad_parameter_is_named_with_what_was_expected(bad, edge):
    field, got = next(iter(bad.items()))
    with pytest.raises(ValueError, match=rf"^{field}: got {got}, expected .+; .+"):
        Params(**bad)
    Params(**edge)                                                       # control: a legal one


# ------------------------------------------------------------------------------ the numbers we show

def readme_rows(result):
    """The rows of the smaller tables in theory/README.md, from the stored results."""
    def cell(key, M, kind="stopped", change=()):
        seeds = result["runs"][theory.name(M, kind, change)]["per_seed"]
        return "{:.2f} +-{:.2f}".format(*theory.mean_band(seeds[key]))

    def less(M, stopped, random):
        a, b = (result["runs"][theory.name(M, *run)]["per_seed"]["A"] for run in (
            ("stopped", stopped), ("random", random)))
        return "{:+.2f} +-{:.2f}".format(*theory.mean_band(np.subtract(a, b)))

    rows = dict(STOPS=[], NOISES=[], SETTINGS=[], CLOSED=[])
    for stop in theory.STOPS:
        change = dict(stop_at=stop)
        rows["STOPS"].append((stop, *(cell("A", M, change=change) for M in (5, 10, 20))))
    for x in theory.NOISES:
        rows["NOISES"].append((x, *(cell("F", M, change=change) for M in (5, 20) for change in (
            dict(noise=x), dict(noise=x, gap=x)))))
    settings = {"eta = 0.1": (dict(lr=0.1), {}), "eta = 1": (dict(lr=1.0), {})}
    for std in (0.02, 0.1):
        settings[f"std of the columns without signal: {std}"] = 2 * (dict(sample_std=std),)
    settings["signals that show the task"] = 2 * (dict(aligned=True),)
    for size in theory.SIZES:
        settings[f"a smaller random gate, {size}"] = {}, dict(gate_std=size)
    for text, gates in settings.items():
        rows["SETTINGS"].append((text, less(5, *gates), less(20, *gates)))
    for s, i in product((2, 6, 8), (1, 3, 5)):
        closed = result["closed"][f"0.0 {s}"]
        numbers = ["{:.3f} +-{:.3f}|{:.3f}|{:.3f}".format(*closed[key][i][:4]) for key in "FG"]
        rows["CLOSED"].append((f"{s}, {closed['horizons'][i]}", *"|".join(numbers).split("|")))
    return {key: ["| " + " | ".join(map(str, row)) + " |" for row in table]
            for key, table in rows.items()}


def test_the_readme_shows_the_stored_results(capsys):
    result = json.loads((ROOT / "results" / "theory_moe.json").read_text())
    readme = (ROOT / "theory" / "README.md").read_text()
    assert set(result["runs"]) == set(theory.plan())
    theory.print_table(result["runs"])
    table = capsys.readouterr().out.splitlines()
    assert len(table) > 20 and max(map(len, table)) <= 100
    for line in table + sum(readme_rows(result).values(), []):
        assert line.rstrip() in readme


def test_who_was_chosen_when_predicts_forgetting_and_error():
    """What the README says: mean error within 5 %, forgetting within 10 %, half of the runs within
    1 % and 3 %. Where signals show the task, it is further off."""
    off = {False: [], True: []}
    for run in json.loads((ROOT / "results" / "theory_moe.json").read_text())["runs"].values():
        seeds = run["per_seed"]
        predicted = np.mean(seeds["FG_routing"], 1)
        measured = np.mean([seeds["F"], seeds["G"]], 1)
        off[run["params"]["aligned"]].append(abs(predicted / measured - 1))
    assert (np.max(off[False], 0) < [0.10, 0.05]).all()
    assert (np.median(off[False], 0) < [0.03, 0.01]).all()
    assert np.max(off[True]) > 0.3                                       # control


def test_a_random_gate_that_holds_still_specializes_as_well():
    random = theory.simulate(Params(rounds=600, seeds=20, **theory.KINDS["random"]))
    share = theory.specialization(random.pool.cluster, random.tasks[-400:], random.choices[-400:])
    assert share.mean() > 0.5


def test_aligned_signals_show_the_cluster():
    for aligned in (False, True):
        pool = theory.draw_pool(Params(seeds=50, aligned=aligned), np.random.default_rng(0))
        similar = np.einsum("snd,smd->snm", pool.v, pool.v).mean(0)      # (N, N)
        assert (similar[0, 3] > 0.5) == aligned                          # one cluster
        assert np.allclose(similar.diagonal(), 1) and abs(similar[0, 1]) < 0.3


def test_the_links_of_the_readme_resolve():
    text = (ROOT / "theory" / "README.md").read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert len(links) > 10
    assert all((ROOT / "theory" / link).exists() for link in links)
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert anchor in [re.sub(r"[^a-z -]", "", line.lower()).strip().replace(" ", "-")
                          for line in text.splitlines() if line.startswith("#")]
