"""What the experts cost on bases of the size that people use, computed from shapes.

    python -m benchmarks.cost       # no GPU and no download; writes results/cost.md

The bytes of learning are checked against mose.py itself, on one random base. Those of a saved task
rest on what tasks of SmolLM2-135M take (results/smollm2.md): training decides how well a task can be
compressed.
"""

from pathlib import Path

import torch
import transformers

from mose import MoSE, MoSEConfig

ROOT = Path(__file__).resolve().parent.parent
CONFIG = MoSEConfig()

# hidden size, size of the MLP, layers, outputs of k and v, vocabulary, whether the head is tied
BASES = {"Llama-3.2-1B": (2048, 8192, 16, 512, 128256, True),
         "Llama-3.1-8B": (4096, 14336, 32, 1024, 128256, False),
         "Llama-3.1-70B": (8192, 28672, 80, 1024, 128256, False)}
CHECKED = (512, 2048, 4, 128, 2048, True)
SETS = {"q, v": ("q_proj", "v_proj"),
        "all linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")}

POOL = 4 + 4 + 4 + 4 + 1  # bytes of an entry: weight, score, frozen value, owner, inherited
ADAM = 4 * 4  # two states of a weight and two of a score
GRADIENTS = 4 + 4  # of weight and score
KEPT = 10  # what a pass keeps for backward: masked values, used entries, the matrices of a layer
# Bytes of an entry in the file, where all is compressed: of its place (as a gap between entries),
# of its value, and of a number of a LoRA. These are those of the eight tasks of SmolLM2, rounded.
MASK, VALUE, LORA = 1.0, 3.1, 3.5


def linear_layers(base):
    """{name: (D, O)} of the linear layers of one decoder layer."""
    hidden, mlp, _, kv, _, _ = base
    return {"q_proj": (hidden, hidden), "k_proj": (hidden, kv), "v_proj": (hidden, kv),
            "o_proj": (hidden, hidden), "gate_proj": (hidden, mlp), "up_proj": (hidden, mlp),
            "down_proj": (mlp, hidden)}


def numbers_of(base):
    """The weights of a base."""
    hidden, _, layers, _, vocabulary, tied = base
    one = sum(D * O for D, O in linear_layers(base).values()) + 2 * hidden
    return layers * one + hidden + vocabulary * hidden * (1 if tied else 2)


def cost(base, targets, rank=CONFIG.rank):
    """What the experts on a base cost, in entries and bytes; and the LoRA of equal bytes."""
    layers = base[2]
    # A LoRA of rank 1 has as many numbers on these layers.
    width = layers * sum(sum(linear_layers(base)[name]) for name in targets)
    entries = CONFIG.num_experts * rank * width
    new = int(CONFIG.density * entries)
    routers = 4 * CONFIG.num_experts * CONFIG.router_dim * layers * len(targets)
    task = (MASK + VALUE) * new + routers + 4 * CONFIG.key_dim
    return {"entries": entries, "pool": POOL * entries, "adam": ADAM * entries,
            "gradients": (GRADIENTS + KEPT) * entries, "new": new, "task": task, "lora": task / (LORA * width)}


def learning_with_fixed_A(base, targets):
    """Bytes of learning if A is fixed: the pool is B alone, and A is one fp32 buffer."""
    width = CONFIG.num_experts * CONFIG.rank * base[2]
    inputs, outputs = (sum(sizes) for sizes in zip(*(linear_layers(base)[name] for name in targets)))
    return 4 * width * inputs + (POOL + ADAM + GRADIENTS + KEPT) * width * outputs


def check():
    """(kind, computed, measured) bytes on one random base, with every linear layer as a target."""
    hidden, mlp, layers, kv, vocabulary, _ = CHECKED
    config = transformers.AutoConfig.for_model(
        "llama", hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        vocab_size=vocabulary, num_attention_heads=8, num_key_value_heads=8 * kv // hidden,
        tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert numbers_of(CHECKED) == sum(p.numel() for p in model.parameters())
    mose = MoSE(model, MoSEConfig(targets=SETS["all linear"]))
    computed = cost(CHECKED, SETS["all linear"])
    mose.begin_task("a")
    own = mose.trainable_parameters()
    optimizer = torch.optim.AdamW(own, lr=1e-3)
    ids = torch.randint(vocabulary, (2, 16))
    saved = {}  # {storage: bytes} of what belongs to the experts, which is large and in fp32

    def keep(tensor):
        if tensor.numel() >= min(layer.size_A for layer in mose.layers):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    base = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    kept = sum(count for place, count in saved.items() if place not in base)
    loss.backward()
    optimizer.step()

    def size(*tensors):
        return sum(tensor.nbytes for tensor in tensors)

    pools = [tensor for layer in mose.layers
             for tensor in (layer.weight, layer.score, layer.frozen, layer.owner, layer.inherited)]
    states = [state for values in optimizer.state.values() for state in values.values()]
    gradients = [p.grad for p in own]
    rows = [("pool", computed["pool"], size(*pools)),
            ("Adam's states", computed["adam"], size(*states)),
            ("gradients", GRADIENTS * computed["entries"], size(*gradients))]
    return [*rows, ("what a pass keeps", KEPT * computed["entries"], kept)]


def gb(count):
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def main():
    text = [
        "# What the experts cost at the size that people use", "",
        f"Computed from shapes, for the defaults: {CONFIG.num_experts} experts of rank "
        f"{CONFIG.rank}, density {CONFIG.density}. `python -m benchmarks.cost` writes this file.", "",
        "The pool is the weights, the scores, the frozen values, the owners and a mask, in all "
        f"{POOL} bytes an entry. Adam's states", f"are {ADAM} bytes an entry, the gradients "
        f"{GRADIENTS}, and what a pass keeps for backward about {KEPT}. Learning takes all four, "
        "and", "using what was learned takes the pool, and 4 bytes an entry for each task that is in force (its matrices). "
        "A task is the first one: its values, mask, routers and key, compressed as they are saved. "
        f"Later tasks take {CONFIG.density:.0%} of what is", "still free, so they take less. The last column is the "
        "rank of a LoRA on the same layers, in fp32 and compressed too, with the bytes of a task.", "",
        "| base, in bf16 | experts on | entries | pool | Adam's states | gradients and pass | a task | LoRA of "
        "equal bytes |", "|---|---|---|---|---|---|---|---|"]
    for name, base in BASES.items():
        for layers, targets in SETS.items():
            c = cost(base, targets)
            text.append(
                f"| {name}, {gb(2 * numbers_of(base))} | {layers} | {c['entries'] / 1e6:.1f} M | "
                f"{gb(c['pool'])} | {gb(c['adam'])} | {gb(c['gradients'])} | {gb(c['task'])} | rank "
                f"{c['lora']:.1f} |")
    text += [
        "", "## Where this is too much", "",
        "All of it falls in proportion to the rank of the experts, and with fewer target layers. The "
        "states of the optimizer can", "be made smaller without a change of mose.py, since the "
        "caller makes the optimizer. This is what learning takes (pool, Adam's", "states, gradients) "
        "with each choice:", "",
        "| base | experts on | as it is | states in bf16 (8 bytes) | 8-bit Adam (4 bytes) | rank 8 | "
        "rank 4 | fixed A |", "|---|---|---|---|---|---|---|---|"]
    for name, base in BASES.items():
        for layers, targets in SETS.items():
            c = cost(base, targets)
            rest = c["pool"] + c["gradients"]
            sizes = [rest + c["adam"], rest + 8 * c["entries"], rest + 4 * c["entries"]]
            for rank in (8, 4):
                smaller = cost(base, targets, rank)
                sizes.append(smaller["pool"] + smaller["gradients"] + smaller["adam"])
            sizes.append(learning_with_fixed_A(base, targets))
            text.append(f"| {name} | {layers} | " + " | ".join(map(gb, sizes)) + " |")
    text += [
        "", f"At half the rank and density {2 * CONFIG.density} a task has as many entries as above. What these "
        "choices cost in score on", "tiny-llm and trace-mini stands in the [frontier](frontier.md): `rank 8`, "
        "`rank 4`, `bf16 states` and `8-bit Adam`.",
        "", "## The check", "",
        "On a random base of 4 layers with 512 hidden numbers, experts on all linear layers, after "
        "one step of AdamW:", "", "| | computed | measured |", "|---|---|---|"]
    text += [f"| {kind} | {gb(computed)} | {gb(measured)} |" for kind, computed, measured in check()]
    (ROOT / "results/cost.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
