"""Why does a mixture of experts forget less, and why must its router stop?  A small simulation.

Unofficial reproduction of the linear model in "Theory on Mixture-of-Experts in Continual Learning"
(Li, Lin, Duan, Liang, Shroff; arXiv 2406.16437).  Every line runs over all seeds at once.

In round t one of N tasks w_n comes back and shows s < d examples; M linear experts share the work:

    data        X = [beta v_n, x_2, ..., x_s],  y = X^T w_n     v_n: the task's feature signal
    gate        h_m = theta_m . (sum of the columns of X),  pi = softmax(h)
    choice      m = argmax_j (h_j + noise_j),  noise_j ~ Uniform[0, lambda]
    expert      w_m <- w_m + X (X^T X)^-1 (y - X^T w_m)         nearest point that fits the round
    gate loss   sum_m pi_m |dw_m|  +  alpha M sum_m f_m P_m     locality + load balance
    stop        after T1 = M/eta rounds, once every expert has won one round by Gamma or more

    forgetting  F_T = 1/(T-1) sum_{t<T} ( |w_T^(m_t) - w_(n_t)|^2 - |w_t^(m_t) - w_(n_t)|^2 )
    error       G_T = 1/T     sum_{t<=T}  |w_T^(m_t) - w_(n_t)|^2
    arrival     A   = |w_(t-1)^(m_t) - w_(n_t)|^2, before the update: is the routing right now?

One expert, isotropic columns, r = 1 - s/d, W = mean |w_n|^2, D = mean over all pairs |w_n - w_m|^2:

    e_u    = r^u W + (r - r^u) D                                error on the task of round u, at u
    E[F_T] = 1/(T-1) sum_{u<T} (1 - r^(T-u)) (D - e_u)
    E[G_T] = r^T W + (1 - r^T) (1 - 1/T) D

symbol -> variable: w_n pool.w, v_n pool.v, w_m experts, theta gate, h scores, m chosen, |dw| drift,
f load, lambda noise, alpha balance, eta lr, Gamma gap.

    python -m theory.moe_theory      # all runs, table, results/theory_moe.json and four figures
    python -m pytest tests/test_theory.py -q
"""
import json
import platform
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import PowerNorm
from tqdm import tqdm

RESULTS = Path(__file__).resolve().parent.parent / "results"

# Shapes: S seeds, M experts, N tasks, K clusters, d weights, s examples of a round, T rounds.


@dataclass
class Params:
    experts: int = 5             # M, >= 1
    tasks: int = 6               # N, clusters..dim (the signals v_n are orthogonal, or aligned)
    clusters: int = 3            # K, >= 1; the tasks of a cluster are close to each other
    rounds: int = 2000           # T, >= 2
    dim: int = 10                # d
    samples: int = 6             # s, 1..dim-1: a round never determines its task
    seeds: int = 50              # S, >= 2, for the band; one seed = one task pool and one stream
    spread: float = 0.3          # >= 0, distance of a task from its cluster's centre (itself at ~1)
    sample_std: float = 0.05     # > 0, std of the columns that carry no signal
    beta: float = 2.0            # >= 0, signal: beta_t ~ Uniform[beta / 2, beta]; 0: no such column
    aligned: bool = False        # do the signals show the tasks, v_n = w_n / |w_n|?
    lr: float = 0.5              # eta > 0, step of the gate
    balance: float = 0.5         # alpha >= 0
    noise: float = 0.01          # lambda >= 0
    gap: float = 0.01            # Gamma >= 0
    gate_std: float = 0.0        # >= 0, std of the first theta; 0: all experts start equal
    stop_at: int | None = None   # None: the stopping rule; else the gate learns for stop_at rounds
    keep_locality: bool = False  # does the locality loss move the gate after the stop as well?
    keep_balance: bool = False   # and the load balance loss?  both: the gate never stops
    seed: int = 0

    def __post_init__(self):
        for fields, low, high, advice in (
                ("experts clusters", 1, np.inf, "use 1 for a single one"),
                ("rounds seeds", 2, np.inf, "forgetting and bands need two"),
                ("samples", 1, self.dim - 1, "with s >= d one round fixes its task: raise dim"),
                ("tasks", self.clusters, self.dim, "each cluster has a task, each task an axis"),
                ("sample_std lr", 1e-9, np.inf, "use a positive number"),
                ("spread beta balance noise gap gate_std", 0, np.inf, "0 switches it off"),
                ("stop_at", 0, np.inf, "with 0 the gate never learns")):
            for field in fields.split():
                got = getattr(self, field)
                if got is not None and not low <= got <= high:
                    raise ValueError(f"{field}: got {got}, expected {low} to {high}; {advice}")


# ------------------------------------------------------------------------------- the set-up

# CHOICE: the scale of everything below (|w_n| ~ 1, beta in [1, 2], small columns without signal).
# The gate sees lambda only relative to its scores, so the noise is swept rather than justified.

def draw_pool(p, rng):
    """The tasks, their feature signals and their clusters."""
    cluster = np.arange(p.tasks) % p.clusters                                         # (N,)
    centre = rng.standard_normal((p.seeds, p.clusters, p.dim))[:, cluster]            # (S, N, d)
    w = (centre + p.spread * rng.standard_normal(centre.shape)) / p.dim**0.5          # (S, N, d)
    # CHOICE: orthogonal signals without relation to w, so that only learning can join a cluster.
    v = np.linalg.qr(rng.standard_normal((p.seeds, p.dim, p.dim)))[0][:, :p.tasks]    # (S, N, d)
    if p.aligned:  # tasks of one cluster have similar signals, so any gate can join them
        v = w / np.linalg.norm(w, axis=-1, keepdims=True)
    return SimpleNamespace(w=w, v=v, cluster=cluster)


def draw_round(p, pool, rng):
    """Which task comes in each seed, and its examples.  y = X^T w_n follows from them."""
    task = rng.integers(0, p.tasks, p.seeds)                                          # (S,)
    X = p.sample_std * rng.standard_normal((p.seeds, p.dim, p.samples))               # (S, d, s)
    if p.beta:  # which column carries the signal does not matter: nothing reads their order
        X[:, :, 0] = p.beta * rng.uniform(0.5, 1, (p.seeds, 1)) * pool.v[np.arange(p.seeds), task]
    return task, X


def fit_nearest(w, X, y):
    """The point with X^T w = y that is nearest to w: the least change that fits the round."""
    Xt, residual = X.transpose(0, 2, 1), y - np.einsum("bds,bd->bs", X, w)            # (S, s, d)
    return w + (X @ np.linalg.solve(Xt @ X, residual[:, :, None]))[:, :, 0]           # (S, d)


def gate_gradients(p, scores, chosen, drift, load, t):
    """d(locality loss)/dh and d(load balance loss)/dh, each (S, M); times x it is d/d(theta).

    Only the chosen expert moves, so sum_m pi_m |dw_m| = pi_chosen * drift.  load: f of the chosen.
    """
    # CHOICE: f_m = share of rounds that chose m so far, P_m = 1/t sum_u pi_m(u) [m chosen at u].
    # Only round t of P_m depends on the theta of now, so the pull of the load balance loss fades as
    # 1/t.  The pull of the locality loss does not fade: it lasts as long as an expert moves.
    picked = np.arange(len(chosen)), chosen
    pi = np.exp(scores - scores.max(1, keepdims=True))
    pi /= pi.sum(1, keepdims=True)                                                    # (S, M)
    slope = -pi * pi[picked][:, None]                     # d pi_chosen / d h_m         (S, M)
    slope[picked] += pi[picked]
    return drift[:, None] * slope, (p.balance * p.experts * load / t)[:, None] * slope


def update_flags(p, flags, scores, chosen, t):
    """Stopping rule: expert m is settled once it won a round after T1 = M/eta by Gamma or more.

    The gate of a seed stops when all its experts are settled.  The flags (S, M) change in place.
    """
    # CHOICE: the lead is over the best other expert and without the noise, so that with
    # Gamma >= lambda no draw of the noise could have turned that round.
    picked, others = (np.arange(len(chosen)), chosen), scores.copy()                  # (S, M)
    others[picked] = -np.inf
    if t > np.ceil(p.experts / p.lr):
        flags[picked] |= scores[picked] - others.max(1) >= p.gap


def simulate(p):
    """All rounds in all seeds; returns the whole history."""
    S, M, T, rows = p.seeds, p.experts, p.rounds, np.arange(p.seeds)
    # Two streams: whatever the gate does, a seed meets the same tasks and data (paired comparison).
    data, own = np.random.default_rng([p.seed, 0]), np.random.default_rng([p.seed, 1])
    pool = draw_pool(p, data)
    gate = p.gate_std * own.standard_normal((S, M, p.dim))                            # (S, M, d)
    experts, visits = np.zeros((S, M, p.dim)), np.zeros((S, M, p.tasks))
    flags, stop_round = np.zeros((S, M), bool), np.full(S, T + 1)  # first round without learning
    tasks, choices, arrival = (np.zeros((T, S), kind) for kind in (int, int, float))
    # just_after: the sum of |w_t^(m_t) - w_(n_t)|^2 so far; curves: (F_t, G_t) at the t of log_at
    just_after, log_at, curves = np.zeros(S), np.unique(np.geomspace(2, T, 40).astype(int)), []
    for t in range(1, T + 1):
        task, X = draw_round(p, pool, data)
        target, x = pool.w[rows, task], X.sum(2)                                      # (S, d) both
        scores = (gate @ x[:, :, None])[:, :, 0]                                      # (S, M)
        chosen = (scores + p.noise * own.uniform(size=(S, M))).argmax(1)              # (S,)
        before = experts[rows, chosen]                                                # (S, d)
        after = fit_nearest(before, X, np.einsum("bds,bd->bs", X, target))            # (S, d)
        experts[rows, chosen] = after
        visits[rows, chosen, task] += 1
        tasks[t - 1], choices[t - 1], arrival[t - 1] = task, chosen, ((before - target)**2).sum(1)
        just_after += ((after - target)**2).sum(1)

        update_flags(p, flags, scores, chosen, t)
        stop = flags.all(1) if p.stop_at is None else np.full(S, t > p.stop_at)
        stop_round[stop] = np.minimum(stop_round[stop], t)
        drift, load = np.linalg.norm(after - before, axis=1), visits[rows, chosen].sum(1) / t
        locality, balance = gate_gradients(p, scores, chosen, drift, load, t)         # (S, M)
        learns = (stop_round > t)[:, None]                                            # (S, 1)
        slope = (learns | p.keep_locality) * locality + (learns | p.keep_balance) * balance
        gate -= p.lr * slope[:, :, None] * x[:, None]  # h_m = theta_m . x
        if t in log_at:  # F_t and G_t need only how often each expert met each task
            now = (visits * pairwise(experts, pool.w)).sum((1, 2))                    # (S,)
            curves.append(((now - just_after) / (t - 1), now / t))
    forgetting, error = np.transpose(curves, (1, 0, 2))                               # (log, S)
    return SimpleNamespace(pool=pool, gate=gate, tasks=tasks, choices=choices, arrival=arrival,
                           stop_round=stop_round, log_at=log_at, forgetting=forgetting, error=error)


def pairwise(a, b):
    """|a_i - b_j|^2 for all pairs."""
    return ((a[:, :, None] - b[:, None])**2).sum(-1)                                  # (S, i, j)


# --------------------------------------------------------------------------- the closed forms

def closed_form(p, pool, residual=True):
    """E[F_T] and E[G_T] of one expert with isotropic columns, for each seed's own pool.

    residual=False leaves (r - r^u) D out of e_u and 1 - 1/T out of G: see theory/README.md.
    """
    T, r, u = p.rounds, 1 - p.samples / p.dim, np.arange(1, p.rounds)
    W, D = (pool.w**2).sum(-1).mean(1), pairwise(pool.w, pool.w).mean((1, 2))         # (S,)
    e = np.outer(W, r**u) + residual * np.outer(D, r - r**u)                          # (S, T-1)
    forgetting = ((1 - r**(T - u)) * (D[:, None] - e)).mean(1)
    return forgetting, r**T * W + (1 - r**T) * (1 - residual / T) * D


def expected_given_routing(p, pool, tasks, choices):
    """E[F_T] and E[G_T] of M experts, for the tasks and choices of a run, columns isotropic.

    The expected square error E of expert m on task j moves only when m is chosen, for a task n:
    E[m, j] <- r E[m, j] + (1 - r) |w_n - w_j|^2.  Exact if the choice did not look at X.
    """
    r, rows = 1 - p.samples / p.dim, np.arange(p.seeds)
    distance = pairwise(pool.w, pool.w)                                               # (S, N, N)
    E = np.repeat((pool.w**2).sum(-1)[:, None], p.experts, 1)                         # (S, M, N)
    visits, just_after = np.zeros_like(E), 0
    for task, chosen in zip(tasks, choices):
        E[rows, chosen] = r * E[rows, chosen] + (1 - r) * distance[rows, task]
        visits[rows, chosen, task] += 1
        just_after = just_after + E[rows, chosen, task]
    now = (visits * E).sum((1, 2))                                                    # (S,)
    return (now - just_after) / (p.rounds - 1), now / p.rounds


# ------------------------------------------------------------------------------ what we report

MEASURES = dict(F="forgetting", G="error", A="arrival error", spec="specialised", used="in use")
# What happens to the gate.  "random" is the control: it learns nothing at all, but holds still.
KINDS = {"stopped": {}, "never": dict(keep_locality=True, keep_balance=True),
         "random": dict(gate_std=0.3, stop_at=0), "locality stays": dict(keep_locality=True),
         "balance stays": dict(keep_balance=True)}
MANY, SOME, ENDS = (1, 2, 3, 5, 10, 20, 40), (5, 10, 20), (5, 20)                    # M
STOPS, HORIZONS = (3, 10, 30, 100, 300, 1000), (2, 4, 8, 15, 30, 60)                 # stop_at, T
NOISES = (0.0, 0.01, 0.03, 0.1, 0.3)                                                 # lambda
ALIGNED = dict(aligned=True)
OTHER_DATA = [dict(sample_std=0.02), dict(sample_std=0.1), ALIGNED]  # the random gate meets it too
SWEEP = [dict(noise=x) for x in NOISES] + [dict(noise=x, gap=x) for x in NOISES] + [
    dict(lr=0.1), dict(lr=1.0), *OTHER_DATA]
SIZES = (0.01, 0.03, 0.1)                                    # gate_std of smaller random gates


def specialization(cluster, tasks, choices):
    """Share of rounds in which a task reaches an expert whose home is the task's cluster; (S,)."""
    # CHOICE: an expert's home is the cluster it served most in the first half of the rounds given;
    # the second half is scored.  So chance is 1/K whatever M is, and an expert idle at first, or
    # one that changes its tasks, does not score.
    half, rows, k = len(tasks) // 2, np.arange(tasks.shape[1]), cluster[tasks]        # k (T, S)
    seen = np.zeros((len(rows), choices.max() + 1, cluster.max() + 1))                # (S, M, K)
    np.add.at(seen, (rows, choices[:half], k[:half]), 1)
    home = np.where(seen.any(2), seen.argmax(2), -1)                                  # (S, M)
    return (home[rows, choices[half:]] == k[half:]).mean(0)


def mean_band(values):
    """Mean over seeds and half the width of its 95 % band (normal, 1.96 standard errors)."""
    return np.mean(values, -1), 1.96 * np.std(values, -1, ddof=1) / np.shape(values)[-1]**0.5


def summarize(p, run, window=500):
    """What goes into the JSON: one number per seed, curves with bands, routing tables of seed 0."""
    last = slice(-window, None)
    share = (run.choices[last, :, None] == np.arange(p.experts)).mean(0)              # (S, M)
    per_seed = dict(F=run.forgetting[-1], G=run.error[-1], A=run.arrival[last].mean(0),
                    spec=specialization(run.pool.cluster, run.tasks[last], run.choices[last]),
                    used=1 / (share**2).sum(1), stop=run.stop_round,
                    FG_routing=expected_given_routing(p, run.pool, run.tasks, run.choices))
    routing = [np.histogram2d(run.tasks[part, 0], run.choices[part, 0], (
        range(p.tasks + 1), range(p.experts + 1)))[0] for part in (slice(100), last)]
    return dict(params=asdict(p), per_seed=per_seed, routing=routing, curves=dict(
        t=run.log_at, F=mean_band(run.forgetting), G=mean_band(run.error)))


def name(M, kind, change=()):
    return " ".join([f"M={M} {kind}", *(f"{key}={value}" for key, value in dict(change).items())])


def plan():
    """Name -> parameters of every mixture run."""
    runs = [*product(MANY, ["stopped"], [{}]), *product(SOME, KINDS, [{}]),
            *product(SOME, ["stopped"], [dict(stop_at=stop) for stop in STOPS]),
            *product(ENDS, ["stopped"], SWEEP), *product(ENDS, ["random"], OTHER_DATA),
            *product(ENDS, ["never"], [ALIGNED]),
            *product(ENDS, ["random"], [dict(gate_std=size) for size in SIZES])]
    return {name(*run): Params(experts=run[0], **KINDS[run[1]] | run[2]) for run in runs}


def compare_closed_form(beta, samples):
    """One expert against the formulas: per horizon [simulated, band, exact, shortened, z]."""
    rows = dict(F=[], G=[])
    for T in HORIZONS:
        p = Params(experts=1, beta=beta, samples=samples, rounds=T, seeds=2000, seed=T)
        run = simulate(p)
        forms = closed_form(p, run.pool), closed_form(p, run.pool, residual=False)
        for key, values, exact, short in zip("FG", (run.forgetting[-1], run.error[-1]), *forms):
            off, half = mean_band(values - exact)
            rows[key].append((*mean_band(values), exact.mean(), short.mean(), 1.96 * off / half))
    return dict(params=asdict(p), horizons=HORIZONS, **rows)


def print_table(runs):
    table = {name(*x): runs[name(*x)]["per_seed"] for x in [(1, "stopped"), *product(SOME, KINDS)]}
    for M, other in product(SOME, ("never", "random")):  # paired: same tasks, same data
        a, b = table[name(M, "stopped")], table[name(M, other)]
        table[f"M={M} stop - {other}"] = {key: np.subtract(a[key], b[key]) for key in MEASURES}
    print("mean +- 95 % band".ljust(20), *(f"{v:13.13}" for v in MEASURES.values()), "rule at")
    for row, x in table.items():
        cells = ["{:6.2f} +-{:.2f}".format(*mean_band(x[key])) for key in MEASURES]
        print(row.ljust(19), *cells, f"{np.median(x['stop']):6.0f}" if "stop" in x else "")


def draw(result):
    """The four figures, from the JSON alone."""
    runs, p = result["runs"], result["runs"][name(5, "stopped")]["params"]
    # As text, the values on an axis are evenly spaced and each has its tick.
    many, stops, noises, T = ([*map(str, x)] for x in (MANY, STOPS, NOISES, HORIZONS))
    # Line style and marker tell the lines apart without the colour, for print in grey.
    plt.rc("axes", prop_cycle=plt.cycler(color=["#0072B2", "#D55E00", "#009E73", "black"],
                                         marker=list("os^x"), ls=["-", "--", "-.", ":"]))

    def panel(ax, x, lines, every=1, **labels):
        for label, (mean, half) in lines.items():
            ax.errorbar(x, mean, half, ms=5, label=label, errorevery=every, markevery=every)
        ax.set(**labels)
        ax.legend(fontsize=8, ncol=2)

    def bands(key, names):
        return np.transpose([mean_band(runs[one]["per_seed"][key]) for one in names])

    def save(fig, file, title, n=f"s={p['samples']}; n={p['seeds']} seeds, seed {p['seed']}"):
        fig.suptitle(f"{title}\nN={p['tasks']} tasks, K={p['clusters']}, d={p['dim']}, {n}")
        fig.savefig(RESULTS / f"theory_{file}.png", dpi=100)

    fig, axes = plt.subplots(2, 3, figsize=(12, 7), sharey="row", layout="constrained")
    for ax, (key, M) in zip(axes.flat, product("FG", SOME)):
        kinds = {"stopped by the rule": (M, "stopped"), "never stopped": (M, "never"),
                 "random, never trained": (M, "random"), "one expert": (1, "stopped")}
        lines = {label: runs[name(*kind)]["curves"][key] for label, kind in kinds.items()}
        panel(ax, runs[name(M, "stopped")]["curves"]["t"], lines, 5, xscale="log", title=f"M={M}",
              ylim=(-0.1, 2.0), xlabel="round t",
              ylabel=f"{MEASURES[key]} (squared distance)" if M == SOME[0] else "")
    save(fig, "forgetting", "What the gate does, and how much is forgotten: mean and 95 % band")

    fig, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
    views = product((5, 10), (("never", 0, "gate learning, first 100 rounds"), (
        "stopped", 1, "stopped, last 500 rounds"), ("never", 1, "never stopped, last 500 rounds")))
    for ax, (M, (kind, part, label)) in zip(axes.flat, views):
        table = np.array(runs[name(M, kind)]["routing"][part])                            # (N, M)
        grey = ax.imshow(table / table.sum(1)[:, None], "Greys", aspect="auto",
                         norm=PowerNorm(0.5, 0, 1))  # a root, so that shares of 1/M are visible
        ax.set(title=f"M={M}: {label}", xlabel="expert", ylabel="task", xticks=range(M))
    fig.colorbar(grey, ax=axes, label="share of the task's rounds")
    save(fig, "specialization", f"Who takes which task (n and n + {p['clusters']}: one cluster)",
         f"s={p['samples']}; the first of n={p['seeds']} seeds, seed {p['seed']}")

    low, middle, high = np.transpose([
        np.percentile(runs[name(M, "stopped")]["per_seed"]["stop"], (25, 50, 75)) for M in MANY])
    stops_by_the_rule = middle, (middle - low, high - middle)
    fig, axes = plt.subplots(1, 3, figsize=(13, 5), layout="constrained")
    panel(axes[0], many, {
        "stopped by the rule (bars: quartiles)": stops_by_the_rule,
        "T1 = M / eta": ([M / p["lr"] for M in MANY], 0)}, yscale="log", ylim=(1, 1e4),
        xlabel="experts M", ylabel=f"median round of the stop ({p['rounds'] + 1}: not in this run)")
    panel(axes[1], stops, {f"M={M}": bands("A", [
        name(M, "stopped", dict(stop_at=stop)) for stop in STOPS]) for M in SOME}, ylim=(0, 1.6),
        xlabel="stopped by hand after round", ylabel="arrival error A (squared distance)")
    panel(axes[2], noises, {f"M={M}, Gamma={gap}": bands("F", [
        name(M, "stopped", change) for change in SWEEP[i:i + len(NOISES)]])
        for M, (i, gap) in product(ENDS, ((0, p["gap"]), (len(NOISES), "lambda")))}, ylim=(0, 1.2),
        xlabel="gate noise lambda", ylabel="forgetting F_T (squared distance)")
    save(fig, "more_experts",
         "More experts, more rounds, and the gate noise: mean and 95 % band (left: median)")

    fig, axes = plt.subplots(1, 3, figsize=(13, 5), layout="constrained")
    for ax, key, beta in zip(axes, "FGF", (0.0, 0.0, 2.0)):
        for samples, marker, colour in ((2, "o", "#0072B2"), (8, "s", "#D55E00")):
            mean, half, exact, short, _ = np.transpose(result["closed"][f"{beta} {samples}"][key])
            ax.errorbar(T, mean, half, c=colour, fmt=marker, label=f"simulated, s={samples}")
            ax.plot(T, exact, "-", T, short, ":", c=colour, lw=1, marker="")
        ax.set(xlabel="rounds T", ylabel=f"{MEASURES[key]} (squared distance)",
               title="with the signal column (forms: without)" if beta else "isotropic columns")
        ax.legend(title="solid: exact (isotropic)\ndotted: shortened", fontsize=8)
    save(fig, "closed_form", "One expert: simulation (mean and 95 % band) and closed form",
         "n=2000 seeds a point, seed T")


def main():
    start, path = time.time(), RESULTS / "theory_moe.json"
    runs = {key: summarize(p, simulate(p)) for key, p in tqdm(plan().items(), "mixtures")}
    closed = {f"{beta} {samples}": compare_closed_form(beta, samples) for beta, samples in tqdm(
        [*product((0.0, 2.0), (2, 6, 8))], "one expert")}
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(
        command="python -m theory.moe_theory", seconds=round(time.time() - start, 1),
        python=platform.python_version(), numpy=np.__version__, runs=runs, closed=closed),
        default=lambda array: np.round(array, 5).tolist()))
    result = json.loads(path.read_text())  # what is printed and drawn comes from the file
    print_table(result["runs"])
    draw(result)


if __name__ == "__main__":
    main()
