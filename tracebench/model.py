"""The base model: loading it, the logits of answers, and greedy decoding."""

import torch
import transformers

from tracebench import processes
from tracebench.data import cut, pad, passes, to_text

# A pass without gradients takes less memory for each token than a training pass, so it may have
# more than --tokens of them. The tokens of a cache take even less, and larger passes decode faster.
TOKENS_WITHOUT_GRADIENTS = 4  # times --tokens
TOKENS_IN_CACHE = 8  # times --tokens


def choose_device(args):
    """(device, dtype) as asked for, or the best that is here."""
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    device = best.type if args.device == "auto" else args.device
    if args.dtype != "auto":
        return device, getattr(torch, args.dtype)
    fast = device == "cuda" and torch.cuda.is_bf16_supported()
    return device, torch.bfloat16 if fast else torch.float32


def load_model(args):
    """The base and its tokenizer, with the ids that some of them lack."""
    device, dtype = choose_device(args)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=dtype, device_map=args.device_map or None)
    model = model if args.device_map else model.to(device)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{args.model}: its tokenizer has no EOS, so answers would never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # it is masked everywhere
    # A checkpoint's own settings may sample or punish repetition; scores are for greedy decoding.
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.eval(), tokenizer


def answer_logits(model, tokenizer, rows):
    """For each answer token of some examples: logits (n, V), labels (n,), its example (n,)."""
    ids, mask = pad([ids for ids, _ in rows], tokenizer.pad_token_id)
    labels = pad([labels for _, labels in rows], -100)[0][:, 1:].to(model.device)
    wanted, head = labels != -100, model.get_output_embeddings()

    def only_wanted(head, inputs):
        """Of the hidden states (B, T, D), those (n, D) that are followed by a label. The logits of
        all others would be most of what a step holds in memory, and no loss reads them. This is a
        hook, so that what some models do after their head (scale, soft-cap) stays as it is."""
        return inputs[0][:, :-1][wanted.to(inputs[0].device)]

    with head.register_forward_pre_hook(only_wanted):
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
    return logits.float(), labels[wanted], wanted.nonzero()[:, 0]


@torch.no_grad()
def generate(model, tokenizer, task, rows, args):
    """Greedy answers {row: text} to some of a task's test prompts, from the prompts alone."""
    prompts = {i: cut(task.test[i], task.limit, tokenizer.bos_token_id) for i in rows}
    groups = passes(rows, TOKENS_IN_CACHE * args.tokens, lambda i: len(prompts[i]) + task.max_new)
    texts = {}
    for some in processes.share(groups):
        # The prompts are padded on the left, so that every answer begins at the same position.
        ids, mask = pad([prompts[i] for i in some], tokenizer.pad_token_id, "left")
        out = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
                             max_new_tokens=task.max_new)
        for i, answer in zip(some, out[:, ids.shape[1]:]):
            texts[i] = to_text(tokenizer, answer)
    return processes.union(texts)
