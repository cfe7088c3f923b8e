"""The base model: loading it, the logits of answers, and greedy decoding."""

import safetensors
import torch
import transformers

from tracebench import processes
from tracebench.data import cut, pad, passes, to_text

# A pass without gradients takes less memory for each token than a training pass, so it may have
# this many times --tokens. Decoding has the logits of one token of each row only, and larger passes
# decode faster. (With --checkpointing, a training pass takes less memory too. If decoding then runs
# out of memory, lower --tokens.)
TOKENS_FACTOR_WITHOUT_GRADIENTS = 4
TOKENS_FACTOR_OF_DECODING = 8

# The examples of a pass that a process makes only because others need its shard of the base:
# padding, and no label.
IDLE = [([0, 0], [-100, -100])]


def choose_device(args):
    """(device, dtype) as asked for, or the best that is here. Raises ValueError if there should be a
    GPU."""
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    device = best.type if args.device == "auto" else args.device
    learns = not args.resume and not args.ask
    if args.preset == "gpu" and args.device == "auto" and device == "cpu" and learns:
        raise ValueError("--preset gpu: torch sees no GPU. On a CPU this takes days: add --device "
                         "cpu if you want that")
    if args.dtype != "auto":
        return device, getattr(torch, args.dtype)
    # (A GPU older than Ampere only emulates bf16, which is slower than fp32.)
    fast = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return device, torch.bfloat16 if fast else torch.float32


def is_out_of_memory(error):
    """Whether a RuntimeError is one. (On a CPU, and on Apple's GPUs, it is no OutOfMemoryError.)"""
    says = str(error)
    return (isinstance(error, torch.OutOfMemoryError) or "out of memory" in says
            or "can't allocate memory" in says or "ALLOC_FAILED" in says)  # (the last is cuBLAS)


def load_model(args):
    """The base and its tokenizer, with the ids that some of them lack."""
    device, dtype = choose_device(args)
    options = {"dtype": dtype, "device_map": args.device_map or None}
    if args.shard:  # (shards() also sets processes.SHARDED.)
        options |= processes.shards()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            args.model, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError, RuntimeError, safetensors.SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"--model {args.model}: can't be loaded. Expected the name of a causal "
                         "language model on the hub, or a folder with its config.json, its "
                         "tokenizer and its weights. (A model that needs code of its own is not "
                         f"supported.) {type(error).__name__}: {error}") from error
    missing = sorted(found["missing_keys"])
    if missing:  # transformers draws them at random, and goes on
        raise ValueError(f"--model {args.model}: {len(missing)} of its weights are not in its files, "
                         f"such as {missing[0]}: expected those of the whole model, under the names "
                         "that save_pretrained() gives them")
    model = model if args.device_map or processes.SHARDED else model.to(device)
    if model.device.type != device and processes.SHARDED:
        raise ValueError(f"--shard puts the base on {model.device.type}, and --device is {device}: "
                         "leave --device out")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{args.model}: its tokenizer has no EOS, so answers would never end: set the "
                         "eos_token in its tokenizer_config.json")
    # Some tokenizers have no token for padding, or one that was added and that the model lacks.
    num_tokens = model.get_input_embeddings().weight.shape[0]
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= num_tokens:
        tokenizer.pad_token = tokenizer.eos_token  # it is masked everywhere
    # A checkpoint's own settings may sample or punish repetition; scores are for greedy decoding.
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.eval(), tokenizer


def passes_of_this_process(examples, tokens):
    """This process's share of some examples, in lists for one pass of at most `tokens` tokens."""
    return processes.own_passes(examples, lambda some: passes(some, tokens), IDLE)


def answer_logits(model, tokenizer, examples):
    """Of the n answer tokens of some examples (ids, labels): logits (n, V), labels (n,), and the
    index (n,) of the example that each token belongs to."""
    ids, mask = pad([ids for ids, _ in examples], tokenizer.pad_token_id)
    labels = pad([labels for _, labels in examples], -100)[0][:, 1:].to(model.device)
    wanted, head = labels != -100, model.get_output_embeddings()

    def only_wanted(head, inputs):
        """Of the hidden states (B, T, D), those (n, D) that are followed by a label. The logits of
        all others would be most of what a step holds in memory, and no loss reads them. This is a
        hook, so that what some models do after their head (scale, soft-cap) stays as it is."""
        return inputs[0][:, :-1][wanted.to(inputs[0].device)]

    with head.register_forward_pre_hook(only_wanted):
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
                       use_cache=False).logits  # nothing is decoded, so no key or value is kept
    return logits.float(), labels[wanted], wanted.nonzero()[:, 0]


@torch.no_grad()
def generate(model, tokenizer, task, indices, args):
    """Greedy answers {index: text} to the test prompts of these indices, from the prompts alone.
    Every process gets all answers."""
    prompts = {i: cut(task.test_prompt_ids[i], task.limit, tokenizer.bos_token_id) for i in indices}

    def in_passes(some):
        tokens_of_a_pass = TOKENS_FACTOR_OF_DECODING * args.tokens
        return passes(some, tokens_of_a_pass, lambda i: len(prompts[i]) + task.max_new)

    texts = {}
    todo = [*processes.own_passes(indices, in_passes, idle=[])]
    while todo:
        some = todo.pop(0)
        # The prompts are padded on the left, so that every answer begins at the same position.
        rows = [prompts[i] for i in some] or [ids for ids, _ in IDLE]  # an idle pass has no prompts
        ids, mask = pad(rows, tokenizer.pad_token_id, "left")
        try:
            out = model.generate(input_ids=ids.to(model.device),
                                 attention_mask=mask.to(model.device),
                                 max_new_tokens=task.max_new, synced_gpus=processes.SHARDED)
        except RuntimeError as error:
            # The task has just been learned, and would have to be learned again if this ended the
            # run. (With a sharded base, all processes have to make the same passes.)
            if not is_out_of_memory(error) or len(some) < 2 or processes.SHARDED:
                raise
            half = len(some) // 2
            todo = [some[:half], some[half:], *todo]
            continue
        for i, answer in zip(some, out[:, ids.shape[1]:]):
            texts[i] = to_text(tokenizer, answer)
    return processes.union(texts)
