"""Mixtures of SubExperts (MoSEs): a language model learns task after task and forgets none.

An unofficial reference of arXiv 2511.06237 in plain PyTorch. Copy this file; it needs only torch.

The base is frozen. Each target layer y = x W of a self-attention module gets E low-rank experts;
the weights of all experts of a module are its pool of N entries. In each module a task has a
router, which sends every token to its top_k experts, and a mask, which says what it reads there:

    gate = top_k(softmax(x @ projection @ router.T))                                       (1)
    y    = x W + scale * sum_e gate_e * x @ A_e @ B_e                                      (2)
    A, B = mask * where(used, frozen, weight)                                              (3)

`used` marks the entries that some finished task reads. Their values come from the buffer `frozen`,
which no optimizer can hold, so the output of a finished task can't change: forgetting is ruled out
by construction. A new task takes at most the share `density` of the entries that are still free,
so the pool fills ever more slowly.

    mose = MoSE(model)
    mose.begin_task("FOMC")                             # may start from a finished task: see there
    mose.observe(prompt_ids)                            # its key, by which it is recognised later
    optimizer = torch.optim.AdamW(mose.trainable_parameters(), lr=1e-2)
    for ids, labels in batches:
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    mose.end_task()
    mose.set_task(mose.infer_task(prompt_ids))          # or set_task("FOMC"), if the task is known

Shapes: B batch, T tokens, D in, O out, E experts, R rank, K active experts (top_k), P what a router
reads of a token, N entries of a pool. In (1) x is what the module reads, in (2) its target.
CHOICE: the paper leaves it open. DIFFERS: from Winning SubNetworks, on which this builds.
"""

import bz2
import contextlib
import dataclasses
import functools
import hashlib
import io
import math
import os
import threading

import torch
from torch import nn

FORMAT = b"MoSE 2\n"  # how the files begin that `save` writes


@dataclasses.dataclass(frozen=True)
class MoSEConfig:
    """All that rebuilds the adapter; it travels in the checkpoint.

    Raises ValueError for a value outside its range.
    """

    # CHOICE: no value below is known from the paper. They follow from the search in
    # results/routing.md.
    targets: tuple = ("q_proj", "v_proj")  # linear layers, by the last part of their name
    num_experts: int = 4  # E >= 1, on every target
    rank: int = 16  # R >= 1, of each expert
    top_k: int = 2  # 1 <= K <= E, experts that a token is sent to
    density: float = 0.03  # in (0, 1]: share of the free entries that a new task takes
    scale: float = 8.0  # > 0, factor of the experts' sum
    router_dim: int = 16  # P >= 1
    router_std: float = 1.0  # > 0, spread of a new router: at 1 its gates differ from the start
    key_dim: int = 256  # >= 1, numbers of a task's key; cut to what the embeddings have

    def __post_init__(self):
        most = {"top_k": self.num_experts, "density": 1}
        for name, value in list(vars(self).items())[1:]:  # all but targets: see find_targets
            # Where the default is a whole number, the value has to be one too.
            kind, high = type(getattr(MoSEConfig, name)), most.get(name, math.inf)
            fits = type(value) in (int, kind) and 0 < value <= high  # np.float64 can't be loaded
            expect(fits, f"{name}: got {value!r}, expected 0 < {kind.__name__} <= {high}")


def expect(fine, message):
    if not fine:
        raise ValueError(message)


# ------------------------------------------------------------------------------ masks


def top_k_mask(score, k):
    """The bool mask of exactly the k largest scores (N,)."""
    # By index: a threshold keeps everything that ties with it, and the mask outgrows k.
    return torch.zeros_like(score).bool().index_fill(0, score.topk(k, sorted=False).indices, True)


def straight_through(weight, score, frozen, used, mask):
    """Equation (3), all (N,): values in the mask, 0 outside. Here, backward skips the masking.

    So every score gets the gradient times its value, whether the mask holds its entry or not, and
    can win a place (the straight-through estimator of Winning SubNetworks, ICML 2022). Every weight
    gets the gradient itself, unless it is used.
    """
    # DIFFERS: weights outside the mask learn too, not only their scores. B starts at 0, where the
    # gradient of a score is exactly 0: an entry of B outside the mask could not rise into it.
    value = torch.where(used, frozen, weight) * (1 + (score - score.detach()))  # times exactly 1
    return value - torch.where(mask, 0.0, value).detach()  # backward does not see this subtraction


# ------------------------------------------------------------------------------ experts


def top_k_gates(x, to_gates, k):
    """Equation (1): the gates (B, T, E) of tokens x (B, T, D), all but K of them 0.

    to_gates (D, E) is projection @ router.T of a task.
    """
    gates = torch.softmax(x @ to_gates, dim=-1)  # (B, T, E)
    best = gates.topk(k, dim=-1)  # (B, T, K)
    # CHOICE: chosen gates keep their softmax value. Scaled to sum to 1, a single one (K = 1) would
    # always be 1, and the router would never learn.
    return torch.zeros_like(gates).scatter(-1, best.indices, best.values)


def this_thread():
    """What a forward pass notes for its hooks is kept by thread: threads may share a model, and
    checkpointing runs it again in a thread of autograd's.

    A compiled graph can't ask for its thread. It need not: within one graph, what `route` writes
    and `add_delta` reads are plain values of that graph. So compile the whole model.
    """
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class SubExperts(nn.Module):
    """The pool of one attention module: the experts on all its targets, and the router over them.

    The pool is one vector: A (D, E*R) and B (E*R, O) of the first target, then of the next. Expert
    e has R columns of A, from e*R on, and the same rows of B.

    weight, score (N,), router (E, P)  of the open task: Parameters, which an optimizer moves
    frozen, used (N,)  values and places of finished tasks: buffers, so no optimizer holds them
    source (N,)  of the used ones, the mask of the finished task that the open one starts from
    tasks  {name: (mask (N,), router (E, P))} of finished tasks, on the CPU
    in_force  [(name, to_gates, [A, B, A, B, ..])] of the finished tasks that are in force
    now  {thread: [(rows, gates, [A, B, A, B, ..])]} of its last forward pass, one for each task
    """

    def __init__(self, attention, targets, inputs, config):
        """Hook an attention module that reads `inputs` numbers, and its targets {name: layer}."""
        super().__init__()
        self.config, width, self.shapes = config, config.num_experts * config.rank, []
        for d, o in map(in_out, targets.values()):
            self.shapes += [(d, width), (width, o)]
        # Quantised layers may have buffers only.
        device = [*attention.parameters(), *attention.buffers()][0].device
        zeros = torch.zeros(sum(map(math.prod, self.shapes)), dtype=torch.float32, device=device)
        self.weight, self.score = nn.Parameter(zeros.clone()), nn.Parameter(zeros.clone())
        self.router = nn.Parameter(zeros.new_zeros(config.num_experts, config.router_dim))
        # Not in state_dict(): an older one, put back, would undo the tasks finished since. `source`
        # belongs to the open task, and goes with its weight, score and router.
        self.register_buffer("frozen", zeros.clone(), persistent=False)
        self.register_buffer("used", zeros.bool(), persistent=False)
        self.register_buffer("source", zeros.bool())
        # CHOICE: routers read their module's input through a fixed random projection to P numbers.
        # With D numbers they would need as many bytes as the A of a LoRA of rank E, for every task.
        projection = (fixed_signs(inputs, config.router_dim) / math.sqrt(inputs)).to(zeros)
        self.register_buffer("projection", projection, persistent=False)
        self.tasks, self.num_new, self.now = {}, 0, {0: []}
        self.handles = [attention.register_forward_pre_hook(self.route, with_kwargs=True)]
        for i, layer in enumerate(targets.values()):
            self.handles += [layer.register_forward_hook(functools.partial(self.add_delta, i))]

    def _apply(self, fn, recurse=True):
        # It follows its module to another device, but not to another dtype: model.bfloat16() would
        # round what finished tasks read.
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)
        self.activate(self.names, self.learning)
        return self

    def __getstate__(self):
        return {**self.__dict__, "now": {0: []}}  # what is part of a graph can't be copied

    # ---- the life of a task

    @torch.no_grad()
    def begin(self, source, need, generator):
        """Open a task: from a finished one (source), or with a new router and new entries (None).

        need: how much of the usual number of new entries it takes, 0 .. 1.
        """
        # Here, since others may have switched it off, or left gradients of a task that was dropped.
        self.requires_grad_(True).zero_grad()
        # CHOICE: the share is of what is still free, so that the pool never runs out.
        self.num_new = int(need * self.config.density * (~self.used).sum())
        # So close together that some steps of an optimizer change their order.
        self.score.copy_(0.01 * torch.rand(self.score.shape, generator=generator))
        router = self.config.router_std * torch.randn(self.router.shape, generator=generator)
        mask, router = self.tasks.get(source, (torch.tensor(False), router))  # none: an empty mask
        self.source.copy_(mask)
        self.router.copy_(router)
        # Straight-through has moved free entries that were in no mask. Without a new start they
        # would be in this task's delta before it has learned anything. At 0 the delta is exactly
        # that of the source, whose A and B, which are not 0, give new entries their gradients.
        self.weight.zero_()
        if source is None:  # A uniform in +-1/sqrt(D), B at 0: the delta is exactly 0
            for A in self.unpack(self.weight, self.router)[1][::2]:
                A.copy_((2 * torch.rand(A.shape, generator=generator) - 1) / math.sqrt(len(A)))

    def select(self):
        """The open task's mask (N,): that of its source, and its best free entries."""
        # CHOICE: one mask is chosen for all A and B of a module together, so that what needs more
        # entries gets more.
        return self.source | top_k_mask(self.score.masked_fill(self.used, -math.inf), self.num_new)

    def finish(self, name):
        """Freeze what the open task reads. If that failed halfway, it can be called again."""
        if name not in self.tasks:
            mask = self.select()
            self.frozen.copy_(torch.where(mask & ~self.used, self.weight.detach(), self.frozen))
            self.tasks[name] = mask.cpu(), self.router.detach().to("cpu", copy=True)
        self.protect()

    def protect(self):
        """Mark as used what the finished tasks read, and free all else."""
        # (A sum of bools is their union.)
        self.used.copy_(sum((mask for mask, _ in self.tasks.values()), torch.tensor(False)))
        self.frozen.masked_fill_(~self.used, 0.0)

    # Autograd can't save what is made in inference mode for a backward pass through it later.
    @torch.inference_mode(False)
    def activate(self, names, learning=False):
        """Put finished tasks in force: a name for each example, or one for all; None is the bare
        base. Or the open task (learning): then names is [None], which stands for it.

        What finished tasks read is built here once, and not for every token. What the open one
        reads changes with every step, so `route` builds it.
        """
        self.names, self.learning, self.in_force = names, learning, []
        for name in sorted({*names} - {None}):
            mask, router = (tensor.to(self.used.device) for tensor in self.tasks[name])
            self.in_force.append((name, *self.unpack(torch.where(mask, self.frozen, 0.0), router)))

    def unpack(self, pool, router):
        """(to_gates (D, E), [A (D, E*R), B (E*R, O), A, B, ..]) of a pool (N,) and a router."""
        parts = zip(pool.split([*map(math.prod, self.shapes)]), self.shapes)
        return self.projection @ router.mT, [part.view(shape) for part, shape in parts]

    # ---- the life of a token

    def route(self, attention, args, kwargs):
        """Forward pre-hook of the attention module: equation (1), and (3) for the open task."""
        x = args[0] if args else kwargs["hidden_states"]  # (B, T, D)
        times, rest = divmod(len(x), len(self.names))  # generate repeats examples: beams, answers
        expect(not rest, f"got {len(self.names)} tasks for a batch of {len(x)} examples: one each")
        now = self.now[this_thread()] = []
        if self.learning:
            pool = straight_through(self.weight, self.score, self.frozen, self.used, self.select())
        with torch.autocast(x.device.type, enabled=False):  # or gates would be rounded to bf16
            open_task = [(None, *self.unpack(pool, self.router))] if self.learning else []
            for task, to_gates, matrices in open_task or self.in_force:
                own = (i for i in range(len(x)) if self.names[i // times] == task)
                rows = torch.tensor([*own], device=x.device) if len(self.names) > 1 else slice(None)
                gates = top_k_gates(x[rows].float(), to_gates, self.config.top_k)  # (B, T, E)
                gates = self.config.scale * gates.repeat_interleave(self.config.rank, dim=-1)
                now.append((rows, gates, matrices))  # gates (B, T, E*R): one for each column of A

    def add_delta(self, i, layer, args, out):
        """Forward hook of target i: equation (2), all experts in two matrix products."""
        for rows, gates, matrices in self.now[this_thread()]:
            A, B = matrices[2 * i : 2 * i + 2]  # (D, E*R), (E*R, O)
            x = args[0][rows].float()  # (B, T, D); the base may be bf16, and autocast goes its way
            expect(x.shape[:2] == gates.shape[:2], f"target {i} reads other tokens than its router")
            delta = ((x @ A * gates) @ B).to(out.dtype)  # (B, T, E*R) -> (B, T, O)
            out = out + delta if isinstance(rows, slice) else out.index_add(0, rows, delta)
        return out


# ------------------------------------------------------------------------------ helpers


def fixed_signs(*shape):
    """Numbers -1.0 or 1.0, the same on every machine, so never stored.

    From a hash, since torch promises no fixed sequence of its generators: with other signs all
    saved routers and keys would be worthless.
    """
    digest = bytearray(hashlib.shake_256(b"MoSEs").digest(math.prod(shape)))
    return (torch.frombuffer(digest, dtype=torch.uint8) % 2).float().view(shape) * 2.0 - 1.0


def in_out(layer):
    """(D, O) of an nn.Linear, of a quantised one and of GPT-2's Conv1D; None for other layers."""
    names = ("in_features", "out_features") if hasattr(layer, "in_features") else ("nx", "nf")
    return tuple(getattr(layer, name) for name in names) if hasattr(layer, names[1]) else None


def find_targets(model, wanted):
    """[(attention module, {name: target}, D)] of all attention modules that hold a wanted layer.

    Raises ValueError for a name that no layer has, and for a layer that may read other tokens than
    the router, which reads what its attention module reads.
    """
    found, fit, unfit = [], set(), set()
    for path, module in model.named_modules():
        layers = {name: layer for name, layer in module.named_children() if in_out(layer)}
        if layers and "att" in f"{path.split('.')[-1]} {type(module).__name__}".lower():
            inputs = in_out([*layers.values()][0])[0]  # D, of q_proj or its like
            cross = any(word in path.lower() for word in ("cross", "encdec", "encoder_attn"))
            # A target has D as its input (q, k, v) or its output (o). Others, such as kv_b_proj of
            # MLA, read a compressed cache: more tokens than the module does. One bad place rules a
            # name out.
            for name, layer in layers.items():
                (unfit if cross or inputs not in in_out(layer) else fit).add(name)
            found.append((module, {n: layers[n] for n in layers if n in wanted}, inputs))
    wrong, fit = sorted({*wanted} - (fit - unfit)), sorted(fit - unfit)
    expect(wanted and not wrong, f"{wrong} can't be targets: not in an attention module or reading "
           f"other tokens than its router (cross-attention, compressed keys); there are {fit}")
    return [entry for entry in found if entry[1]]


def fingerprint(model):
    """Two numbers for each tensor of a base, nearly the same for its fp32, fp16 and bf16 copies.

    For a tensor W they are u W V / |W| with fixed signs u and V: they depend on what stands where,
    and rounding moves them by thousandths.
    """
    numbers, positions = [], [b for b in model.named_buffers() if b[0].endswith(".inv_freq")]
    for name, tensor in [*model.named_parameters(), *positions]:
        if ".sub_experts." not in name:
            W = tensor.detach().float().reshape(len(tensor) if tensor.dim() > 1 else 1, -1)
            u, V = fixed_signs(1, len(W)).to(W), fixed_signs(W.shape[1], 2).to(W)
            numbers.append((u @ W @ V / W.norm()).nan_to_num().cpu())
    return torch.cat(numbers)


# ------------------------------------------------------------------------------ the whole


class MoSE:
    """Attaches sub-experts to a model, and manages its tasks and their keys.

    layers: the SubExperts of each attention module; tasks: names of the finished tasks, in order;
    open: the task being learned, or None; active: what `set_task` got.

    A task's key, by which it is recognised, is made of running sums: no prompt is kept. A prompt is
    a vector x of key_dim numbers. key_means: {task: mean of its x}; key_scatter: sum of
    (x - mean) (x - mean)^T over all key_count prompts of tasks that ended; key_new: the sums of the
    open task, which count when it ends.
    """

    @torch.inference_mode(False)  # its Parameters are to be trained, wherever it is made
    def __init__(self, model, config=None):
        """Attach to `model` and freeze it. ValueError if a target does not fit it."""
        self.model, self.config = model, config or MoSEConfig()
        self.tasks, self.open, self.active = [], None, None
        expect(SubExperts not in map(type, model.modules()), "a MoSE is attached: detach() it")
        expect(not any(p.is_meta for p in model.parameters()),
               "part of the base is offloaded (meta device): load it without that")
        self.attached = find_targets(model, self.config.targets)
        dim = min(self.config.key_dim, model.get_input_embeddings().weight.shape[1])
        self.key_means, self.key_scatter, self.key_count = {}, torch.zeros(dim, dim), 0
        self.unfrozen = nn.ParameterList(p for p in model.parameters() if p.requires_grad)
        model.requires_grad_(False)  # detach() switches on again what is in `unfrozen`
        for attention, targets, inputs in self.attached:
            attention.sub_experts = SubExperts(attention, targets, inputs, self.config)
        self.layers = [attention.sub_experts for attention, _, _ in self.attached]
        self.own = {name for name in model.state_dict() if ".sub_experts." in name}
        self.set_task(None)

    def detach(self):
        """Take everything off: the base is what it was, bit for bit."""
        expect(self.layers[0] in self.model.modules(), "this MoSE is detached already")
        for attention, _, _ in self.attached:
            for handle in attention.sub_experts.handles:
                handle.remove()
            del attention.sub_experts
        self.unfrozen.requires_grad_(True)

    # ---- the life of a task

    def begin_task(self, name, probe=None):
        """Open a task; returns the finished task that it starts from, or None.

        From None its delta is exactly 0 until it is trained. probe() tells how much is left to
        learn, say the share of its examples that are answered wrong; it is called under the bare
        base and under each finished task. ValueError if it would start from None without an entry.
        """
        expect(self.open is None and isinstance(name, str) and name not in self.tasks,
               f"{name!r}: expected a task not in {self.tasks}; open {self.open!r}: end_task() it")
        left = {}
        for source in [None, *self.tasks] if probe else ():
            with self.task(source), torch.no_grad():
                left[source] = float(probe())
        expect(all(0 <= v < math.inf for v in left.values()), f"probe() gave {left}, expected >= 0")
        # CHOICE: a new task starts from the one that leaves least to learn, if that is well below
        # what the base leaves. It takes that share of the new entries. How the paper reuses old
        # experts is not known.
        source = min(left, key=left.get, default=None)
        need = left[source] / left[None] if source is not None else 1.0
        start = [(source, need) if need < 0.75 else (None, 1.0), int(torch.randint(2**62, ()))]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(start)  # a task has to start alike on all ranks
        (source, need), generator = start[0], torch.Generator().manual_seed(start[1])
        for layer in self.layers:
            layer.begin(source, need, generator)
        # (From a source a task may get none: its router still learns.)
        expect(source is not None or any(layer.num_new for layer in self.layers),
               f"{name!r} gets no entry: density x free is under 1; forget() a task first")
        self.open, self.key_new = name, (0, 0.0, 0.0)  # number of prompts, sum of x and of x x^T
        self.set_task(name)
        return source

    def trainable_parameters(self):
        """The open task's Parameters. Give each task a fresh optimizer: old momentum is noise."""
        expect(self.open is not None, "no task is open: call begin_task(name) first")
        return [p for layer in self.layers for p in layer.parameters() if p.requires_grad]

    def end_task(self):
        """Freeze all that the open task reads; returns its entry of `capacity()`.

        If it fails halfway, out of memory say, the task stays open: call it again, or forget().
        """
        expect(all(p.isfinite().all() for p in self.trainable_parameters()),
               f"task {self.open!r} is not finite: forget() it, lower the rate")
        name, (count, total, square) = self.open, self.key_new
        for layer in self.layers:
            layer.finish(name)
        if count:
            self.key_means[name], self.key_count = (total / count).float(), self.key_count + count
            self.key_scatter += (square - torch.outer(total, total) / count).float()
        self.tasks, self.open = [*self.tasks, name], None
        self.set_task(name)
        return self.capacity()[name]

    def forget(self, name):
        """Remove a task, or drop the open one; while one is open, only that one can go. What the
        others compute stays the same, bit for bit."""
        known = self.tasks if self.open is None else [self.open]
        expect(name in known, f"can't forget {name!r}: expected one of {known}")
        for layer in self.layers:
            layer.tasks.pop(name, None)
            layer.protect()
        self.tasks, self.open = [task for task in self.tasks if task != name], None
        self.key_means.pop(name, None)  # the scatter stays: it tells how prompts differ in general
        gone = name == self.active or isinstance(self.active, list) and name in self.active
        self.set_task(None if gone else self.active)

    # ---- which task is in force

    def set_task(self, task):
        """A task for all examples, a list with one finished task per example, or None for the base.

        A batch may be a multiple of the list: generate repeats examples for beams and answers. A
        task is set for all threads. Keep it until after backward(): gradient checkpointing runs the
        forward pass once more.
        """
        learning = task is not None and task == self.open
        names = [*task] if isinstance(task, list) else [task]  # a copy: the caller may change it
        expect(learning or names and {*names} <= {None, *self.tasks},
               f"unknown task {task!r}: finished so far are {self.tasks}")
        for layer in self.layers:
            with torch.autocast(layer.used.device.type, enabled=False):  # or to_gates would be bf16
                layer.activate([None] if learning else names, learning)
        self.active = names if isinstance(task, list) else task
        # save_pretrained() writes the base alone, and with it a task that is open: Trainer makes
        # its checkpoints so.
        ignored = {*(getattr(self.model, "_keys_to_ignore_on_save", None) or ())} - self.own
        self.model._keys_to_ignore_on_save = ignored if self.open else ignored | self.own

    def task(self, task):
        """`with mose.task("FOMC"): ...`, then back to what was in force before."""
        stack = contextlib.ExitStack()  # leaving its with-block calls back, after an error too
        stack.callback(self.set_task, self.active)
        self.set_task(task)
        return stack

    # ---- task keys

    # CHOICE: the task is inferred from the prompt's token embeddings, before any pass through the
    # model: the nearest mean by Mahalanobis distance, with one covariance for all tasks (linear
    # discriminant analysis). How the paper infers it is not known.

    def _embed(self, input_ids, attention_mask):
        """Prompts (B, T) -> x (B, key_dim): mean token embeddings under a fixed projection."""
        table, prompts = self.model.get_input_embeddings().weight.detach(), []
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        expect(real.dim() == 2 and real.shape == input_ids.shape, "expected ids and masks (B, T)")
        for ids, own in zip(input_ids.to(table.device), real.to(table.device).bool()):
            expect(own.any(), "a prompt is nothing but padding: expected at least one token")
            # CHOICE: a token that occurs n times counts 1 + log n times, so that the words that all
            # prompts have don't hide those that tell tasks apart.
            tokens, times = ids[own].unique(return_counts=True)
            weights = 1 + times.float().log()
            prompts.append(weights @ table[tokens].float() / weights.sum())
        x = torch.stack(prompts).cpu() @ fixed_signs(table.shape[1], len(self.key_scatter))
        return x.double()  # for differences of large sums

    def observe(self, input_ids, attention_mask=None):
        """Let prompts (B, T) of the open task feed its key; no pass through the model.

        With several processes, let each observe all prompts: the sums are not shared.
        """
        expect(self.open is not None, "no task is open: call begin_task(name) before observe()")
        x, (count, total, square) = self._embed(input_ids, attention_mask), self.key_new
        self.key_new = count + len(x), total + x.sum(0), square + x.T @ x

    def infer_task(self, input_ids, attention_mask=None, return_confidence=False):
        """The task of each prompt (B, T), a list of names; no pass through the model.

        With return_confidence also their probabilities: near 0 for a prompt far from every task.
        """
        keyless = {*self.tasks} - {*self.key_means}
        expect(self.tasks and not keyless, f"no key: {keyless}; observe() prompts of an open task")
        x, cov = self._embed(input_ids, attention_mask), self.key_scatter.double() / self.key_count
        means = [self.key_means[name].double() for name in self.tasks]  # (key_dim,) each
        # A ridge, for directions in which prompts so far don't differ: few prompts show few. A bit
        # of a mean's square keeps cov invertible even if no two prompts differ.
        ridge = (0.01 + 0.25 * len(cov) / self.key_count) * cov.diagonal().mean()
        ridge += 1e-4 * means[0].square().mean()
        root = torch.linalg.cholesky(cov + ridge * torch.eye(len(cov)))  # once, for all tasks
        # CHOICE: "none of these" is one more class, in the middle of all and 3 times as wide.
        # Without it, a prompt far from every task would belong to the nearest for sure.
        classes = [(mean, root) for mean in means] + [(sum(means) / len(means), 3 * root)]
        normal = functools.partial(torch.distributions.MultivariateNormal, validate_args=False)
        logits = torch.stack([normal(m, scale_tril=r).log_prob(x) for m, r in classes], dim=1)
        names = [self.tasks[i] for i in logits[:, :-1].argmax(1)]
        return (names, logits.softmax(1)[:, :-1].amax(1).tolist()) if return_confidence else names

    # ---- what it costs, and how it is kept

    def capacity(self):
        """{task: {"new": entries, "share" of the pool in use after it, "bytes": by kind}}.

        The bytes are about those in the saved file; what all keys share counts with the first task.
        """
        # Of keys: a mean for each task; half of the symmetric scatter once, with the first task.
        report, dim, used = {}, len(self.key_scatter), torch.tensor(False)
        for name in self.tasks:
            mask = torch.cat([layer.tasks[name][0] for layer in self.layers])
            new, used = int((mask & ~used).sum()), mask | used
            size = {"masks": len(bz2.compress(bytes(mask.tolist()))), "weights": 4 * new,
                    "routers": 4 * sum(layer.router.numel() for layer in self.layers),
                    "keys": 4 * dim + (0 if report else 2 * dim * (dim + 1))}
            report[name] = {"new": new, "share": used.float().mean().item(), "bytes": size}
        return report

    def summary(self):
        """What was matched, and what each task takes, as a text."""
        lines = [f"{len(self.layers)} attention modules with experts on {self.config.targets}"]
        for name, task in self.capacity().items():
            size = f"{sum(task['bytes'].values()):,} bytes"
            lines += [f"{name}: {task['new']:,} new entries, {task['share']:.1%} in use, {size}"]
        return "\n".join(lines)

    def save(self, path):
        """Write the finished tasks to one file, which is replaced whole or not at all."""
        expect(self.open is None, f"task {self.open!r} is open: call end_task() before save()")
        buffer = io.BytesIO()
        torch.save({
            "config": dataclasses.asdict(self.config), "base": fingerprint(self.model),
            "layers": [(layer.tasks, layer.frozen[layer.used].cpu()) for layer in self.layers],
            "tasks": self.tasks, "keys": (self.key_means, self.key_scatter.triu(), self.key_count),
        }, buffer)  # triu: one half of a symmetric matrix is enough, and zeros compress well
        # With a name of its own: several processes may save at the same time.
        with open(f"{path}.{os.getpid()}.tmp", "wb") as file:
            file.write(FORMAT + bz2.compress(buffer.getvalue()))  # its checksum shows any damage
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the new name without content
        os.replace(file.name, path)

    @classmethod
    def load(cls, model, path):
        """Attach to `model` what `save` wrote. No task is in force then, and learning can go on.

        Raises ValueError, and leaves the model alone, for a file that is damaged, of another format
        or made on another base.
        """
        with open(path, "rb") as file:
            data, mose = file.read(), None
        try:
            expect(data.startswith(FORMAT), f"its format is {data[:7]!r}, expected {FORMAT!r}")
            state = torch.load(io.BytesIO(bz2.decompress(data[len(FORMAT):])), weights_only=True)
            mose = cls(model, MoSEConfig(**state["config"]))
            mose._restore(**state)
        except Exception as error:
            if mose:
                mose.detach()
            raise ValueError(f"{path}: damaged, outdated or not for this base: {error}") from error
        return mose

    def _restore(self, config, base, layers, tasks, keys):
        """The inverse of `save`. Any error says that this is not what it wrote for this base."""
        far = (fingerprint(self.model) - base).abs().max()
        expect(far < 0.01, "it was made on a base of other layers, weights or positions")
        for layer, (records, values) in zip(self.layers, layers, strict=True):
            layer.tasks = {name: records[name] for name in tasks}
            layer.protect()
            layer.frozen[layer.used] = values.to(layer.used.device)  # fails at another number
            # Only a check: it fails if a router has another shape.
            torch.stack([layer.router.cpu(), *(router for _, router in layer.tasks.values())])
        self.tasks, (self.key_means, scatter, self.key_count) = tasks, keys
        self.key_scatter.copy_(scatter + scatter.triu(1).mT)
