"""Mixtures of SubExperts (MoSEs): a language model learns task after task and forgets none.

An unofficial reconstruction of arXiv 2511.06237 in plain PyTorch, made from its abstract,
introduction and captions. Copy this file: it needs only torch, 2.13 or newer.

The base model is frozen. Each adapted linear layer y = x W, with D inputs and O outputs, gets a
mixture of E low-rank experts. Expert e is a pair of matrices A_e (D, R) and B_e (R, O) of rank R.
All weights of the layer's experts form its pool, and each single weight is an entry of it. Each
entry is owned by one task at most, and nobody changes it from then on. The part of an expert that a
task reads is a SubExpert. In each layer a task also has a router, whose gates weigh the experts for
each token. All but top_k gates are 0:

    gate  = top_k(softmax(x @ projection @ router.T))                                 (1)
    y     = x W + scale * sum over e of gate_e * (x @ A_e) @ B_e                      (2)
    A, B  = reads * where(used, frozen, weight)                                       (3)
    reads = inherited | the free entries with the best scores, while a task learns    (4)
    d loss / d weight = grad,  d loss / d score = grad * weight, for free entries     (5)

In (1) and (2), x is what the layer reads: D features of each token. `router` (E, P) does not see
these, but P features that `projection` (D, P), which is random and fixed, makes of them. `scale` is
a constant. (3) to (5) are about all entries of the pool:

    reads      marks the entries that the task in force reads, and all others count as 0. (The task
               in force is the one that the forward pass applies.)
    used       marks the entries that finished tasks own, and the others are free. (When a task is
               forgotten, those that others read stay used.)
    frozen     has the values of the used entries. It is a buffer, so no optimizer holds it.
    weight     is the Parameter with the values of the free entries, which the optimizer changes.
    score      is a Parameter too: a number for each free entry. (4) selects as many entries as the
               task may own, in A and in B separately. They are its mask, which is made anew in each
               forward pass.
    inherited  marks what the task reads of finished tasks. It stays the same while the task learns.

In (5), grad is the gradient of the loss with respect to an entry of A or B in (3). The choice in
(4) has no useful gradient. So a score gets the one that it would have as a factor in the place of
`reads`. A weight gets grad, whether its entry is read or not. When the task ends, it owns the free
entries that are selected then. From then on it reads these and what it inherited.

A task without a source inherits all entries of A that were used when it began. Their values are
stored already, so it takes no more bytes to read them, and they give its own B more input. It reads
no used entries of B, which would add the outputs of earlier tasks to its own. But a task may start
from a finished task, its source. Then it inherits what its source reads, and nothing else. Say that
task 3 starts from task 2, and that the others have no source. Then task 2 reads its own entries and
those of task 1 in A. Task 3 reads its own entries and what task 2 reads. Task 4 reads its own
entries and those of tasks 1, 2 and 3 in A.

So nothing that a finished task computes can change. The entries that it reads are used, and later
tasks change free ones alone. Which entries these are was fixed when it ended. And its routers are
stored. So a task that is put in force by its name is never forgotten. (If its name is inferred from
the prompt, a later task may be found instead.)

    mose = MoSE(model)
    mose.begin_task("FOMC")
    mose.observe(train_prompt_ids, train_mask)          # makes the key that recognises the task
    rate = 0.22 / model.config.hidden_size ** 0.5       # from our searches: search it on your model
    # (Weight decay would pull weights, scores and routers towards 0.)
    optimizer = torch.optim.AdamW(mose.trainable_parameters(), lr=rate, weight_decay=0.0)
    # The rate falls to 0. (Ours also rises at first. Constant, it should be about half of this.)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for ids, labels in batches:                         # labels: -100 on prompt and padding
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    mose.end_task()
    mose.set_task(mose.infer_task(test_prompt_ids, test_mask))    # or set_task("FOMC"), if known

Shapes: B batch, T tokens, D in, O out, E experts, R rank, K active experts (top_k), P features that
a router reads, N = E * R * (D + O) entries of a pool. (In a shape, B is the batch. Everywhere else
it is the second matrix of the experts.)

With the option fixed_A, all tasks, and all layers with the same D, share a random A that never
changes. Then only B has a mask, (3) to (5) are about B alone, and N = E * R * O.

CHOICE marks what we chose because we did not have the paper's method section. How a task finds a
source, and a prompt its task, is wholly ours.
DIFFERS marks where we depart from Winning SubNetworks (ICML 2022), on which the method builds. In
these, each weight of a network has a learned score, and the mask of a task selects the best ones.

To learn the method, read down to the double line in the class MoSE. Skip the last part of the class
SubExperts, which says that it is not the method. Below the double line are forgetting, saving and
checks, and also TaskKeys: how a prompt finds its task.
"""

import contextlib
import dataclasses
import hashlib
import io
import lzma
import math
import os
import warnings

import torch
from torch import nn


def expect(condition, message):
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class MoSEConfig:
    """All that is needed to rebuild the adapter, apart from what the tasks have learned.

    Raises ValueError for a value outside its range.
    """

    # CHOICE: the paper's own values are not known to us. Of these, we searched scale and density.
    # (For the density, the search preferred 0.02 and 0.03. The default is lower, to save bytes.)
    targets: tuple = ("q_proj", "v_proj")  # names of linear layers, or ends of their dotted paths
    num_experts: int = 4  # E >= 1, on every target
    rank: int = 16  # R >= 1, of each expert
    top_k: int = 2  # K, 1 <= K <= E
    density: float = 0.01  # in (0, 1], the share of the free entries of A and of B that a task owns
    fixed_A: bool = False  # True: A is random, the same for all tasks, never learned or stored
    scale: float = 8.0  # > 0, factor of the experts' sum, as alpha / rank is that of a LoRA
    router_dim: int = 16  # P >= 1
    # > 0, standard deviation of a new router. If the numbers of a token have a mean square of 1,
    # its logits vary by router_std * sqrt(router_dim), here 4: its gates are clearly unequal.
    router_std: float = 1.0
    key_dim: int = 256  # >= 1, length of the mean in a key, at most the width of the embeddings
    round_to_bf16: bool = False  # True: what a task has learned is rounded, so its file is smaller

    def __post_init__(self):
        targets = [self.targets] if isinstance(self.targets, str) else self.targets
        expect(isinstance(targets, (list, tuple, set)),
               f"targets: got {targets!r}, expected names of linear layers")
        names = [plain_str(name) for name in targets]
        if isinstance(targets, set):  # it has no order of its own
            names.sort()
        object.__setattr__(self, "targets", tuple(names))
        expect(self.targets, "targets: got none, expected the name of a linear layer")
        for name in ("num_experts", "rank", "top_k", "router_dim", "key_dim"):
            value = getattr(self, name)
            fits = type(value) is int and value >= 1
            expect(fits, f"{name}: got {value!r}, expected an int >= 1")
        for name in ("density", "scale", "router_std"):
            value = getattr(self, name)
            fits = type(value) in (int, float) and 0 < value < math.inf
            expect(fits, f"{name}: got {value!r}, expected a finite float > 0")
        for name in ("fixed_A", "round_to_bf16"):
            value = getattr(self, name)
            expect(type(value) is bool, f"{name}: got {value!r}, expected a bool")
        expect(self.density <= 1, f"density: got {self.density}, expected at most 1")
        expect(self.top_k <= self.num_experts,
               f"top_k: got {self.top_k}, expected at most num_experts = {self.num_experts}")


# ------------------------------------------------------------------------------ masks and gates


def top_k_mask(scores, k):
    """A bool mask of the shape of `scores`, a vector, that marks exactly the k largest."""
    # A threshold would also keep all scores that tie with it, and the mask would outgrow k.
    best = scores.topk(k, sorted=False).indices  # (k,)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[best] = True
    return mask


class StraightThrough(torch.autograd.Function):
    """Equations (3) and (5) on a pool. All arguments are (N,).

    Forward gives the values of the entries that are read, and 0 elsewhere. Backward is a
    straight-through estimator, as in Winning SubNetworks: the choice of the mask counts as a
    factor. Here the weights and scores of all free entries get gradients, whether they are read or
    not, and those of used entries get 0. `score` is an argument only to get its gradient.
    """

    @staticmethod
    def forward(ctx, weight, score, frozen, used, reads):
        value = torch.where(used, frozen, weight)
        ctx.save_for_backward(value, used)
        return torch.where(reads, value, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable  # torch refuses a second one: it would be wrong
    def backward(ctx, grad):
        value, used = ctx.saved_tensors
        # DIFFERS: the weights outside the mask learn too. In Winning SubNetworks only their scores
        # do. But B starts at 0 (as A does where the task reads that of a source). A weight that
        # stayed at 0 would make the gradient of its score 0, so the score could never learn.
        grad_weight = torch.where(used, 0.0, grad)
        # Used entries can't be selected, so their scores have nothing to learn.
        grad_score = torch.where(used, 0.0, grad * value)
        return grad_weight, grad_score, None, None, None


def top_k_gates(logits, k):
    """The gates (B, T, E) of equation (1) from the router's logits (B, T, E): all but K are 0."""
    gates = torch.softmax(logits, dim=-1)  # (B, T, E)
    best = gates.topk(k, dim=-1)  # values and indices, both (B, T, K)
    # CHOICE: the chosen gates keep their softmax value. If they were scaled to sum to 1, a single
    # one (K = 1) would always be 1, and the router would get no gradient.
    return torch.zeros_like(gates).scatter(-1, best.indices, best.values)  # (B, T, E)


# ------------------------------------------------------------------------------ the experts

SCORE_SPREAD = 0.004  # new scores are uniform in 0 .. SCORE_SPREAD
CPU_FP32 = {"dtype": torch.float32, "device": "cpu"}  # the caller may have changed torch's defaults


class SubExperts(nn.Module):
    """All that one linear layer holds: the experts in one pool, and the routers of all tasks.

    (It is named after the method. What one task reads of an expert is called a SubExpert. Where the
    code says `layer`, it means an object of this class, and the adapted layer is `linear`.)

    The pool is one vector of N entries: A (D, E*R), then B (E*R, O). Expert e has the columns
    e*R .. (e+1)*R of A and the same rows of B. `projection` (D, P) is a buffer. If the config says
    fixed_A, the A of all tasks is a buffer too, and the pool is B alone: its A has no rows.

    Tasks have numbers here, from 1 on. A lineage is a list of them: the number of a task, then that
    of its source, then that of the source's source, and so on. Task 5 has the lineage [5, 2] if it
    starts from task 2, and task 2 has no source.

    The open task is the one that is being learned. It has:
    weight, score   (N,), Parameters
    router          (E, P), a Parameter
    inherited       (N,), bool, the entries of finished tasks that it reads
    num_new         [in A, in B], how many entries it will own
    number          its number; 0 while no task is open
    `begin` sets them anew, all but the number.

    The finished tasks:
    frozen          (N,), values of the used entries: a buffer, so no optimizer can hold them
    owner           (N,), number of the task that learned the entry; 0 if it is free. When this task
                    is forgotten, entries that others read keep the number.
    routers         {number: router (E, P)}, on the CPU, since only a task in force needs its router

    One task is in force for the whole batch, or each row has a task of its own:
    in_force        [(rows, matrices)], a pair for each of these tasks. `rows` are its rows of the
                    batch, or None for all rows. (Rows that are in no pair get the bare base.)
                    `matrices` are the two by which a token is multiplied (see the method of this
                    name), or None for the open task: they change at each step, so they are made
                    anew in each pass.
    num_rows        how many rows a batch must have, if each row has a task of its own; or None

    handle          of the forward hook, by which it is found again
    """

    def __init__(self, linear, config):
        """`linear` maps D to O numbers: nn.Linear, a quantised one, or GPT-2's Conv1D."""
        super().__init__()
        self.config = config
        D, O = in_out(linear)
        width = config.num_experts * config.rank  # E*R
        self.shape_A = (0 if config.fixed_A else D, width)
        self.shape_B = (width, O)
        self.size_A = math.prod(self.shape_A)
        zeros = torch.zeros(self.size_A + math.prod(self.shape_B), device=device_of(linear),
                            dtype=torch.float32)
        self.weight = nn.Parameter(zeros.clone())
        self.score = nn.Parameter(zeros.clone())
        self.router = nn.Parameter(zeros.new_zeros(config.num_experts, config.router_dim))
        # CHOICE: each layer has a router of its own, which reads what the layer reads, through a
        # fixed random projection to P numbers. A router on all D numbers would need as many bytes
        # for each task as the matrix A of a LoRA of rank E. (fixed_signs gives numbers -1 or 1, the
        # same on every machine. Divided by sqrt(D), they keep the mean square of a token.)
        projection = fixed_signs(D, config.router_dim) / math.sqrt(D)
        # None of these buffers is persistent, so none is in state_dict(). If `frozen` and `owner`
        # were, loading an old state_dict() would undo finished tasks. The others need not be kept,
        # since they are made anew.
        self.register_buffer("projection", projection.to(zeros), persistent=False)
        if config.fixed_A:
            # Its variance is 1 / (3 D), that of the numbers that `draw` draws for an A that is
            # learned. (But a task reads the whole of a fixed A, and only a part of a learned one.)
            # Its signs are those of `projection` if E*R is P. That does no harm that we know of.
            fixed_A = fixed_signs(D, width) / math.sqrt(3 * D)
            self.register_buffer("fixed_A", fixed_A.to(zeros), persistent=False)
        self.register_buffer("frozen", zeros.clone(), persistent=False)
        self.register_buffer("owner", zeros.int(), persistent=False)
        self.register_buffer("inherited", zeros.bool(), persistent=False)
        self.number = 0
        self.num_new = [0, 0]
        self.routers = {}
        self.in_force = []
        self.num_rows = None
        self.handle = None  # until `MoSE` attaches it

    def split(self, pool):
        """A pool (N,) as A (D, E*R) and B (E*R, O), both views of it. (fixed_A: A has no rows.)"""
        A, B = pool[:self.size_A], pool[self.size_A:]
        return A.view(self.shape_A), B.view(self.shape_B)

    # ---- what a task reads

    def read_by(self, lineage):
        """The used entries that a task with this lineage reads, a bool mask (N,).

        These are the entries that the tasks of its lineage own, and the entries of A that were
        used when its root began. The root is the last number of the lineage: the task that started
        as the bare base. Entries that were used then belong to tasks with smaller numbers. No later
        task has such a number, so this set never grows. Say the lineage is [5, 2]. Then these are
        all entries that tasks 5 and 2 own, and those that task 1 owns in A.

        For a finished task, this is `reads` of equation (3). For a task that begins and owns
        nothing yet, it is `inherited` of equation (4).
        """
        # CHOICE: a task without a source reads all used entries of A. Nothing has to be stored for
        # that, and its B gets more input. It does not read the used entries of B, which would add
        # the outputs of all earlier tasks to its own. (A task with a source starts as an exact
        # copy of it, so it reads no more than the source does.)
        root = lineage[-1]
        mask = torch.isin(self.owner, self.owner.new_tensor(lineage))
        mask_A, _ = self.split(mask)  # a view: what is written there is in `mask`
        owner_A, _ = self.split(self.owner)
        mask_A |= (0 < owner_A) & (owner_A < root)
        return mask

    def select(self):
        """The mask of the open task (N,): in A and in B, the free entries with the best scores."""
        # DIFFERS: only free entries compete. In Winning SubNetworks a mask may also select used
        # ones. Here the lineage alone decides which used entries a task reads (`read_by`).
        # (It owns nothing until it ends. But if `end_task` was interrupted, it may own some of its
        # entries, and a second call has to select the same ones.)
        of_others = (self.owner > 0) & (self.owner != self.number)
        free_score = self.score.masked_fill(of_others, -math.inf)
        score_A, score_B = self.split(free_score)
        num_A, num_B = self.num_new
        mask_A, mask_B = top_k_mask(score_A.flatten(), num_A), top_k_mask(score_B.flatten(), num_B)
        return torch.cat([mask_A, mask_B])

    # ---- the life of a token

    def matrices(self, pool, router):
        """The two matrices by which a token is multiplied.

        The first (D, E*R + E) is A of all experts and, beside it, projection @ router.T. So one
        product with the token x gives both x @ A and the logits of the gates. The second (E*R, O)
        is scale * B: `delta` multiplies x @ A by the gates, and then by this matrix.
        """
        A, B = self.split(pool)
        if self.config.fixed_A:
            A = self.fixed_A
        with autocast_off(pool.device):  # in bf16, small steps of a router would have no effect
            to_logits = self.projection @ router.T  # (D, E)
        return torch.cat([A, to_logits], dim=1), self.config.scale * B

    def open_matrices(self):
        """The matrices of the open task. They change with each step of its optimizer."""
        with torch.no_grad():
            reads = self.inherited | self.select()  # equation (4)
            used = self.owner > 0
        pool = StraightThrough.apply(self.weight, self.score, self.frozen, used, reads)
        return self.matrices(pool, self.router)

    def finished_matrices(self, lineage):
        """The matrices of a finished task. They never change."""
        number = lineage[0]
        # Equation (3). A finished task reads used entries alone, so `weight` plays no part.
        pool = torch.where(self.read_by(lineage), self.frozen, 0.0)
        return self.matrices(pool, self.routers[number].to(pool.device))

    def delta(self, x, matrices):
        """What all experts add for the tokens x (B, T, D): (B, T, O)."""
        A_and_to_logits, scaled_B = matrices
        E, R = self.config.num_experts, self.config.rank
        # The experts are fp32 even if the base is bf16, or autocast is on. In bf16 their weights
        # would be rounded for each product, and small steps of the optimizer would have no effect.
        with autocast_off(x.device):
            products = x.float() @ A_and_to_logits  # (B, T, E*R + E)
            hidden, logits = products.split([E * R, E], dim=-1)
            gates = top_k_gates(logits, self.config.top_k)  # (B, T, E)
            # All experts are computed, also those whose gate is 0: they are small, and one product
            # for all is simpler than picking K of them for each token.
            hidden = hidden.view(*gates.shape, R) * gates.unsqueeze(-1)  # (B, T, E, R)
            # The rows of B of all experts stand below each other. So this product is the sum over
            # the experts, too.
            return hidden.flatten(-2) @ scaled_B  # (B, T, O)

    def add_delta(self, linear, args, out):
        """Forward hook of the linear layer: equation (2). It adds the experts' part to `out`."""
        # A hook gets named arguments only if it was registered with_kwargs. quantize_dynamic copies
        # hooks without that.
        expect(args, "a target was called as layer(input=x), expected layer(x)")
        x = args[0]  # (B, T, D)
        if self.num_rows is not None:
            expect_rows(x, self.num_rows)
        for rows, matrices in self.in_force:
            if matrices is None:
                matrices = self.open_matrices()
            if rows is None:
                out = out + self.delta(x, matrices).to(out.dtype)  # (B, T, O)
            else:
                out = out.index_add(0, rows, self.delta(x[rows], matrices).to(out.dtype))
        return out

    # ---- the life of a task

    @torch.no_grad()
    def begin(self, lineage, need, generator):
        """Prepare a task, which `MoSE.begin_task` opens once all layers are prepared.

        lineage: that of the task. If it has one number, the task starts as the bare base.
        need: 0 .. 1, a share of the usual number of new entries (see `MoSE.best_source`).
        generator: draws the scores; the router, if the task has no source; and A, if it has no
        source or reads no A in this layer.
        """
        # The caller may have frozen these, or left gradients of a task that was dropped.
        self.requires_grad_(True)
        self.zero_grad()
        self.inherited.copy_(self.read_by(lineage))
        inherited_A, inherited_B = self.split(torch.where(self.inherited, self.frozen, 0.0))
        reads_A = self.config.fixed_A or bool(inherited_A.any())
        reads_B = bool(inherited_B.any())
        self.num_new = self.count_new(need, reads_A, reads_B)
        source = lineage[1] if len(lineage) > 1 else None
        self.draw(source, reads_A, generator)

    def count_new(self, need, reads_A, reads_B):
        """[in A, in B], how many entries a new task will own.

        reads_A, reads_B: whether it reads an A, or a B, that finished tasks have left or that is
        fixed.
        """
        # CHOICE: density is a share of the entries that are still free, in A and in B each. So the
        # usual number of new entries falls from task to task, or stays the same where it is small,
        # unless a task is forgotten. And with a density below 1, some entries always stay free.
        counts = []
        for owner in self.split(self.owner):
            free = int((owner == 0).sum())
            counts.append(int(need * self.config.density * free))
        num_A, num_B = counts
        has_A, has_B = reads_A or num_A > 0, reads_B or num_B > 0
        if has_A and has_B:
            return counts
        return [0, 0]  # one of them without the other would have no effect

    def draw(self, source, reads_A, generator):
        """Set the scores, weights and router with which a task starts."""
        # CHOICE: the scores start so close together that a few steps of Adam change their order.
        # After that, gradients decide which entries a task takes, and not the random start. A step
        # of Adam moves a score by about the learning rate. With the rate at the top of this file,
        # this is 5 * SCORE_SPREAD if hidden_size is 128, and 1 * SCORE_SPREAD if it is 3000. (In
        # the first step no score has a gradient. Without a source, B is 0, so its values and the
        # gradients of A are 0. With a source, new values are 0. So scores move from the second step
        # on.)
        drawn = torch.rand(self.score.shape, generator=generator, **CPU_FP32)
        self.score.copy_(SCORE_SPREAD * drawn)
        # The last task also moved free entries that it did not select (see StraightThrough). They
        # start anew here: otherwise this task, which selects some of them, would not start exactly
        # as the base or as its source.
        self.weight.zero_()
        # With a source, new entries start at 0, so the task starts exactly as its source. They can
        # learn, since the A and B of the source are not 0. But where a layer is small, or the need
        # of the source was, it may read no A. Such a layer, and all layers of a task without a
        # source, start with a random A, uniform in +-1/sqrt(D). Since B is 0, they start as the
        # bare base.
        if source is None or not reads_A:
            D = len(self.projection)  # projection is (D, P); A has no rows if it is fixed
            A, _ = self.split(self.weight)
            drawn = torch.rand(A.shape, generator=generator, **CPU_FP32)
            A.copy_((2 * drawn - 1) / math.sqrt(D))
        if source is None:
            drawn = torch.randn(self.router.shape, generator=generator, **CPU_FP32)
            self.router.copy_(self.config.router_std * drawn)
        else:
            self.router.copy_(self.routers[source])

    def gets_new_B(self):
        """Whether the task that `begin` has prepared last gets entries of B. A task without a
        source can learn only where it gets some."""
        num_A, num_B = self.num_new
        return num_B > 0

    @torch.no_grad()
    def round_to_bf16(self):
        """Round what the open task has learned, so that its file is smaller."""
        # These stay fp32 numbers, but half of their bytes are 0 now, and compress to nothing. This
        # is done here and not in `save`, so that later tasks learn on the rounded values.
        self.weight.copy_(self.weight.bfloat16())
        self.router.copy_(self.router.bfloat16())

    @torch.no_grad()
    def finish(self, selected, router):
        """Freeze what the open task has learned.

        selected: its new entries, a bool mask (N,). router: (E, P), on the CPU. Both are made
        before, in all layers. Nothing here takes memory, so a lack of it can't leave some layers
        done and others not.
        """
        torch.where(selected, self.weight, self.frozen, out=self.frozen)
        self.owner.masked_fill_(selected, self.number)
        self.routers[self.number] = router

    # ---- not the method, which goes on in the class MoSE: forgetting, casts and state_dict()

    def unread(self, lineages):
        """The entries that no task with one of these lineages reads, a bool mask (N,)."""
        mask = torch.ones_like(self.owner, dtype=torch.bool)
        for lineage in lineages:
            mask &= ~self.read_by(lineage)
        return mask

    def clear(self, number, unread):
        """Drop the router of a task, and free these entries. Like `finish`, it takes no memory."""
        self.routers.pop(number, None)
        self.owner.masked_fill_(unread, 0)
        # So `frozen` holds nothing of a forgotten task but what others read.
        self.frozen.masked_fill_(unread, 0.0)

    def _apply(self, fn, recurse=True):
        # The experts follow their layer to another device, but not to another dtype: model.half()
        # would round what finished tasks read.
        def move(tensor):
            return tensor.to(fn(tensor).device)

        super()._apply(move, recurse)
        moved = []
        for rows, matrices in self.in_force:
            rows = None if rows is None else move(rows)
            matrices = None if matrices is None else [move(matrix) for matrix in matrices]
            moved.append((rows, matrices))
        self.in_force = moved
        return self

    def _save_to_state_dict(self, *args):
        # state_dict() holds the base and the Parameters of the open task. When no task is open, it
        # is the base alone. To be able to go on with an open task later, save() the finished ones
        # before begin_task. Later load() them all, call begin_task with the same source and need,
        # observe the prompts again, and then call load_state_dict.
        if self.number > 0:
            super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        if self.number > 0:
            super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected,
                                          errors)
        else:
            # These keys are of a task that was open. While none is, they have no place: with
            # strict=True torch raises an error. Call begin_task before load_state_dict.
            unexpected += [key for key in state if key.startswith(prefix)]


# ------------------------------------------------------------------------------ the whole

class MoSE:
    """Attaches SubExperts to the target layers of a model, and manages the tasks.

    layers  the SubExperts, one for each target, in the order of the model's layers
    tasks   {name: lineage} of the finished tasks, in the order of learning
    open    name of the task that is being learned, or None. `open_lineage` is its lineage, and
            `open_sums` has the sums for its key.
    active  the task in force, which the forward pass applies: what `set_task` got
    keys    the TaskKeys, by which prompts find their task

    The methods raise ValueError for a name, a value or a state that does not fit. Several threads
    may run the model at the same time. But while one runs it, or a method of this object, no other
    thread may change the tasks, or which of them is in force.
    """

    @torch.inference_mode(False)  # Parameters made in inference mode could never be trained
    def __init__(self, model, config=None):
        """Attach to a causal language model and freeze it.

        Of a multimodal model, pass only its language model: otherwise layers of the image encoder
        that have the names of targets get experts too. Raises ValueError if a target is not in the
        model, or if the model can't be adapted.
        """
        self.model = model
        self.config = MoSEConfig() if config is None else config
        expect(isinstance(self.config, MoSEConfig),
               f"config: got {config!r}, expected a MoSEConfig")
        self.tasks = {}
        self.active = None
        self.last_number = 0  # the number of the newest task; none is used twice
        check_model(model)
        targets = find_targets(model, self.config.targets)
        self._remember_base(targets)
        self.layers = [SubExperts(linear, self.config) for linear in targets]
        self._close()  # no task is open
        self.keys = TaskKeys(model.get_input_embeddings(), self.config.key_dim)
        self.packed = {}  # {number of a task: its entries as few bytes}: see `_pack`
        self.attached = True
        model.requires_grad_(False)
        for linear, layer in zip(targets, self.layers):
            linear.sub_experts = layer
            # A bound method: a lambda would make a deepcopy use the experts of the original.
            layer.handle = linear.register_forward_hook(layer.add_delta)

    # ---- the life of a task

    def begin_task(self, name, source=None, need=1.0):
        """Open a task, and put it in force. Until it is trained, the model computes exactly what it
        computes under its source, or as the bare base if it has none.

        source: a finished task to start from. need: share of the usual number of new entries.
        `begin_task(name, *mose.best_source(probe))` chooses both (see `best_source`). Raises
        ValueError if a task is open, if the name is taken, if a parameter of the base requires a
        gradient, or if a task without a source could learn in no layer, since it would get no entry
        of B there, or would read no A.
        """
        name = plain_str(name)
        expect(self.open is None, f"task {self.open!r} is open: end_task() or forget() it first")
        expect(name not in self.tasks, f"task {name!r} is finished: expected a new name")
        expect(source in [None, *self.tasks],
               f"source: got {source!r}, expected None or one of {[*self.tasks]}")
        expect(0 <= need <= 1, f"need: got {need}, expected 0 .. 1")
        self._check_ready()
        # All processes have to draw the same numbers.
        seed = same_on_all_ranks(int(torch.randint(2**62, (), device="cpu")))
        generator = torch.Generator("cpu").manual_seed(seed)
        lineage = [self.last_number + 1, *self.tasks.get(source, [])]
        for layer in self.layers:
            layer.begin(lineage, need, generator)
        # A task with a source may get no new entry: then its routers learn alone.
        expect(source is not None or any(layer.gets_new_B() for layer in self.layers),
               f"{name!r} gets no entry of A or none of B, in each layer: need x density x their "
               "free entries is under 1. forget() a task, or attach with more rank, or another "
               "density")
        for layer in self.layers:
            layer.number = lineage[0]
        self.last_number += 1
        sums = self.keys.new_sums()  # over the prompts that are observed, for its key
        self.open, self.open_lineage, self.open_sums = name, lineage, sums
        self.set_task(name)
        gets_nothing = all(layer.num_new == [0, 0] for layer in self.layers)
        if gets_nothing and self.config.num_experts == 1:  # then no router can learn either
            warnings.warn(f"task {name!r} will stay an exact copy of {source!r}: it gets no new "
                          "entry, and the gate of a single expert is always 1. If it should learn, "
                          "forget() it, and begin it again with a larger need", stacklevel=2)

    def trainable_parameters(self):
        """The open task's Parameters: weights, scores and routers.

        Make a new optimizer for each task: the old one's momentum is noise for a new task.
        """
        self._check_open()
        return [p for layer in self.layers for p in layer.parameters() if p.requires_grad]

    def end_task(self):
        """Freeze what the open task has learned, and return what `capacity()` says of it.

        The task is in force afterwards, as a finished one. If this runs out of memory or is
        interrupted, call it again, before any other training step. If it then says that no task is
        open, the task is finished, and set_task(name) puts it in force. Its key may be missing:
        infer_task() then never finds it, until you call observe(prompts, task=name).
        """
        self._check_open()
        # All Parameters are checked, also those that the caller has frozen in the meantime.
        finite = all(p.isfinite().all() for layer in self.layers for p in layer.parameters())
        expect(finite, f"task {self.open!r} has weights that are not finite: forget() it, and "
                       "learn it again with a lower rate")
        name, lineage, sums = self.open, self.open_lineage, self.open_sums
        has_key = sums["count"] > 0
        # If this is interrupted before `_close`, a second call does the same again.
        if self.config.round_to_bf16:
            for layer in self.layers:
                layer.round_to_bf16()
        learned = [(layer.select(), layer.router.detach().to("cpu", copy=True))
                   for layer in self.layers]
        for layer, (selected, router) in zip(self.layers, learned):
            layer.finish(selected, router)
        self.set_task(None)  # so the bare base is in force if anything below fails
        self.tasks[name] = lineage
        self._close()
        if has_key:
            self.keys.merge(name, sums)
        self.set_task(name)
        # The warnings come last, since the caller may have made them errors.
        warn_of_unused(self.model, self.layers, name)
        if not has_key:
            warnings.warn(f"task {name!r} has no key, so infer_task() can't find it: "
                          f"observe(prompts, task={name!r})", stacklevel=2)
        return self.capacity()[name]

    # ---- which task is in force

    @torch.inference_mode(False)  # autograd could not use matrices that were made in it
    def set_task(self, task):
        """Put a task in force, for all threads.

        task: a name, or None for the bare base, or a list. A list has a finished task, or None, for
        each row of the batch; the open task can't be in it. `generate` repeats each example for
        beams and for several answers, so repeat its name as often, side by side: with two beams,
        ["FOMC", "FOMC", "Py150", "Py150"].

        Keep the task until after backward(), since gradient checkpointing runs the forward pass
        once more. Only the open task learns: put it in force again before you go on training.

        If other code than model.to() moves the layers to another device, as dispatch_model of
        accelerate does, put the task in force again. A target layer that is replaced later has no
        experts, or copies of them. This is noticed when the next task is put in force, begun or
        ended. Raises ValueError for a task that is not known, an empty list, or a target that has
        lost its hook or was replaced.
        """
        expect(task is None or isinstance(task, (str, list)),
               f"task: got {task!r}, expected a name, None or a list of names")
        if isinstance(task, str):
            task = plain_str(task)
        is_list = isinstance(task, list)
        names = [*task] if is_list else [task]
        is_open = self.open is not None and task == self.open
        finished = [None, *self.tasks]
        unknown = [name for name in names if name not in finished]
        expected = f"expected finished ones, {[*self.tasks]}"
        if self.open is not None:
            expected += f", or the open task alone, {self.open!r}"
        expect(is_open or not unknown, f"unknown tasks {unknown}: {expected}")
        expect(names, "got an empty list of tasks, expected one for each row of the batch")
        hooks = hooks_of(self.model)
        check_copies(hooks, self.layers)
        if task is not None:  # the bare base needs no experts
            check_layers(hooks, self.layers)
        rows_of = {}  # {name of a task: its rows of the batch, or None for all rows}
        if is_list:
            for row, name in enumerate(names):
                if name is not None:
                    rows_of.setdefault(name, []).append(row)
        elif task is not None:
            rows_of[task] = None
        # All matrices are made first: a failure must not leave layers with different tasks.
        in_force = []
        for layer in self.layers:
            pairs = []
            for name, rows in rows_of.items():
                if rows is not None:
                    rows = torch.tensor(rows, device=layer.frozen.device)
                # Those of the open task are made in each pass, since they change with each step.
                matrices = None if is_open else layer.finished_matrices(self.tasks[name])
                pairs.append((rows, matrices))
            in_force.append(pairs)
        for layer, pairs in zip(self.layers, in_force):
            layer.in_force = pairs
            layer.num_rows = len(names) if is_list else None
        self.active = names if is_list else task

    @contextlib.contextmanager
    def task(self, task):
        """`with mose.task("FOMC"): ...` puts a task in force for the block.

        Afterwards the task before it is in force again; or the bare base, if that task was
        forgotten or renamed in the block. The task is in force for all threads, as with `set_task`:
        if another thread is generating an answer, that answer changes midway. A task that is begun
        in the block has to be put in force again after it.
        """
        before = self.active
        self.set_task(task)
        try:
            yield
        finally:
            names = before if isinstance(before, list) else [before]
            finished = all(name is None or name in self.tasks for name in names)
            still_there = finished or before == self.open
            self.set_task(before if still_there else None)

    # ---- which task to start from

    # `best_source` proposes a finished task only if its error is below this share of the error of
    # the bare base, and of a constant answer. (`begin_task` itself takes any finished task.)
    WELL_BELOW = 0.75

    def best_source(self, probe, guess=math.inf):
        """Which finished task a new one should start from: (source, need) for `begin_task`.

        Call it before begin_task, and call model.eval() before, so that dropout adds no noise.
        probe(): runs the model on examples of the new task, and returns the error, say the share of
        wrong answers. `best_source` puts the bare base and each finished task in force in turn, and
        calls it each time.
        guess: the error of the best constant answer, say 1 - the share of the largest class.

        With several processes, only the numbers of the first one count. Returns (None, 1.0) if no
        finished task is worth it. Raises ValueError if probe() returns a number below 0 or not
        finite, or if `guess` is not 0 or more.
        """
        guess = same_on_all_ranks(float(guess))
        expect(guess >= 0, f"guess: got {guess}, expected an error >= 0")
        if not self.tasks:
            return None, 1.0
        errors = {}
        for source in [None, *self.tasks]:
            with self.task(source), torch.no_grad():
                errors[source] = same_on_all_ranks(float(probe()))
            expect(0 <= errors[source] < math.inf,
                   f"probe() gave {errors[source]} under {source!r}, expected a number >= 0")
        # The error that a source has to beat: of the base or, if that is smaller, of the best
        # constant answer.
        to_beat = min(errors.pop(None), guess)
        # Only the finished tasks are left in `errors`.
        source = min(errors, key=errors.get)
        # CHOICE: a new task starts from the finished one with the smallest error, if this is well
        # below the error of the base and of a constant answer. The new task then gets this share,
        # errors[source] / to_beat, of the usual number of new entries: the less error the source
        # leaves, the fewer it needs. How the paper reuses experts is not known to us.
        if errors[source] < self.WELL_BELOW * to_beat:
            return source, errors[source] / to_beat
        return None, 1.0

    # ---- which task a prompt belongs to

    # CHOICE: the task is inferred from the token embeddings of the prompt alone, before any pass
    # through the model. A prompt is a weighted mean of the embeddings of its tokens, a task is a
    # distribution around the mean of its prompts, and a prompt belongs to the task under which it
    # is most likely (TaskKeys, below). How the paper infers the task is not known to us.

    def observe(self, input_ids, attention_mask=None, task=None):
        """Add prompts (B, T) to the key of the open task, or of a finished one that is named.

        Pass prompts as they will be at inference: with their template, and without the answer. If
        some are padded, pass the attention_mask (B, T) as well: otherwise padding counts as text.
        There is no pass through the model. With several processes, let each observe all prompts:
        the sums are not exchanged, and all processes need the same keys.
        """
        task = None if task is None else plain_str(task)
        expect(task is not None or self.open is not None,
               "no task is open: call begin_task(name) first, or name a finished task")
        expect(task in (None, self.open) or task in self.tasks,
               f"unknown task {task!r}: finished so far are {[*self.tasks]}")
        prompts = unpadded(input_ids, attention_mask)
        if task in (None, self.open):
            self.keys.add(self.open_sums, prompts)
        else:
            sums = self.keys.new_sums()
            self.keys.add(sums, prompts)
            self.keys.merge(task, sums)

    def infer_task(self, input_ids, attention_mask=None, return_confidence=False):
        """The task of each prompt (B, T), a list of names; no pass through the model.

        Padded prompts need their attention_mask (B, T).
        With return_confidence also numbers 0 .. 1. They are near 0 for a prompt far from every
        task, and 0 for one that has only tokens that all tasks share. Only tasks with observed
        prompts can be found.
        """
        expect(self.keys.tasks, "no task has a key: observe() prompts of each task")
        names, confidence = self.keys.infer(unpadded(input_ids, attention_mask))
        return (names, confidence) if return_confidence else names

    # =========================================================================================
    # Above this line is the method. Below it is what it takes to live in other people's code, and
    # TaskKeys, the statistics by which a prompt finds its task.
    # =========================================================================================

    def _remember_base(self, targets):
        """Keep what `detach` gives back, and what `load` compares with the base of a file."""
        # Places, and not the Parameters: FSDP2 and accelerate replace these by others, and a list
        # of the old ones would keep them in memory.
        self.trainable_before = [
            (module, key) for module in self.model.modules()
            for key, p in module.named_parameters(recurse=False) if p.requires_grad]
        self.base_fingerprint = fingerprint(self.model)
        # `load` compares the tensors whose names both bases have. Each adapted layer, and the
        # embeddings, must have at least one tensor among them.
        modules = [*targets, self.model.get_input_embeddings()]
        self.needed_paths = [
            path for path, module in self.model.named_modules() if module in modules]

    # ---- whether a task is open, and can learn

    def _close(self):
        """Leave no task open."""
        # This comes first: while a task is open, its number says which entries `end_task` gave it.
        self.open, self.open_lineage, self.open_sums = None, None, None
        for layer in self.layers:
            layer.number = 0

    def _check_ready(self):
        """Raise ValueError unless the hooks are there, and the base is frozen and not offloaded."""
        hooks = hooks_of(self.model)
        check_copies(hooks, self.layers)
        check_layers(hooks, self.layers)
        check_base_is_frozen(self.model, self.layers)
        if self.open is None:
            advice = "save() the finished tasks, detach(), remove the offload, load() them again"
        else:
            advice = "remove the offload, and go on"
        expect(not any(layer.weight.is_meta for layer in self.layers), "the experts are offloaded "
               f"with the base (meta device), so no task can be learned: {advice}")

    def _check_open(self):
        """Raise ValueError unless a task is open and can learn."""
        expect(self.open is not None, "no task is open: call begin_task(name) first")
        self._check_ready()

    # ---- forget and rename

    def forget(self, name):
        """Remove a finished task, or drop the open one. While one is open, only that one can go.

        What the other tasks compute stays the same, bit for bit: entries that they read stay. If
        the task is in force, also as one of a list, the bare base is in force afterwards.
        """
        # While a task is open, no other one can go: what the open one inherits does not count as
        # read.
        known = [*self.tasks] if self.open is None else [self.open]
        expect(name in known, f"can't forget {name!r}: expected one of {known}"
               + (", since this task is open" if self.open is not None else ""))
        number, *_ = self.open_lineage if name == self.open else self.tasks[name]
        # What takes memory comes first: a lack of it can't leave some layers done and others not.
        others = [lineage for other, lineage in self.tasks.items() if other != name]
        unread = [layer.unread(others) for layer in self.layers]
        names_in_force = self.active if isinstance(self.active, list) else [self.active]
        if name in names_in_force:
            self.set_task(None)
        self.keys.tasks.pop(name, None)  # before the task: `load` refuses a key without its task
        self.tasks.pop(name, None)  # (an open task is there if `end_task` was interrupted)
        self._close()
        for layer, mask in zip(self.layers, unread):
            layer.clear(number, mask)
        counts = self._counts()
        # Tasks with fewer entries than before are to be compressed anew.
        self.packed = {n: pack for n, pack in self.packed.items() if counts.get(n) == pack[0]}

    def rename(self, old, new):
        """Give a finished task another name."""
        new = plain_str(new)
        expect(old in [*self.tasks], f"can't rename {old!r}: expected one of {[*self.tasks]}")
        expect(new not in self.tasks and new != self.open, f"there is a task {new!r} already")

        def renamed(records):
            return {new if name == old else name: record for name, record in records.items()}

        self.tasks, self.keys.tasks = renamed(self.tasks), renamed(self.keys.tasks)
        if isinstance(self.active, list):
            self.active = [new if name == old else name for name in self.active]
        elif self.active == old:
            self.active = new

    def detach(self):
        """Take everything off: the base is what it was, bit for bit."""
        expect(self.attached, "this MoSE is detached already")
        self.attached = False
        ids = {layer.handle.id for layer in self.layers}
        for module in [*self.model.modules()]:
            # quantize_dynamic copies the hooks to layers of its own, under other ids. A layer that
            # somebody has copied has copies of experts too. If somebody has wrapped a hook in a
            # function, only its id tells whose it is.
            for key, hook in [*module._forward_hooks.items()]:
                if key in ids or is_ours(getattr(hook, "__self__", None)):
                    del module._forward_hooks[key]
            if is_ours(getattr(module, "sub_experts", None)):
                del module.sub_experts
        for module, key in self.trainable_before:
            # Others may have given it another name: pruning (_orig), weight norm (_g and _v), or a
            # parametrization.
            names = {key, f"{key}_orig", f"{key}_g", f"{key}_v"}
            for name, parameter in module.named_parameters():
                is_it = name in names or name.startswith(f"parametrizations.{key}.")
                if is_it and parameter.is_floating_point():
                    parameter.requires_grad_(True)

    # ---- what it costs, and how it is kept

    def _pack(self, number, count):
        """The `count` entries that the task of this number owns, in all layers: (count, places,
        values). Places and values are compressed bytes. Places are kept as the gaps between them.
        """
        # Entries of a task only ever become fewer. So the same count means the same entries, which
        # need not be compressed again.
        if number not in self.packed or self.packed[number][0] != count:
            masks = [layer.owner == number for layer in self.layers]
            values = [layer.frozen[mask] for layer, mask in zip(self.layers, masks)]
            places = torch.cat([mask.cpu() for mask in masks]).nonzero()[:, 0]
            gaps = torch.diff(places, prepend=places.new_tensor([-1])).int()
            values = torch.cat([value.cpu() for value in values])
            self.packed[number] = count, compressed(gaps), compressed(values)
        return self.packed[number]

    def _counts(self):
        """{number of a task: how many entries it owns}, in order. The entries of a forgotten task
        keep its number as long as others read them."""
        size = self.last_number + 1
        counts = sum(layer.owner.bincount(minlength=size).cpu() for layer in self.layers)
        return {n: count for n, count in enumerate(counts.tolist()) if n > 0 and count > 0}

    def capacity(self):
        """{task: {"new": how many entries it owns, "share": what share of the pool is in use after
        it, "bytes": {kind: bytes}}}.

        The bytes are about those in the saved file. The covariance, which all keys share, counts
        with the first task that has a key. Entries that a forgotten task left to tasks that read
        them count with the next task.
        """
        report = {}
        total = sum(len(layer.owner) for layer in self.layers)
        # Of a number that is rounded to bf16, two bytes are 0, and compress to nothing.
        bytes_of_number = 2 if self.config.round_to_bf16 else 4
        router_bytes = bytes_of_number * sum(layer.router.numel() for layer in self.layers)
        key_bytes = self.keys.key_bytes()
        counts = self._counts()
        used, before = 0, 0
        for name, (number, *_) in self.tasks.items():
            # (Numbers between those of two tasks are of forgotten ones.)
            own = [self._pack(n, count) for n, count in counts.items() if before < n <= number]
            before = number
            new = sum(count for count, _, _ in own)
            used += new
            size = {"masks": sum(len(places) for _, places, _ in own),
                    "values": sum(len(values) for _, _, values in own),
                    "routers": router_bytes, "keys": key_bytes.get(name, 0)}
            report[name] = {"new": new, "share": used / total, "bytes": size}
        return report

    def save(self, path):
        """Write the finished tasks to one file, which is replaced whole or not at all.

        The covariance of the keys is rounded to bf16, in the file and in this object too. So if
        there are several processes, call it in each of them: otherwise theirs would differ.
        """
        expect(self.open is None, f"task {self.open!r} is open: call end_task() before save()")
        # This object keeps the rounded one, so it finds the same tasks as one that loads the file.
        keys = self.keys.state()
        self.keys.restore(*keys)
        entries = {number: self._pack(number, count) for number, count in self._counts().items()}
        routers = {number: torch.stack([layer.routers[number] for layer in self.layers])
                   for number, *_ in self.tasks.values()}  # {number: (layers, E, P)}
        buffer = io.BytesIO()
        torch.save({
            "config": dataclasses.asdict(self.config), "base": self.base_fingerprint,
            "last_number": self.last_number, "tasks": self.tasks, "entries": entries,
            "routers": routers, "keys": keys,
        }, buffer)
        path = os.path.realpath(path)  # a link stays a link
        # A random name, since several processes or threads may save at the same time.
        part = f"{path}.{os.urandom(8).hex()}.tmp"
        try:
            with open(part, "wb") as file:
                file.write(FORMAT + lzma.compress(buffer.getvalue()))  # its checksum shows damage
                file.flush()
                os.fsync(file.fileno())  # else a power cut could leave a file without content
            os.replace(part, path)
        finally:
            if os.path.exists(part):
                os.remove(part)

    @classmethod
    def load(cls, model, path, tasks=None):
        """Attach to `model` what `save` wrote, or only some of its tasks.

        tasks: a list of names, or None for all. Afterwards the bare base is in force. Raises
        ValueError, and leaves the model alone, for a file that is damaged, of another format or
        made on another base. (Weights that differ by some thousandths, as in a copy in bf16, count
        as the same base.)
        """
        expect(not isinstance(tasks, str), f"tasks: got {tasks!r}, expected a list of names")
        check_model(model)
        with open(path, "rb") as file:
            data = file.read()
        expect(data.startswith(FORMAT),
               f"{path}: its format is {data[:len(FORMAT)]!r}, expected {FORMAT!r}: load it with "
               "the mose.py that wrote it, or learn its tasks again")
        try:
            state = torch.load(io.BytesIO(lzma.decompress(data[len(FORMAT):])), weights_only=True)
            config = MoSEConfig(**state.pop("config"))
        except Exception as error:  # torch.load raises errors of any kind for what it did not write
            raise ValueError(f"{path}: damaged, or no adapter: {error}") from error
        mose = cls(model, config)
        try:
            mose._restore_from(path, state)
            there = [*mose.tasks]
            wanted = there if tasks is None else [*tasks]
            unknown = [name for name in wanted if name not in there]
            expect(not unknown, f"{path}: it has no tasks {unknown}, expected some of {there}")
            for name in there:
                if name not in wanted:
                    mose.forget(name)
        except BaseException:  # also an interrupt: the model is left alone
            mose.detach()
            raise
        return mose

    def _restore_from(self, path, state):
        """`_restore`, with a ValueError that names the file."""
        try:
            self._restore(**state)
        except Exception as error:  # a damaged file may hold anything
            raise ValueError(f"{path}: damaged, or not for this base: {error}") from error

    def _restore(self, base, last_number, tasks, entries, routers, keys):
        """The inverse of `save`. ValueError says what is not as it was written for this base."""
        other = differences(base, self.base_fingerprint, self.needed_paths)
        expect(not other, "it was made on a base of other layers, weights or positions: "
               f"{len(other)} differ: {', '.join(other[:3])}")
        sizes = [len(layer.owner) for layer in self.layers]
        owner = torch.zeros(sum(sizes), dtype=torch.int32, device="cpu")
        frozen = torch.zeros(sum(sizes), **CPU_FP32)
        for number, (count, places, values) in entries.items():
            places = decompressed(places, torch.int32).cumsum(0) - 1  # from the gaps between them
            values = decompressed(values, torch.float32)
            expect(0 < number <= last_number,
                   f"entries belong to task number {number}, expected 1 to {last_number}")
            expect(0 < count == len(places) == len(values),
                   f"{len(values)} values for {len(places)} entries, expected {count} of both")
            expect(values.isfinite().all(), "it has values that are not finite")
            expect(0 <= places.min() and places.max() < len(owner),
                   "it has entries outside of the pools")
            owner[places] = number
            frozen[places] = values
        numbers = {number for number, *_ in tasks.values()}
        expect(len(numbers) == len(tasks), "two of its tasks have the same number")
        shape = len(self.layers), *self.layers[0].router.shape
        for name, lineage in tasks.items():
            falling = sorted({*lineage}, reverse=True)  # a source is older than its task
            expect(lineage == falling and 0 < min(lineage) and max(lineage) <= last_number,
                   f"task {name!r} has the lineage {lineage}, expected numbers of 1 to "
                   f"{last_number}, each smaller than the one before")
            found = tuple(routers[lineage[0]].shape)
            expect(found == shape, f"the routers of {name!r} are {found}, expected {shape}")
        self.keys.restore(*keys)
        expect({*self.keys.tasks} <= {*tasks}, "it has the key of a task that is not there")
        self.last_number, self.tasks, self.packed = last_number, tasks, entries
        parts = zip(self.layers, owner.split(sizes), frozen.split(sizes))
        for i, (layer, own_owner, own_frozen) in enumerate(parts):
            layer.owner.copy_(own_owner)
            layer.frozen.copy_(own_frozen)
            layer.routers = {number: routers[number][i].clone() for number, *_ in tasks.values()}


# ------------------------------------------------------------------------------ task keys

class TaskKeys:
    """How a prompt finds its task: each task is a distribution of mean token embeddings.

    A prompt is treated as a bag: its distinct tokens, with weights that sum to 1. Their order plays
    no part. A token is shared if nearly all prompts of every task hold it. The tokens of a chat
    template are, and so may be a word like "the". They would hide what differs, so they are left
    out, wherever they stand in a prompt.

    w   a whole prompt: the weighted mean of the embeddings of its tokens, which a fixed random
        projection maps to dim numbers. dim is key_dim, or the width of the embeddings if that is
        less. Keys are made of it.
    x   the own part of a prompt: the same mean without the shared tokens, with weights that again
        sum to 1. A new prompt is compared by it.
    m   the mean of the x of a task, in which a prompt counts by the share of its own part.
    s   about their standard deviation, one number for all dimensions. `own_distribution` computes m
        and s from what `tasks` holds, which is about whole prompts.
    S   the mean of s over all tasks.
    C   a covariance that all tasks share, scaled so that its mean variance is 1.

        distance   = (x - m)^T C^-1 (x - m) / dim
        likelihood = (1 + dim / FREEDOM * distance / v) ^ (-(FREEDOM + dim) / 2) / v^(dim / 2)
        v          = s * S

    So `distance` is a mean of squares over the dimensions. It is about s^2 for the task's own
    prompts. A prompt belongs to the task of the largest likelihood (here without a constant that
    all tasks share). This is a Student t distribution, a Gaussian with heavier tails. With a
    Gaussian, a few prompts that lack the system prompt would make the variance of their task so
    large that it takes prompts of other tasks, where these lie a little far from their own mean.
    v lies between the task's own variance, s^2, and the typical one, S^2. With s^2, a prompt
    slightly off the mean of a narrow task would go to a wide one. A prompt gets a task in any case,
    but the confidence falls towards 0 if the prompt is far from this task: if its distance is
    large, compared with the s^2 of the task.

    Of the prompts, only running sums are kept, and the tokens that nearly all of them hold. (Of a
    task with a single prompt, these are all of its tokens.)

    tasks   {name: (count, mean, variance, common)} of the finished tasks that have a key:
            count     number of prompts
            mean      (dim,), of w. So it is not m.
            variance  of w, a number: the mean over all dimensions. It is not s^2.
            common    {token: weight} of the tokens that nearly all prompts hold. A prompt is a
                      weighted mean of its tokens, and this is the token's weight in it, on average.
    pooled  (dim, dim), C is made of it: the sum of all scatter matrices, each divided as
            `merge` says. A scatter matrix is the sum of (w - mean) (w - mean)^T over prompts.
            `pooled` stays when a task is forgotten, since it tells how prompts differ in general.
    """

    # A token is common to a task if this share of its prompts holds it. Not all of them have to:
    # one prompt in twenty without the chat template must not hide it.
    COMMON = 0.95
    # `merge` adds this share of the mean |w|^2 to the scatter of a new task, spread evenly over all
    # dimensions, as if one more prompt had this squared distance from the mean. So a task of equal
    # prompts has a variance too.
    IMAGINARY = 0.01
    # The pooled covariance is shrunk towards a multiple of the identity, which counts as much as
    # SHRINKAGE * dim prompts. A few prompts alone show only a few of the directions in which
    # prompts differ.
    SHRINKAGE = 0.25
    # Degrees of freedom of the t distribution: the fewer, the heavier its tails.
    FREEDOM = 8
    # In the prompts of each task, the tokens that are not shared must have at least this part of
    # the weights. With less, the own part of a prompt is too little to compare, and no token counts
    # as shared.
    LEAST_OWN = 0.02
    # A prompt that fits none of the tasks is modelled as a Gaussian with the mean of the most
    # likely task, and this many times its standard deviation.
    WIDER = 3.0

    def __init__(self, embedding, key_dim):
        self.embedding = embedding
        D = embedding.weight.shape[1]
        dim = min(key_dim, D)
        # (If dim is D it could be left out, but then there would be two cases.)
        self.projection = fixed_signs(D, dim)
        self.tasks = {}
        self.pooled = torch.zeros(dim, dim, dtype=torch.float64, device="cpu")

    # ---- a prompt as numbers

    def tokens_and_weights(self, ids):
        """The distinct tokens of a prompt (U,), U <= T, and their weights in its mean (U,). The
        weights sum to 1."""
        tokens, times = ids.unique(return_counts=True)
        # CHOICE: a token that occurs n times counts 1 + log n times, so that the words that all
        # prompts have don't hide those that tell tasks apart.
        weights = 1 + times.float().log()
        return tokens, weights / weights.sum()

    def table(self):
        """The token embeddings (V, D). `add` and `infer` make it once for all prompts, since a
        quantised or sharded table has to be brought together for it."""
        return plain(self.embedding.weight, self.embedding)

    def embed(self, table, tokens, weights):
        """The weighted sum of token embeddings under the projection, (dim,)."""
        outside = tokens[tokens >= len(table)].tolist()  # on a GPU, these would end the process
        expect(not outside, f"got the ids {outside[:3]}, but there are {len(table)} embeddings: "
                            "expected ids of the model's own tokenizer")
        vectors = table[tokens.to(table.device)].float().cpu()
        with autocast_off(vectors.device):
            mean = weights @ vectors @ self.projection
        return mean.double()  # `merge` takes small differences of large sums

    # ---- the life of a task

    @torch.inference_mode(False)  # tensors that are made in it can't be changed outside of it
    def new_sums(self):
        """The empty sums of a task: how many prompts, the sums of w and of w w^T, and of the tokens
        {token: (how many prompts hold it, the sum of its weights)}."""
        dim = len(self.pooled)
        return {"count": 0, "w": self.pooled.new_zeros(dim),
                "square": self.pooled.new_zeros(dim, dim), "tokens": {}}

    def add(self, sums, prompts):
        """Add prompts to the sums of a task. They have no effect until `merge`."""
        table = self.table()
        bags = [self.tokens_and_weights(ids) for ids in prompts]
        whole = [self.embed(table, tokens, weights) for tokens, weights in bags]
        # If w were 0 for all prompts of a task, or not finite for one, its variance would be 0 or
        # nan. Through `pooled`, this would spoil the keys of all tasks.
        expect(all(w.isfinite().all() and w.any() for w in whole),
               "the mean embedding of a prompt is 0 or not finite. If it is nothing but padding, "
               "pass its attention_mask, or drop the prompt")
        for (tokens, weights), w in zip(bags, whole):
            sums["count"] += 1
            sums["w"] += w
            sums["square"] += torch.outer(w, w)
            for token, weight in zip(tokens.tolist(), weights.tolist()):
                held, total = sums["tokens"].get(token, (0, 0.0))
                sums["tokens"][token] = held + 1, total + weight

    def merge(self, name, sums):
        """Make the key of a task from the sums, or add them to its key."""
        more = sums["count"]
        mean = sums["w"] / more
        scatter = sums["square"] - torch.outer(sums["w"], mean)  # about the mean of these prompts
        if name in self.tasks:
            had, old, variance, common = self.tasks[name]
            count, gap = had + more, mean - old.double()
            # `scatter` stays that of the new prompts alone, since `pooled` has that of the earlier
            # ones. But two means that differ add to the scatter about their common mean.
            scatter += had * more / count * torch.outer(gap, gap)
            # `squares` is of all prompts. A variance counts the imaginary prompt as well.
            squares = (had + 1) * variance + scatter.diagonal().mean().item()
            mean = old.double() + more / count * gap
            # Only what was common so far can stay so. It counts as if all earlier prompts had held
            # it.
            tokens = {}
            for token, weight in common.items():
                held, total = sums["tokens"].get(token, (0, 0.0))
                tokens[token] = had + held, had * weight + total
        else:
            count, tokens = more, sums["tokens"]
            mean_square = sums["square"].diagonal().mean() / more  # over prompts and dimensions
            scatter += self.IMAGINARY * mean_square * torch.eye(len(mean), **CPU_FP32)
            squares = scatter.diagonal().mean().item()
        variance = squares / (count + 1)
        common = {token: total / count for token, (held, total) in tokens.items()
                  if held >= self.COMMON * count}
        self.tasks[name] = count, mean.float(), variance, common
        # CHOICE: the scatter of a task is divided by the root of its variance. Short prompts have a
        # large variance. Undivided, their task would dominate the covariance. Divided by the
        # variance, it would count no more than others. But tasks of short prompts are the harder
        # ones to tell apart, so the covariance should be theirs more than that of others.
        self.pooled += scatter / math.sqrt(variance)

    # ---- which task

    def infer(self, prompts):
        """([name], [confidence]) of prompts [(T,), ..]."""
        table = self.table()
        shared = self.shared_tokens()
        x = []  # the own part of each prompt
        is_empty = []  # for each prompt: whether all of its tokens are shared
        for ids in prompts:
            tokens, weights = self.tokens_and_weights(ids)
            keep = ~torch.isin(tokens, shared)
            # (If no token is left, the sum of nothing is 0, and so is the mean.)
            x.append(self.embed(table, tokens[keep], weights[keep] / weights[keep].sum()))
            is_empty.append(not keep.any())
        x = torch.stack(x)  # (B, dim)
        expect(x.isfinite().all(), "the mean embedding of a prompt is not finite")

        distributions = [self.own_distribution(name, table, shared) for name in self.tasks]
        deviations = [deviation for _, deviation in distributions]
        typical_deviation = sum(deviations) / len(deviations)

        dim = len(self.pooled)
        # It is scaled to a mean variance of 1 twice: before it is shrunk, so that SHRINKAGE does
        # not depend on the scale of the embeddings, and after it, so that distances do not depend
        # on SHRINKAGE.
        covariance = self.pooled / self.pooled.diagonal().mean()
        # The more prompts, the less it is shrunk. Those of forgotten tasks don't count: they may be
        # in `pooled` several times, say if a task was learned again with other rates.
        count = sum(count for count, _, _, _ in self.tasks.values())
        covariance += self.SHRINKAGE * dim / count * torch.eye(dim, **CPU_FP32)
        covariance /= covariance.diagonal().mean()
        factor = torch.linalg.cholesky(covariance)
        logits, ratios = [], []
        for mean, deviation in distributions:
            z = torch.linalg.solve_triangular(factor, (x - mean).T, upper=False)
            distance = z.square().mean(0)  # (B,)
            v = deviation * typical_deviation
            # The log of the likelihood, up to a constant that all tasks share.
            tail = (dim / self.FREEDOM * distance / v).log1p()
            logits.append(-(self.FREEDOM + dim) / 2 * tail - dim / 2 * math.log(v))
            ratios.append(distance / deviation**2)  # about 1 for the task's own prompts
        logits = torch.stack(logits, dim=1)  # (B, tasks)
        best = logits.argmax(1, keepdim=True)
        ratio = torch.stack(ratios, dim=1).gather(1, best)[:, 0]
        # CHOICE: a second test compares the best task alone with "none of the tasks". Both are
        # Gaussians with the mean of the task, and the second is WIDER times as wide. Without this,
        # the confidence in the nearest task would be 1 for a prompt far from all of them.
        # (`log_odds` are those of none against the task. With WIDER = 3 they are 0 at the ratio
        # 2.5.)
        log_odds = dim / 2 * (ratio * (1 - 1 / self.WIDER**2) - 2 * math.log(self.WIDER))
        confidence = logits.softmax(1).amax(1) * torch.sigmoid(-log_odds)
        # A prompt of nothing but shared tokens says nothing about its task.
        confidence = confidence.masked_fill(torch.tensor(is_empty, device="cpu"), 0.0)
        names = [*self.tasks]
        return [names[i] for i in best[:, 0].tolist()], confidence.tolist()

    def own_distribution(self, name, table, shared):
        """(m, s) of a task: about its prompts without the tokens that all tasks share.

        The mean of whole prompts is the weighted sum of the shared tokens, plus m times what is
        left of the weights, on average. So m follows from the other two. The deviation is divided
        by what is left too: the shared part counts as the same in all prompts.
        """
        _, mean, variance, common = self.tasks[name]
        weights = torch.tensor([common[token] for token in shared.tolist()], **CPU_FP32)
        left = 1 - weights.sum().item()
        m = (mean.double() - self.embed(table, shared, weights)) / left
        return m, math.sqrt(variance) / left

    def shared_tokens(self):
        """The tokens that nearly all prompts of every task hold, such as a chat template's. With
        one task there are none: what its prompts have in common need not be a template."""
        commons = [common for _, _, _, common in self.tasks.values()]
        shared = set.intersection(*map(set, commons)) if len(commons) > 1 else set()
        for common in commons:
            left = 1 - sum(common[token] for token in shared)
            if left < self.LEAST_OWN:
                shared = set()
        return torch.tensor(sorted(shared), dtype=torch.long, device="cpu")

    # ---- what is kept

    def state(self):
        """What a file holds: of `pooled` only its Cholesky factor, a triangle, in bf16."""
        rows, columns = torch.tril_indices(*self.pooled.shape, device="cpu")
        factor = torch.linalg.cholesky(self.pooled) if self.pooled.any() else self.pooled
        return self.tasks, factor[rows, columns].bfloat16()

    @torch.inference_mode(False)
    def restore(self, tasks, triangle):
        """The inverse of `state`. However a factor is rounded, factor factor^T is a covariance."""
        rows, columns = torch.tril_indices(*self.pooled.shape, device="cpu")
        fits = all(len(mean) == len(self.pooled) for _, mean, _, _ in tasks.values())
        expect(fits and triangle.shape == rows.shape, "its keys have another size")
        factor = torch.zeros_like(self.pooled)
        factor[rows, columns] = triangle.double()
        self.tasks, self.pooled = tasks, factor @ factor.T

    def key_bytes(self):
        """{task: bytes of its key}. The covariance, which all share, counts with the first one."""
        dim = len(self.pooled)
        mean, count_and_variance, token_and_weight = 4 * dim, 4 + 4, 4 + 4
        covariance = 2 * (dim * (dim + 1) // 2)  # a triangle in bf16
        sizes = {}
        for name, (_, _, _, common) in self.tasks.items():
            sizes[name] = mean + count_and_variance + token_and_weight * len(common)
            if len(sizes) == 1:
                sizes[name] += covariance
        return sizes


# ------------------------------------------------------------------------------ helpers

# How the files begin that `save` writes. The number rises if they are to be read in another way.
FORMAT = b"MoSE 6\n"
MORE = "see docs/works-with.md in the repository of mose.py"


def plain_str(name):
    """A name as a plain str: torch.load refuses files with np.str_ or an Enum in them. (The str()
    of an Enum would be the name of its class and member.)"""
    expect(isinstance(name, str), f"got {name!r} as a name, expected a str")
    return str.__str__(name)


def fixed_signs(*shape):
    """Numbers -1.0 or 1.0, the same on every machine, so they are never stored.

    They are from a hash, since torch promises no fixed sequence of its generators. With other signs
    all saved routers and keys would be worthless, and every B that was learned with fixed_A.
    """
    digest = bytearray(hashlib.shake_256(b"MoSEs").digest(math.prod(shape)))
    signs = torch.frombuffer(digest, dtype=torch.uint8) % 2
    return signs.float().view(shape) * 2.0 - 1.0


def in_out(layer):
    """(D, O) of an nn.Linear, of a quantised one or of GPT-2's Conv1D. None for other layers."""
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return layer.in_features, layer.out_features
    if hasattr(layer, "nx") and hasattr(layer, "nf"):
        return layer.nx, layer.nf
    return None


def device_of(layer):
    """Where the weights of a layer are. A quantised layer may have buffers only, or neither."""
    for tensor in [*layer.parameters(), *layer.buffers()]:
        return tensor.device
    return torch.device("cpu")


def find_targets(model, targets):
    """The linear layers whose path in the model is one of the targets, or ends with one.

    Raises ValueError if there is none for a target; it lists the names of all linear layers.
    """
    found, names, missing = [], set(), {*targets}
    for path, module in model.named_modules(remove_duplicate=False):  # a shared layer by all names
        if in_out(module) is None:
            continue
        names.add(path.rpartition(".")[2])
        fitting = {target for target in targets if f".{path}".endswith(f".{target}")}
        missing -= fitting
        if fitting and module not in found:
            found.append(module)
    expect(not missing, f"targets: no linear layer has the name {sorted(missing)}; there are "
                        f"{sorted(names)}")
    return found


def check_model(model):
    """Raise ValueError for a model that can't be adapted."""
    names = [name for name, _ in model.named_modules()]
    has_hook = any(is_ours(owner) for _, owner in hooks_of(model))
    there = has_hook or any(name.endswith("sub_experts") for name in names)
    expect(not there,
           "a MoSE is attached to this model already: detach() it first. (A deepcopy of the model "
           "alone can't be detached: copy the MoSE, with its model in it)")
    meta = [name for name, p in model.named_parameters() if p.is_meta]
    expect(not meta, f"part of the base is offloaded (meta device): {meta[:3]}. Attach first, and "
                     "offload then")
    expect(getattr(model, "tp_size", None) in (None, 1),
           "tensor parallel layers see only a part of their inputs or outputs: load the base "
           f"without tp_plan. A base that outgrows a GPU can be sharded: {MORE}")
    kind = type(model).__name__
    expect(not kind.endswith(("Classification", "QuestionAnswering", "MultipleChoice")),
           f"{kind} has a head with labels of its own, and the base stays as it is, so no task "
           "could have others: expected a causal language model, which answers in words")
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    expect(embeddings is not None, f"{kind} has no get_input_embeddings(), which the keys need: "
           "expected a causal language model of transformers")
    # FSDP1 and ZeRO-3 take away the weights, or flatten them, while no pass is running.
    table = embeddings.weight
    wrapped = any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())
    expect(table.dim() == 2 and table.numel() > 0 and not wrapped,
           "the base is sharded by FSDP1 or ZeRO-3, which are not supported: expected FSDP2 "
           f"({MORE})")


def is_ours(owner):
    """Whether it is a SubExperts. By name and not by class: another copy of this file, or one that
    was reloaded, has another class of this name."""
    return type(owner).__name__ == "SubExperts"


def hooks_of(model):
    """[(id, object whose method it is, or None)] of all forward hooks in a model. A deepcopy of a
    layer has hooks of the same ids."""
    return [(key, getattr(hook, "__self__", None)) for module in model.modules()
            for key, hook in module._forward_hooks.items()]


def check_layers(hooks, layers):
    """Raise ValueError if somebody has removed a hook, or has sharded the experts.

    hooks: what `hooks_of` returned for the model.
    """
    owners = {id(owner) for _, owner in hooks}
    wrapped = {key for key, owner in hooks if not is_ours(owner)}
    for layer in layers:
        # A hook that somebody has wrapped in a function still has its id. In a copy of the linear
        # layer, which quantize_dynamic makes, it has another id and still belongs to `layer`.
        expect(id(layer) in owners or layer.handle.id in wrapped,
               "the hook of a target is gone, so the layer would be the bare base: detach() this "
               "MoSE (unless you did), and load() it again")
        expect(type(layer.weight) is nn.Parameter and layer.weight.shape == layer.frozen.shape,
               "the experts are sharded: shard the base first and attach the experts then, or pass "
               f"all parameters of mose.layers as ignored_params ({MORE})")


def check_copies(hooks, layers):
    """Raise ValueError if somebody has copied a layer with its experts into the model: a copy would
    always apply the task that was in force then.

    hooks: what `hooks_of` returned for the model.
    """
    ids = {id(layer) for layer in layers}
    copies = [owner for _, owner in hooks if is_ours(owner) and id(owner) not in ids]
    expect(not copies, f"{len(copies)} layers of the model are copies of targets, with experts "
                       "that no task reaches: detach() this MoSE, and load() it again")


def check_base_is_frozen(model, layers):
    """Raise ValueError if the base is no longer frozen: an optimizer could then change it, and with
    it what finished tasks compute."""
    experts = {id(p) for layer in layers for p in layer.parameters()}
    free = [name for name, p in model.named_parameters()
            if p.requires_grad and id(p) not in experts]
    expect(not free, f"the base has to stay frozen, but {len(free)} of its parameters require a "
                     f"gradient: {free[:3]}. Call requires_grad_(False) on these alone, and not "
                     "on the experts. peft makes its LoRA trainable when it is added, and each "
                     "time that disable_adapter() ends")


def warn_of_unused(model, layers, name):
    """Warn if the task of this name, or some of the target layers, learned nothing.

    B starts at 0 and moves at the first step. Where it is still 0, no gradient has reached the
    experts. If that is so in some layers only, the model may read `weight` without calling the
    layer, as the fast path of Mamba does.
    """
    able = [layer for layer in layers if layer.gets_new_B()]
    unused = [layer for layer in able if not layer.split(layer.weight)[1].any()]
    paths = [path for path, module in model.named_modules()
             if getattr(module, "sub_experts", None) in unused]
    if unused and len(unused) == len(able):
        warnings.warn(f"task {name!r} learned nothing: no step of an optimizer has changed it. "
                      "forget() it, and learn it again. It has to be in force while it is trained, "
                      "the optimizer needs its trainable_parameters(), and the model has to call "
                      "the target layers, and not read their weights itself", stacklevel=3)
    elif paths:
        warnings.warn(f"target layers learned nothing, {len(paths)} in all: {paths[:3]}. No "
                      "gradient reached them. If the model reads their weights itself, leave them "
                      "out of targets", stacklevel=3)


def autocast_off(device):
    """A context without autocast.

    torch's own context takes longer than the products of a token, so it is entered only where
    autocast is on, or may be on later: an exported graph may run under autocast.
    """
    if not torch.amp.is_autocast_available(device.type):  # say, on the meta device
        return contextlib.nullcontext()
    if torch.is_autocast_enabled(device.type) or torch.compiler.is_exporting():
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def expect_rows(x, num_rows):
    """Raise ValueError unless x (B, .., D) has a row for each task of the list in force."""
    expect(x.dim() >= 3 and len(x) == num_rows,
           f"a list of {num_rows} tasks is in force, and a layer got {tuple(x.shape)}: expected as "
           "many rows. generate() repeats each example for beams and for several answers: repeat "
           "its name as often, side by side. A layer that gets tokens without their batch takes "
           "one task only")


def compressed(numbers):
    """Numbers of 4 bytes each (k,) as bytes, compressed. The first bytes of all numbers come first,
    then all second bytes, and so on: bytes that are alike stand together, and compress better."""
    planes = numbers.contiguous().view(torch.uint8).view(-1, 4).T
    return lzma.compress(bytes(planes.flatten().tolist()))  # a list, since numpy may be missing


def decompressed(data, dtype):
    """The inverse of `compressed`."""
    data = lzma.decompress(data)
    expect(len(data) % 4 == 0, f"{len(data)} bytes, expected 4 for each number")
    planes = torch.tensor([*data], dtype=torch.uint8, device="cpu").view(4, -1)
    return planes.T.flatten().view(dtype)


def same_on_all_ranks(value):
    """The value that the first process has: a task has to start alike in all of them."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        box = [value]
        torch.distributed.broadcast_object_list(box)
        return box[0]
    return value


def unpadded(input_ids, attention_mask):
    """The prompts (B, T) as a list of their ids (T,), without padding."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    expect(input_ids.dim() == 2 and mask.shape == input_ids.shape,
           f"got ids {tuple(input_ids.shape)} and an attention_mask {tuple(mask.shape)}, expected "
           "(B, T) for both")
    expect(((mask == 0) | (mask == 1)).all(),
           "attention_mask: expected 1 for text and 0 for padding, and nothing else")
    expect(len(input_ids) > 0, "got no prompts, expected at least one")
    prompts = [ids[own] for ids, own in zip(input_ids.cpu(), mask.cpu().bool())]
    for ids in prompts:
        expect(len(ids) > 0, "a prompt is nothing but padding")
        expect(ids.min() >= 0, f"got the id {int(ids.min())}, expected ids >= 0. If it is padding, "
                               "pass the attention_mask")
    return prompts


# ------------------------------------------------------------------------------ the same base


def plain(weight, layer=None):
    """Any weight as an ordinary dense tensor. An ordinary one is not copied.

    layer: whose `weight` it is, for a weight that accelerate keeps elsewhere.
    """
    if weight.is_meta:
        hook = getattr(layer, "_hf_hook", None)
        kept = getattr(hook, "weights_map", None)
        expect(kept is not None, "part of the base is offloaded (meta device), and no hook of "
               "accelerate says where its values are: load it without that")
        weight = kept["weight"]
    weight = weight.detach()
    if hasattr(weight, "full_tensor"):  # a DTensor of FSDP2: all ranks have to come here together
        weight = weight.full_tensor()
    # The quantised weights of torchao, quanto and torch are tensors of a type of their own.
    special = type(weight) is not torch.Tensor or weight.is_quantized
    return weight.dequantize() if special else weight


def numbers_of(tensor):
    """Three numbers for a tensor W, nearly the same for its fp32, fp16 and bf16 copies.

    Two are u W V / |W| with fixed signs u and V: they depend on what stands where, and rounding
    moves them by thousandths. The third is log |W|, since the others don't depend on the scale.
    """
    W = plain(tensor).float()
    W = W.reshape(len(W) if W.dim() > 1 else 1, -1)
    u, V = fixed_signs(1, len(W)).to(W), fixed_signs(W.shape[1], 2).to(W)
    norm = W.norm()
    with autocast_off(W.device):
        products = (u @ W @ V / norm)[0]
    return torch.cat([products, norm.log()[None]]).nan_to_num().tolist()


def fingerprint(model):
    """{name: numbers} of what makes a base: its tensors, its positions, how many weights it has.

    It is taken when a MoSE is attached. Later, a forward pass may have packed the weights in
    another way, or accelerate may have moved them elsewhere.
    """
    for module in model.modules():
        # FSDP2 may leave a layer unsharded after a pass. A table that two modules share would then
        # be two tensors.
        if hasattr(module, "reshard"):
            module.reshard()
    tensors = [*model.named_parameters(remove_duplicate=False)]  # a tied table by all its names
    for path, module in model.named_modules():  # the codes and scales of GPTQ and AWQ are buffers
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                tensors.append((f"{path}.{key}", buffer))
    result = {name: numbers_of(tensor) for name, tensor in tensors if tensor.numel() > 0}
    # Versions of transformers name and group some tensors differently. The number of all weights
    # stays, and shows a LoRA that was added.
    result["number of weights"] = [float(sum(p.numel() for p in model.parameters()))]
    # The frequencies of positions have several names too, so all of them are compared together.
    waves = sorted({tuple(numbers_of(wave)) for wave in frequencies(model)})
    result["frequencies of positions"] = [number for wave in waves for number in wave]
    # Two settings of dynamic positions can have the same frequencies until a batch is long, so the
    # settings are compared too.
    config = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}  # there are other configs
    for name, value in leaves(settings):
        if "rope_" in name:
            for group in ("rope_parameters.", "rope_scaling."):  # in transformers 5, and in 4
                name = name.replace(group, "")
            result[f"config.{name}"] = value
    return result


def frequencies(model):
    """The frequencies of all rotary positions of a model."""
    for module in model.modules():
        # Dynamic and longrope positions change inv_freq with the length of the last batch, and
        # keep what it was at first in original_inv_freq.
        kind = str(getattr(module, "rope_type", ""))
        changes = "dynamic" in kind or "longrope" in kind
        for name, value in {**vars(module), **module._buffers}.items():
            if not name.endswith("inv_freq"):
                continue
            if changes:
                is_wanted = "original_" in name
            else:  # (long_inv_freq is made of the config when the first long batch comes)
                is_wanted = "original_" not in name and "long_" not in name
            if is_wanted and torch.is_tensor(value):  # some models make it at their first pass
                yield value


def leaves(tree, path=""):
    """(path, value) of everything that nested dicts hold."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def as_list(value):
    """A tuple as a list, and anything else as it is."""
    return [*value] if isinstance(value, tuple) else value


def differences(saved, here, needed):
    """What differs between two fingerprints, by name; [] if they are of the same base.

    A base whose weights were changed by some thousandths counts as the same, since rounding changes
    as much. Only what both have is compared: versions of transformers name some tensors
    differently. But each module in `needed` (paths of adapted layers and embeddings) must have a
    tensor in both.
    """
    both = [name for name in saved if name in here]
    wrong = [path for path in needed if not any(name.startswith(f"{path}.") for name in both)]
    for name in both:
        a, b = saved[name], here[name]
        if name.startswith("config."):
            # A config that was loaded from JSON has lists where it had tuples.
            same = as_list(a) == as_list(b)
        elif len(a) != len(b):
            same = False
        else:
            same = all(abs(x - y) <= 0.01 for x, y in zip(a, b))
        if not same:
            wrong.append(name)
    return wrong
