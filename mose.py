"""Mixtures of SubExperts (MoSEs): a language model learns task after task and forgets none.

An unofficial reference of arXiv 2511.06237 in plain PyTorch. Copy this file; it needs only torch.

The base is frozen. Each target projection y = W x of its self-attention layers gets E low-rank
experts; all weights of a layer's experts are its pool of entries. A task has a router, which gives
every token a gate per expert, and a mask, which says which entries of the pool the task may read:

    gate = top_k(softmax(router[task] @ projection @ x))                              (1)
    y    = W x + scale * sum_e gate_e * B_e @ A_e @ x                                 (2)
    A, B = mask[task] * where(used, frozen, weight)                                   (3)

`used` marks the entries that some finished task reads. Their values come from the buffer `frozen`,
which no optimizer can hold, so the output of a finished task can't change: forgetting is ruled out
by construction. A new task takes at most the share `density` of the entries that are still free, so
the pool fills ever more slowly and never runs out.

    mose = MoSE(model)
    mose.begin_task("FOMC")                             # begin_task(name, probe): may reuse a task
    mose.observe(prompt_ids)                            # its key, by which it is recognised later
    optimizer = torch.optim.AdamW(mose.trainable_parameters(), lr=1e-3)
    for ids, labels in batches:
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    mose.end_task()
    mose.set_task(mose.infer_task(prompt_ids))          # or set_task("FOMC"), if the task is known

Shapes: B batch, T tokens, D in, O out, E experts, R rank, K active experts, P router input,
N entries of a layer's pool. "Mask" is a task's mask; that of padding is `attention_mask`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import math
import os
import zlib

import torch


@dataclasses.dataclass(frozen=True)
class MoSEConfig:
    """All that rebuilds the adapter; it travels in the checkpoint.

    Raises ValueError for a value outside its range.
    """

    # CHOICE: no value below is known from the paper. They follow from the search in
    # results/ablation.md.
    targets: tuple = ("q_proj", "v_proj")  # linear layers, by the last part of their name
    num_experts: int = 4  # E >= 1, on every target
    rank: int = 16  # R >= 1, of each expert
    top_k: int | None = None  # 1 <= K <= E experts for a token; None: all
    density: float = 0.03  # in (0, 1]: share of the pool a task reads, of free entries it takes
    scale: float = 32.0  # > 0, factor of the experts' sum
    router_dim: int = 16  # P >= 1
    key_dim: int = 64  # >= 1, numbers of a task's key
    isolate: bool = True  # False, for baselines only: one router, no masks, tasks overwrite another

    def __post_init__(self):
        most = {"top_k": self.num_experts, "density": 1.0}
        for field in dataclasses.fields(self)[1:-1]:  # all but targets and isolate
            value, high = getattr(self, field.name), most.get(field.name, math.inf)
            fits = isinstance(value, (int, type(field.default)))  # None fits top_k alone
            if not fits or value is not None and not 0 < value <= high:
                raise ValueError(f"{field.name}: got {value!r}, expected 0 < a number <= {high}")


# ------------------------------------------------------------------------------ masks


def top_k_mask(score, k):
    """The bool mask of exactly the k largest scores (N,)."""
    # By index: a threshold keeps everything that ties with it, and the mask outgrows k.
    return torch.zeros_like(score).bool().index_fill(0, score.topk(k, sorted=False).indices, True)


def straight_through(weight, score, frozen, used, mask):
    """Equation (3), with the gradient of mask = 1 (after Winning SubNetworks, ICML 2022).

    All (N,). Whether or not the mask holds an entry, its score gets the gradient times its value,
    and its weight gets the gradient itself, unless it is used.
    """
    value = torch.where(used, frozen, weight)
    # DIFFERS: weights outside the mask learn too, not only their scores. B starts at 0, where the
    # gradient of its scores is exactly 0: the mask of B would never leave its random start.
    surrogate = value + value.detach() * score
    return torch.where(mask, value, 0.0).detach() + (surrogate - surrogate.detach())


def encode(mask):
    """A sparse (n,) mask as bytes: the gaps between its entries, Huffman-coded by zlib.

    0 0 1 0 1 has the gaps 2, 1 and, up to its end, 0: bytes 2, 1, 0. A gap of 300 is 255, 45.
    Gaps between chance positions are geometric, and this comes within 5 % of their entropy, 0.2
    bits for an entry of the pool at density 0.03.
    """
    gaps = torch.nn.functional.pad(mask, (1, 1), value=True).nonzero().flatten().diff() - 1
    steps = torch.full((len(gaps) + int((gaps // 255).sum()),), 255)
    steps[(gaps // 255 + 1).cumsum(0) - 1] = gaps % 255
    return zlib.compress(bytes(steps.tolist()), 9)


def decode(code):
    """The inverse of `encode`."""
    steps = torch.frombuffer(bytearray(zlib.decompress(code)), dtype=torch.uint8).long()
    places = (steps + (steps < 255)).cumsum(0)[steps < 255] - 1
    return torch.zeros(int(places[-1]), dtype=torch.bool).index_fill(0, places[:-1], True)


# ------------------------------------------------------------------------------ experts


class SubExperts(torch.nn.Module):
    """The experts on all targets of one attention layer, and the router over them.

    The A (D, E*R) and B (O, E*R) of the targets, one below the other, are one pool of N entries:

    weight, score  (N,) what an optimizer moves; no finished task reads it
    frozen, used   (N,) values and places of finished tasks; buffers, so no optimizer holds them
    """

    def __init__(self, attention, config):
        """Hook an attention module, and those of its linear layers that are targets."""
        super().__init__()
        self.config, self.on = config, False
        linears = {name: m for name, m in attention.named_children() if in_out(m)}
        # CHOICE: routers read their layer's input through a fixed random projection to P numbers.
        # With D numbers they would need as many bytes as a LoRA of rank E, for every task.
        # The first linear layer of an attention module tells D; o_proj reads something else.
        projection = fixed_projection(in_out([*linears.values()][0])[0], config.router_dim)
        self.targets = {name: in_out(linears[name]) for name in linears if name in config.targets}
        self.rows = [size for shape in self.targets.values() for size in shape]  # D, O, D, O, ..
        # A starts uniform in +-1/sqrt(D), B at 0: a new task's delta is exactly 0.
        bounds = [bound for d, o in self.targets.values() for bound in [d**-0.5] * d + [0.0] * o]
        bound = torch.tensor(bounds).repeat_interleave(config.num_experts * config.rank)
        zeros = torch.zeros_like(bound)
        buffers = {"projection": projection, "bound": bound, "frozen": zeros, "used": zeros.bool()}
        for name, value in (buffers | {"values_now": None, "router_now": None}).items():
            self.register_buffer(name, value)
        self.weight = torch.nn.Parameter(zeros.clone())
        self.score = torch.nn.Parameter(zeros.clone(), requires_grad=config.isolate)
        self.router = torch.nn.Parameter(torch.zeros(config.num_experts, config.router_dim))
        self.to(next(attention.parameters()).device)
        self.handles = [attention.register_forward_pre_hook(self.route, with_kwargs=True)]
        deltas = [functools.partial(self.add_delta, i) for i in range(len(self.targets))]
        self.handles += [linears[n].register_forward_hook(d) for n, d in zip(self.targets, deltas)]

    def state_dict(self, *args, destination=None, **kwargs):
        return destination  # adds nothing, or base.save_pretrained() would write the adapter too

    def __getstate__(self):
        return {**self.__dict__, "gates": None, "matrices": None}  # no graph can be copied

    # ---- the life of a task

    @torch.no_grad()
    def redraw(self, need, mask, router):
        """Initialise router, scores and free entries for a new task.

        mask (N,) and router (E, P) are those of the finished task that it starts from, or zeros.
        From such a source it takes the share `need` of the usual new entries, and their values
        start at 0: so far, it is the source.
        """
        fresh, device = 0.0 if mask.any() else 1.0, self.used.device
        # Not 0 when fresh: at a tie top-k would always take expert 0.
        self.router.normal_(std=0.02).mul_(fresh).add_(router.to(device))
        # Straight-through moved free entries that were in no mask. Without a new start they would
        # be in the next task's delta before it has learned anything.
        self.weight.uniform_(-1.0, 1.0).mul_(self.bound * fresh)
        # CHOICE: used entries start at the bottom and win their place by gradient, but for those of
        # the task it starts from. With the last task's scores a new one gets few good entries, and
        # with random scores it starts from noise. At 1e9 no step moves a score: a source is kept.
        self.score.uniform_(0.0, 0.01).masked_fill_(self.used, 0.0).add_(mask.to(device), alpha=1e9)
        # CHOICE: the share is of what is still free, so that the pool never runs out.
        self.num_new = int(need * self.config.density * (~self.used).sum())
        # Used ones: what the new ones leave of a mask's size, but never fewer than the source has.
        self.num_old = max(int(mask.sum()), round(self.config.density * len(mask)) - self.num_new)

    def select(self):
        """The open task's mask: its new entries, and the used ones that have won a place."""
        if not self.config.isolate:
            return torch.ones_like(self.used)
        # CHOICE: one mask is chosen for all A and B of a layer together, so that what needs more
        # entries gets more.
        score = self.score.detach()
        # top-k returns as many as it is asked for, even free ones and those that won nothing.
        old = top_k_mask(score.masked_fill(~self.used, 0.0), self.num_old) & self.used & (score > 0)
        return old | top_k_mask(score.masked_fill(self.used, -math.inf), self.num_new)

    def keep(self, mask, values):
        """From now on keep the entries of `mask`, new ones at `values`, and free all others."""
        mask, values = mask.to(self.used.device), values.to(self.used.device)
        self.frozen = torch.where(mask, torch.where(self.used, self.frozen, values), 0.0)
        self.used = mask & self.config.isolate

    def activate(self, on, mask=None, router=None):
        """Put the open task in force, or finished ones: mask (N,) and router (E, P), or one of each
        per example, (B, N) and (B, E, P)."""
        device, self.on, self.gates, self.matrices = self.used.device, on, None, None
        # Built here once, and not for every token.
        self.values_now = None if mask is None else torch.where(mask.to(device), self.frozen, 0.0)
        self.router_now = None if mask is None else router.to(device)

    # ---- the life of a token

    def route(self, attention, args, kwargs):
        """Forward pre-hook of the attention module: equations (3) and (1), for all its targets."""
        if not self.on:
            return
        x = args[0] if args else kwargs["hidden_states"]  # (B, T, D)
        values, router = self.values_now, self.router_now  # (N,), (E, P), or B of each
        if values is None:  # the open task
            router, mask = self.router, self.select()
            values = straight_through(self.weight, self.score, self.frozen, self.used, mask)
        if values.dim() == 2 and len(values) != len(x):
            raise ValueError(f"set_task() got {len(values)} tasks for a batch of {len(x)} examples")
        # Overwritten by each forward pass (checkpointing runs it twice), and kept until backward.
        self.gates = torch.softmax(x.to(router) @ self.projection @ router.mT, dim=-1)  # (B, T, E)
        if self.config.top_k:
            best = self.gates.topk(self.config.top_k, dim=-1)  # (B, T, K)
            # CHOICE: chosen gates keep their softmax value. Scaled to sum to 1, a single one would
            # always be 1, and the router would never learn.
            self.gates = torch.zeros_like(self.gates).scatter(-1, best.indices, best.values)
        # (N,) -> (D + O + D + O + .., E*R) -> A, B, A, B, ..
        self.matrices = values.unflatten(-1, (sum(self.rows), -1)).split(self.rows, dim=-2)

    def add_delta(self, i, linear, args, out):
        """Forward hook of target i: equation (2), all experts in two matrix products."""
        if not self.on:
            return out
        A, B = self.matrices[2 * i : 2 * i + 2]  # (D, E*R), (O, E*R), or one of each per example
        h = (args[0].to(A) @ A).unflatten(-1, (-1, self.config.rank))  # (B, T, E, R)
        delta = (h * self.gates[..., None]).flatten(-2) @ B.mT  # (B, T, O)
        return out.add(delta.to(out.dtype), alpha=self.config.scale)


# ------------------------------------------------------------------------------ task keys


class TaskKeys:
    """Which task does a prompt belong to? Running sums only: no prompt is kept.

    A prompt is its mean token embedding under a fixed projection, with a 1 appended, whose sum is
    the number of prompts: x (key_dim + 1,). Its task is the nearest mean by Mahalanobis distance,
    with one covariance for all (linear discriminant analysis).
    """

    # CHOICE: the task is inferred from the prompt's token embeddings, before any pass through the
    # model. How the paper infers it is not known.

    def __init__(self, inputs, dim):
        self.projection = fixed_projection(inputs, min(inputs, dim))
        # Sums of x for each task, and of x x^T over all.
        self.total, self.square = {}, torch.zeros([len(self.projection.T) + 1] * 2)

    def observe(self, name, x):
        """Add prompts x (B, key_dim + 1)."""
        self.total[name] = self.total.get(name, 0.0) + x.sum(0)
        self.square += x.T @ x

    def forget(self, name):
        if name in self.total:  # the scatter around its mean stays: it is everyone's
            total = self.total.pop(name)
            self.square -= torch.outer(total, total) / total[-1]

    def infer(self, x, names):
        """The nearest task of each prompt, and the probability that it is right: two lists."""
        total = torch.stack([self.total[name] for name in names]).double()  # (tasks, key_dim + 1)
        means, count = total / total[:, -1:], total[:, -1].sum()
        cov = (self.square - total.T @ means) / count
        # A ridge, for directions in which prompts so far don't differ, and for rounding.
        ridge = 0.01 * cov.diagonal().mean() + 1e-4 * self.square.diagonal()[:-1].mean() / count
        centers = torch.cat([means, means.mean(0, keepdim=True)])  # of the tasks, and the middle
        root = torch.linalg.cholesky(torch.linalg.inv(cov + ridge * torch.eye(len(cov))))
        logits = -0.5 * torch.cdist(x.double() @ root, centers @ root) ** 2  # (B, tasks + 1)
        # CHOICE: "none of these" is one more class, in the middle of all and 3 times as wide.
        # Without it, a prompt far from every task would belong to the nearest for sure. A Gaussian
        # 3 times as wide has its distances over 3, and its peak over 3 for each dimension.
        logits[:, -1] = logits[:, -1] / 9 - len(cov) * math.log(3)
        nearest, sure = logits[:, :-1].argmax(1), logits.softmax(1)[:, :-1].amax(1)
        return [names[i] for i in nearest], sure.tolist()


def fixed_projection(inputs, outputs):
    """(inputs, outputs) signs / sqrt(inputs), the same on every machine, so never stored.

    From a hash, since torch promises no fixed sequence of its generators: under another projection
    all saved routers and keys would be worthless.
    """
    signs = torch.tensor([*hashlib.shake_256(b"MoSEs").digest(inputs * outputs)]) % 2 * 2.0 - 1.0
    return signs.view(inputs, outputs) / math.sqrt(inputs)


def fingerprint(model):
    """A digest of the base's weights, the same for the bf16 and the fp32 copy of a checkpoint."""
    base = ((name, p) for name, p in model.named_parameters() if ".sub_experts." not in name)
    bits = ((name, p.detach().bfloat16().contiguous().view(torch.int16)) for name, p in base)
    sums = [(name, *b.shape, b.sum(dtype=torch.int64).item()) for name, b in bits]
    return hashlib.sha256(repr(sums).encode()).hexdigest()


def kinds(state):
    """What must be equal in two checkpoints: of tensors name, dtype and row size, of the format,
    the base and the config their value, of all else the type."""
    rows = {(k, v.dtype, v.shape[1:]) for k, v in state.items() if torch.is_tensor(v)}
    rest = [(k, v) for k, v in state.items() if not torch.is_tensor(v)]
    return rows | {(k, repr(v) if k in ("format", "base", "config") else type(v)) for k, v in rest}


def in_out(layer):
    """(D, O) of an nn.Linear, of a quantised one and of GPT-2's Conv1D; None for other layers."""
    names = ("in_features", "out_features") if hasattr(layer, "in_features") else ("nx", "nf")
    return tuple(getattr(layer, n) for n in names) if hasattr(layer, names[1]) else None


# ------------------------------------------------------------------------------ the whole


class MoSE:
    """Attaches sub-experts to a model, and manages its tasks and their keys.

    tasks: {name: (mask over all layers, as `encode` gives it; routers (layers, E, P))}.
    """

    def __init__(self, model, config=None):
        """Attach to `model` and freeze it. ValueError if a target matches no layer of it."""
        self.model, self.config = model, config or MoSEConfig()
        # Tasks that are finished, the one being learned, and what is in force.
        self.tasks, self.open, self.active, modules = {}, None, None, dict(model.named_modules())
        self.keys = TaskKeys(len(model.get_input_embeddings().weight.T), self.config.key_dim)
        if any(isinstance(m, SubExperts) for m in modules.values()):
            raise ValueError("a MoSE is attached to this model already: call its detach() first")
        if any(p.is_meta for p in model.parameters()):
            raise ValueError("part of the base is offloaded (meta device): load it without that")
        linears = [name.rpartition(".") for name, m in modules.items() if in_out(m)]
        there, wanted = {name for _, _, name in linears}, {*self.config.targets}
        if not wanted or wanted - there:
            raise ValueError(f"no linear layer matches {[*wanted - there]}; there are {[*there]}")
        self.unfrozen = torch.nn.ParameterList(p for p in model.parameters() if p.requires_grad)
        model.requires_grad_(False)
        # The attention modules that hold a target, each once.
        self.attentions = [*dict.fromkeys(modules[p] for p, _, name in linears if name in wanted)]
        for attention in self.attentions:
            attention.sub_experts = SubExperts(attention, self.config)
        self.layers = [attention.sub_experts for attention in self.attentions]
        self.sizes = [len(layer.used) for layer in self.layers]
        routers = torch.zeros(len(self.layers), *self.layers[0].router.shape)
        self.blank = encode(torch.zeros(sum(self.sizes))), routers  # of the bare base

    def detach(self):
        """Take everything off: the base is what it was, bit for bit."""
        for attention in self.attentions:
            for handle in attention.sub_experts.handles:
                handle.remove()
            del attention.sub_experts
        self.unfrozen.requires_grad_(True)

    # ---- the life of a task

    def begin_task(self, name, probe=None):
        """Open a task; returns the finished task that it starts from, or None.

        From None its delta is exactly 0 until it is trained. probe() tells how much is left to
        learn, say the share of its examples that are answered wrong; it is called under the bare
        base and under each finished task.
        """
        if self.open is not None or not isinstance(name, str) or name in self.tasks:
            raise ValueError(f"{name!r}: expected a task not in {[*self.tasks]}, none open; "
                             f"open is {self.open!r}: call end_task() or forget() it")
        source, need = self._source(probe) if probe and self.config.isolate else (None, 1.0)
        masks, routers = self._record(source)
        for layer, *start in zip(self.layers, masks.split(self.sizes), routers):
            if self.config.isolate or not self.tasks:
                layer.redraw(need, *start)
        self.open = name
        self.set_task(name)
        return source

    def _source(self, probe):
        """The finished task that helps a new one most, and the share that it leaves to learn."""
        left = {}
        for name in [None, *self.tasks]:
            with self.task(name), torch.no_grad():
                left[name] = float(probe())
        # CHOICE: a new task starts from the one that leaves least to learn, if that is well below
        # what the base leaves. It takes that share of the new entries. How the paper reuses old
        # experts is not known.
        best = min(left, key=left.get)
        need = left[best] / left[None] if best is not None else 1.0
        return (best, need) if need < 0.75 else (None, 1.0)

    def trainable_parameters(self):
        """The open task's Parameters. Give each task a fresh optimizer: old momentum is noise."""
        if self.open is None:
            raise ValueError("no task is open: call begin_task(name) first")
        return [p for layer in self.layers for p in layer.parameters() if p.requires_grad]

    def end_task(self):
        """Freeze all that the open task reads; returns its entry of `capacity()`."""
        if not all(p.isfinite().all() for p in self.trainable_parameters()):
            raise ValueError(f"task {self.open!r} is not finite: forget() it, lower the rate")
        masks = [layer.select() for layer in self.layers]
        for layer, mask in zip(self.layers, masks):
            layer.keep(layer.used | mask, layer.weight.detach())
        routers = torch.stack([layer.router.detach().cpu() for layer in self.layers])
        record = encode(torch.cat([mask.cpu() for mask in masks])), routers
        name, self.open = self.open, None
        # The tasks of a shared pool have one record, the latest: this is how they forget.
        self.tasks |= dict.fromkeys([name] if self.config.isolate else [*self.tasks, name], record)
        self.set_task(name)
        return self.capacity()[name]

    def forget(self, name):
        """Remove a task, or drop the open one. All others stay the same, bit for bit."""
        known = [self.open] if self.open else [*self.tasks]
        if name not in known or not self.config.isolate:
            raise ValueError(f"can't forget {name!r}: expected one of {known}; a shared pool "
                             "(isolate=False) can't tell its tasks apart: load() an earlier file")
        if name != self.open:
            del self.tasks[name]
            for layer, mask in zip(self.layers, self._used().split(self.sizes)):
                layer.keep(mask, layer.frozen)
        self.open = None
        self.keys.forget(name)
        gone = name == self.active or isinstance(self.active, list) and name in self.active
        self.set_task(None if gone else self.active)

    def freeze_router(self):
        """Stop a shared router for good, or it goes on rerouting old tasks (arXiv 2406.16437).

        No effect with isolate=True, where each router stops with its task.
        """
        for layer in [] if self.config.isolate else self.layers:
            # A new Parameter: an optimizer that holds the old one would go on moving it.
            layer.router = torch.nn.Parameter(layer.router.detach().clone(), requires_grad=False)

    # ---- which task is in force

    def _record(self, name):
        """(mask over all layers, routers) of a finished task, or of the bare base (None)."""
        if name not in (None, *self.tasks):
            raise ValueError(f"unknown task {name!r}: finished so far are {[*self.tasks]}")
        code, routers = self.tasks.get(name, self.blank)
        return decode(code), routers

    def _used(self):
        return functools.reduce(torch.logical_or, (self._record(n)[0] for n in [None, *self.tasks]))

    def set_task(self, task):
        """A task for all examples, a list with one per example, or None for the bare base.

        Keep it until after backward(): gradient checkpointing runs the forward pass once more.
        """
        if task is None or task == self.open:
            for layer in self.layers:
                layer.activate(task is not None)
        else:
            if isinstance(task, list) and task:
                # (B, N of all layers), (B, layers, E, P)
                masks, routers = map(torch.stack, zip(*map(self._record, task)))
            else:
                masks, routers = self._record(task)  # the same without B
            for layer, *record in zip(self.layers, masks.split(self.sizes, -1), routers.unbind(-3)):
                layer.activate(True, *record)
        self.active = task

    @contextlib.contextmanager
    def task(self, task):
        """`with mose.task("FOMC"): ...`, then back to what was in force before."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.set_task, self.active)  # runs last, after an error too
            self.set_task(task)
            yield self

    def disabled(self):
        """`with mose.disabled(): ...` runs the bare base."""
        return self.task(None)

    # ---- task keys

    def _embed(self, input_ids, attention_mask):
        """Prompts (B, T) -> (B, key_dim + 1), see TaskKeys."""
        table = self.model.get_input_embeddings().weight
        mask = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).to(table)
        ids, bag = input_ids.to(table.device), torch.nn.functional.embedding_bag
        total = bag(ids, table, per_sample_weights=mask, mode="sum").float().cpu()
        mean = total / mask.float().sum(1, keepdim=True).clamp(min=1).cpu()
        return torch.cat([mean @ self.keys.projection, torch.ones(len(mean), 1)], dim=1)

    def observe(self, input_ids, attention_mask=None):
        """Let prompts (B, T) of the open task feed its key; no pass through the model."""
        if self.open is None:
            raise ValueError("no task is open: call begin_task(name) before observe()")
        self.keys.observe(self.open, self._embed(input_ids, attention_mask))

    def infer_task(self, input_ids, attention_mask=None, return_confidence=False):
        """The task of each prompt (B, T), a list of names; no pass through the model.

        With return_confidence also their probabilities: near 0 for a prompt far from every task.
        """
        keyless = [name for name in self.tasks if name not in self.keys.total]
        if keyless or not self.tasks:
            raise ValueError(f"tasks without a key: {keyless}; observe() prompts of an open task")
        names, confidence = self.keys.infer(self._embed(input_ids, attention_mask), [*self.tasks])
        return (names, confidence) if return_confidence else names

    # ---- what it costs, and how it is kept

    def capacity(self):
        """{task: {"new": entries, "share" of the pool in use after it, "bytes": by kind}}.

        The bytes are those in the saved file; what all keys share counts with the first task.
        """
        report, used, dim = {}, decode(self.blank[0]), len(self.keys.square)
        for name, (code, routers) in self.tasks.items():
            mask = decode(code)
            new, used = int((mask & ~used).sum()), used | mask
            size = {"masks": len(code), "weights": 4 * new, "routers": 4 * routers.numel()}
            # Sums of 4 bytes, one for each task; one half of the symmetric x x^T for all.
            size["keys"] = 2 * dim * (2 * (name in self.keys.total) + (0 if report else dim + 1))
            report[name] = {"new": new, "share": used.float().mean().item(), "bytes": size}
        return report

    def summary(self):
        """What was matched, how large it is and what each task takes, as a text."""
        shapes = [f"{name} ({d} -> {o})" for name, (d, o) in self.layers[0].targets.items()]
        own = sum(p.numel() for layer in self.layers for p in layer.parameters())
        lines = [f"{len(self.layers)} attention layers, each with {', '.join(shapes)}",
                 f"{own:,} parameters are trained, those of the base are frozen"]
        lines += [f"{name:12} {e['new']:>9,} new entries, {e['share']:6.1%} of the pool in use, "
                  f"{sum(e['bytes'].values()):>9,} bytes" for name, e in self.capacity().items()]
        return "\n".join(lines)

    def _state(self):
        """All that `save` writes: few tensors, for each costs the file some 300 bytes."""
        return {
            "format": "MoSE 1",
            "base": fingerprint(self.model),
            "config": dataclasses.asdict(self.config),
            "router_frozen": not self.layers[0].router.requires_grad,
            "tasks": {name: len(code) for name, (code, _) in self.tasks.items()},
            "masks": torch.tensor([*b"".join(c for c, _ in self.tasks.values())]).byte(),
            "routers": torch.stack([r for _, r in [self.blank, *self.tasks.values()]])[1:],
            "values": torch.cat([layer.frozen.cpu() for layer in self.layers])[self._used()],
            "keys": [*self.keys.total],
            "totals": torch.stack([self.keys.square[0], *self.keys.total.values()])[1:],
            "square": self.keys.square[*torch.triu_indices(*self.keys.square.shape)],
        }

    def save(self, path):
        """Write the finished tasks to one file, which is replaced whole or not at all."""
        if self.open is not None:
            raise ValueError(f"task {self.open!r} is open: call end_task() before save()")
        buffer = io.BytesIO()
        torch.save(self._state(), buffer)
        with open(f"{path}.tmp", "wb") as file:
            file.write(buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the new name without content
        os.replace(f"{path}.tmp", path)

    @classmethod
    @torch.no_grad()
    def load(cls, model, path):
        """Attach to `model` what `save` wrote. No task is in force then, and learning can go on.

        Raises ValueError for a damaged file and for one that was made on another base.
        """
        with open(path, "rb") as file:
            data = file.read()
        if hashlib.sha256(data[:-32]).digest() != data[-32:]:
            raise ValueError(f"{path} is cut short, damaged or no MoSE file: copy or save it again")
        state = torch.load(io.BytesIO(data[:-32]), map_location="cpu", weights_only=True)
        mose = cls(model, MoSEConfig(**state.get("config", {})))
        wrong = sorted({fact[0] for fact in kinds(state) ^ kinds(mose._state())})
        if wrong:
            mose.detach()
            raise ValueError(f"{path} is not for this base: missing, unexpected or other {wrong}")
        codes = [bytes(c.tolist()) for c in state["masks"].split([*state["tasks"].values()])]
        mose.tasks = dict(zip(state["tasks"], zip(codes, state["routers"])))
        _, routers = [mose.blank, *mose.tasks.values()][-1]  # a shared router goes on from there
        used = mose._used()
        values = torch.zeros(len(used)).masked_scatter(used, state["values"])
        for i, (mask, value) in enumerate(zip(used.split(mose.sizes), values.split(mose.sizes))):
            mose.layers[i].keep(mask, value)
            mose.layers[i].weight.copy_(value)  # and so do shared values
            mose.layers[i].router.copy_(routers[i])
            mose.layers[i].router.requires_grad_(not state["router_frozen"])
        mose.keys.total = dict(zip(state["keys"], state["totals"]))
        rows, columns = torch.triu_indices(*mose.keys.square.shape)
        mose.keys.square[rows, columns] = mose.keys.square[columns, rows] = state["square"]
        return mose
