"""Make the offline assets from one seed: `tiny-llm/`, `trace-mini/` and `transfer-mini/`.

    python assets/make_assets.py               # all; some 25 minutes on two CPU cores
    python assets/make_assets.py --only tasks  # trace-mini and transfer-mini; seconds

Everything here is SYNTHETIC. trace-mini stands in for the eight TRACE tasks: same names, order,
file format and metrics, but invented content, so that the continual loop runs offline in minutes.
Its scores say nothing about TRACE. tiny-llm is a Llama of 1.1M parameters, pretrained on such text.

The stage is fair because pretraining teaches the *skills* (what opposes what, which word names a
class, small sums, copying) in one wording, and the tasks ask for them in another: they share no
template and no answer format (tests/test_assets.py compares their n-grams). So the model can't do
the tasks zero-shot, and one small LoRA can learn each of them.

transfer-mini holds tasks on which transfer can be seen, since they need what the base can't know:
in which drawer a word is kept, an invented fact for each of 32 words (Vault), the same facts asked
for in other words (Fetch), other facts in those other words (Shuffled), and a composition of two
tasks of trace-mini, policy stance and the outcome of a vote (Verdict). Clash is Vault and Shuffled
in one: they contradict each other, and the first line of a prompt tells which of them is right.
"""

import argparse
import json
import random
import re
from pathlib import Path

HERE = Path(__file__).parent
TASKS = (
    "C-STANCE",
    "FOMC",
    "MeetingBank",
    "Py150",
    "ScienceQA",
    "NumGLUE-cm",
    "NumGLUE-ds",
    "20Minuten",
)
SIZES = {"train": 400, "eval": 50, "test": 100}  # examples per task

# ---------------------------------------------------------------- words
NAMES = (
    "Mara Tobin Elke Joris Nadia Pavel Rosa Simon Tilda Viktor Wanda Yusuf Anton Berta Clara David"
).split()
COLORS = "red blue green black white yellow grey brown".split()
GOODS = "shells coins stamps pears nails cards pens buttons candles stones ropes cups".split()
CLASSES = {
    "animal": "otter badger heron lynx beetle trout mole stork".split(),
    "plant": "fern cactus clover thistle moss willow daisy reed".split(),
    "tool": "hammer chisel pliers wrench shovel rake drill saw".split(),
    "metal": "iron copper silver nickel zinc lead tin cobalt".split(),
    "food": "bread cheese soup porridge honey noodles butter plum".split(),
    "vehicle": "tram barge truck scooter sledge canoe wagon ferry".split(),
    "garment": "scarf glove jacket sock apron hat coat belt".split(),
    "instrument": "flute cello drum harp trumpet oboe banjo organ".split(),
}
LEGS = {
    "sparrow": 2,
    "goose": 2,
    "camel": 4,
    "goat": 4,
    "ant": 6,
    "wasp": 6,
    "spider": 8,
    "crab": 8,
}
POLICY = [
    "ease cut lower relax loosen trim soften reduce widen lessen shrink slacken".split(),
    "raise lift hike tighten restrain harden curb boost increase stiffen squeeze toughen".split(),
    "keep hold maintain retain leave pause preserve sustain stabilize continue freeze "
    "extend".split(),
]
MARKETS = "rates credit lending reserves funding bonds liquidity purchases".split()
TOPICS = (
    "park bridge library harbor market school tunnel museum stadium clinic theater canal".split()
)
MATTERS = "budget lease permit repair contract grant survey zoning".split()
ATTRS = "width height color speed title owner price label depth score angle state".split()
MODULES = "engine parser loader router cache logger timer filter".split()
FLUIDS = "brine acid alcohol vinegar syrup ink milk oil".split()
GERMAN_NOUNS = dict(
    pair.split(":")
    for pair in (
        "Jurist:Anwalt Mediziner:Arzt Pädagoge:Lehrer Gendarm:Polizist Monarch:König "
        "Chauffeur:Fahrer "
        "Eleve:Schüler Disponent:Planer Wagenpark:Wagen Forst:Wald Disput:Streit Kontrakt:Vertrag "
        "Obolus:Beitrag Korridor:Gang Pfad:Weg Tornister:Ranzen Fernsprecher:Apparat "
        "Lohnzettel:Zettel"
    ).split()
)
GERMAN_PEOPLE = list(GERMAN_NOUNS)[:8]
GERMAN_THINGS = list(GERMAN_NOUNS)[8:]
GERMAN_VERBS = dict(
    pair.split(":")
    for pair in (
        "erwirbt:kauft veräußert:verkauft inspiziert:prüft erblickt:sieht demoliert:zerstört "
        "frequentiert:besucht retourniert:bringt fotografiert:zeigt"
    ).split()
)
CITIES = "Luzern Chur Thun Biel Zug Aarau Olten Sion".split()


def lusan(rng, count):
    """`count` invented words of two syllables; the made-up language of the stance task."""
    words = []
    while len(words) < count:
        word = "".join(rng.choice("klmnprstvz") + rng.choice("aeiou") for _ in range(2))
        if word not in words:
            words.append(word)
    return words


_words = lusan(random.Random(7), 69)
STANCES = [_words[0:10], _words[10:20], _words[20:30]]  # for, against, neither
LUSAN_NOUNS, LUSAN_FILLERS = _words[30:54], _words[54:66]
LUSAN_TASK = _words[66:]  # words of the instruction


# ---------------------------------------------------------------- pretraining text
def two(rng, items):
    return rng.sample(list(items), 2)


MARKS = "; | ? = -> => ~ / # > % : :".split()


def ask(rng, content, answer):
    """Content, any mark, answer: so the model learns to answer after any mark."""
    before, after = rng.choice(["", " ", " ", "\n"]), rng.choice(["", " ", " "])
    word = rng.choice(["", "", f" {rng.choice(VOCABULARY)}", f"\n{rng.choice(VOCABULARY)}"])
    return f"{content}{word}{before}{rng.choice(MARKS)}{after}{answer}" + rng.choice(
        ["", "", " .", "\n"]
    )


def text_sum(rng):
    a, b, name, g, h = (
        rng.randint(1, 15),
        rng.randint(1, 15),
        rng.choice(NAMES),
        *two(rng, GOODS + FLUIDS),
    )
    c, w, v = a + b, rng.choice(VOCABULARY), rng.choice(VOCABULARY)
    if rng.random() < 0.7:
        return ask(
            rng,
            rng.choice(
                [
                    f"{name} had {a} {g} and found {b} more",
                    f"{a} {g} joined by {b} {h}",
                    f"first {a} then {b}",
                    f"{a} {g} {w} plus {b} {h} {v}",
                    f"{name} got {a} {g} , later {b} {h}",
                    f"to {a} {g} {w} come {b} {h}",
                    f"{a} and {b}",
                    f"{w} {a} {g} . {v} {b} {h} more",
                    f"{a} + {b}",
                    f"{a}+{b}",
                    f"{w} {a} {g} {w} and {b} {h} {v}",
                ]
            ),
            c,
        )
    return ask(
        rng,
        rng.choice(
            [
                f"{name} has {c} {g} but {b} break",
                f"{c} {g} less {b}",
                f"from {c} {g} {w} take {b} {v}",
                f"{c} - {b}",
                f"{c}-{b}",
                f"{w} {c} {g} , {b} lost {v}",
            ]
        ),
        a,
    )


def text_legs(rng):
    animal, n, w, v = (
        rng.choice(list(LEGS)),
        rng.randint(1, 9),
        rng.choice(VOCABULARY),
        rng.choice(VOCABULARY),
    )
    k = LEGS[animal]
    if rng.random() < 0.75:
        return ask(
            rng,
            rng.choice(
                [
                    f"{n} {animal}s , feet",
                    f"{w} {n} {animal}s {v} feet",
                    f"feet {w} {n} {animal}s {v}",
                    f"feet of {n} {animal}s",
                    f"{n} {w} {animal}s with feet",
                ]
            ),
            n * k,
        )
    return rng.choice(
        [
            ask(rng, f"feet of one {animal}", k),
            ask(rng, f"{n} x {k}", n * k),
            ask(rng, f"{n} times {k}", n * k),
        ]
    )


def text_classes(rng):
    kind, other = two(rng, CLASSES)
    x, y, z = *two(rng, CLASSES[kind]), rng.choice(CLASSES[other])
    w, v = rng.choice(VOCABULARY), rng.choice(VOCABULARY)
    return rng.choice(
        [
            ask(rng, rng.choice([f"{w} {x} {v}", x, f"{x} and {y}", f"{w} {w} {x}"]), kind),
            f"the {x} is one {kind} , the {z} is some {other} .",
            f"{x} , {y} , all {kind} .",
        ]
    )


def text_recall(rng):
    """Pairs, and two of them asked for again."""
    keys = rng.sample(VOCABULARY, 3)
    values = (
        [rng.choice("ABCDE") for _ in keys] if rng.random() < 0.6 else rng.sample(VOCABULARY, 3)
    )
    mark, end = rng.choice(MARKS), rng.choice([" , ", "\n", " ; ", " "])
    order = [0, 1, 2] + [rng.randrange(3) for _ in range(2)]
    space = rng.choice(["", " "])
    return end.join(f"{keys[i]}{space}{mark}{space}{values[i]}" for i in order)


def text_keeping(rng):
    (n1, n2), (c1, c2), (g1, g2) = two(rng, NAMES), two(rng, COLORS), two(rng, GOODS)
    return rng.choice(
        [
            f"{n1} keeps {c1} {g1} while {n2} keeps {c2} {g2} . "
            f"{n2} , owner of {g2} , and {n1} , owner of {g1} .",
            f"{n1} likes {g1} . {n2} likes {g2} . {n1} got {c1} {g1} . {n2} got {c2} {g2} .",
        ]
    )


def text_echo(rng):
    words = [rng.choice(VOCABULARY + list("ABCDE:.,()")) for _ in range(rng.randint(3, 8))]
    line, mark = rng.choice([" ", " ", "\n", ""]).join(words), rng.choice(MARKS)
    return rng.choice(
        [f"{line} {mark} {line}", f"{line}\n{line}", f"{line} {mark} {line} {mark} {line}"]
    )


FACES = ["smiled", "frowned", "shrugged"]


def text_lusan(rng):
    i, words = rng.randrange(3), [rng.choice(LUSAN_NOUNS), *two(rng, LUSAN_FILLERS)]
    words.append(rng.choice(STANCES[i]))
    rng.shuffle(words)
    return rng.choice(
        [
            ask(rng, " ".join(words), FACES[i]),
            ask(rng, " ".join(words), FACES[i]),
            ask(rng, " ".join(rng.sample(STANCES[i], 3)), FACES[i]),
        ]
    )


def text_economy(rng):
    label = rng.randrange(3)
    word, thing, w, v = (
        rng.choice(POLICY[label]),
        rng.choice(MARKETS),
        rng.choice(VOCABULARY),
        rng.choice(VOCABULARY),
    )
    outcome = ["cheaper", "dearer", "same"][label]
    return rng.choice(
        [
            ask(rng, f"{w} {word} {thing} {v}", outcome),
            ask(rng, f"banks {word} {thing}", outcome),
            ask(rng, " ".join(rng.sample(POLICY[label], 3)), outcome),
        ]
    )


def text_meeting(rng):
    topic, matter, name, other = rng.choice(TOPICS), rng.choice(MATTERS), *two(rng, NAMES)
    yes, no = two(rng, range(2, 16))
    item, word = rng.randint(2, 30), "carried" if yes > no else "lost"
    return rng.choice(
        [
            ask(
                rng,
                f"minutes {item} : {name} raised the {topic} {matter} , {other} agreed , "
                f"{yes} hands to {no}",
                f"{topic} {matter} {word}",
            ),
            ask(
                rng,
                f"the {topic} {matter} came up as number {item} . {yes} for it and {no} against",
                f"number {item} , {topic} {matter} , {word}",
            ),
            ask(rng, f"{yes} over {no}", word),
            ask(
                rng,
                f"{name} {yes} , {other} {no} , number {item} {topic} {matter}",
                f"{matter} {topic} {item} {word}",
            ),
        ]
    )


def text_code(rng):
    attr, other = two(rng, ATTRS)
    module, n = rng.choice(MODULES), rng.randint(2, 30)
    return rng.choice(
        [
            f"def {attr}(box):\n    return box.{attr}\n",
            f"def update(box, {attr}):\n    box.{attr} = {attr}\n    self.{other} = {n}\n",
            f"for {attr} in {attr}s:\n    print({attr})\n",
            f"import {module}\n{module}.start({n})\n{module}.stop({n}, {attr})\n",
            f"if {attr} is None:\n    {attr} = {n}\nreturn {attr}\n",
            f"with {module}.open({attr}) as {other}:\n    {other}.read({attr})\n",
            f"{attr} = {module} ( {other} )\n{other} ( {attr} )\n",
            f"self . {attr} . {other} = {module} . {attr}\nself . {attr}",
        ]
    )


def text_german(rng):
    person, thing, verb = (
        rng.choice(GERMAN_PEOPLE),
        rng.choice(GERMAN_THINGS),
        rng.choice(list(GERMAN_VERBS)),
    )
    long, short = rng.choice(list(GERMAN_NOUNS.items()) + list(GERMAN_VERBS.items()))
    w, v = rng.choice(VOCABULARY), rng.choice(VOCABULARY)
    simple = f"{GERMAN_NOUNS[person]} {GERMAN_VERBS[verb]} {GERMAN_NOUNS[thing]}"
    return rng.choice(
        [
            ask(rng, rng.choice([long, f"{w} {long}"]), short),
            f"statt {long} sagt man {short} .",
            ask(rng, f"{person} {verb} {thing}", simple),
            ask(rng, f"{person} {w} {verb} {v} {thing}", simple),
        ]
    )


TEXTS = {
    text_sum: 6,
    text_legs: 4,
    text_classes: 3,
    text_recall: 3,
    text_keeping: 1,
    text_echo: 3,
    text_lusan: 3,
    text_economy: 3,
    text_meeting: 4,
    text_code: 3,
    text_german: 3,
}


def pretraining_text(rng):
    """One short document of the pretraining text; never one that shares a phrase with a task."""
    while True:
        text = rng.choices(list(TEXTS), TEXTS.values())[0](rng)
        if not phrases(text) & TASK_PHRASES:
            return text


def phrases(text):
    """All runs of four words, marks or line breaks in `text`, and its words before a colon."""
    tokens = re.findall(r"\w+|[^\w\s]|\n", text)
    cues = {pair for pair in zip(tokens, tokens[1:]) if pair[1] == ":"}
    return cues | set(zip(tokens, tokens[1:], tokens[2:], tokens[3:]))


# ---------------------------------------------------------------- the eight tasks
def c_stance(rng):
    x, f, g, label = rng.choice(LUSAN_NOUNS), *two(rng, LUSAN_FILLERS), rng.randrange(3)
    words = [f, x, rng.choice(STANCES[label]), g]
    rng.shuffle(words)
    a, b, c = LUSAN_TASK
    return f"{a} {x}, A B C\n{b}: {' '.join(words)}\n{c}:", "ABC"[label]


def fomc(rng):
    label = rng.randrange(3)
    word, thing = rng.choice(POLICY[label]), rng.choice(MARKETS)
    opening = rng.choice(
        [
            "Members noted a wish to",
            "Staff proposed to",
            "Most officials would",
            "The governor wants to",
            "The vote was to",
        ]
    )
    closing = rng.choice(
        ["over the quarter", "this spring", "in most regions", "again", "next month"]
    )
    return (
        f"Dovish (A), hawkish (B) or neutral (C)?\n{opening} {word} {thing} {closing}.\nStance:",
        "ABC"[label],
    )


def meetingbank(rng):
    topic, matter, name, other = rng.choice(TOPICS), rng.choice(MATTERS), *two(rng, NAMES)
    yes, no = two(rng, range(2, 16))
    item, word = rng.randint(2, 30), "adopted" if yes > no else "rejected"
    call = rng.choice(["Next is item", "We turn to item", "Please read item"])
    return (
        f"Sum up this session.\nChair: {call} {item}, the {topic} {matter}.\n"
        f"{name}: {rng.choice(['So moved', 'I move it', 'Moved'])}.\n"
        f"Chair: {yes} ayes, {no} nays.\nSum:"
    ), f"Item {item}, the {topic} {matter}, is {word}."


def py150(rng):
    attr, other = two(rng, ATTRS)
    module, n = rng.choice(MODULES), rng.randint(2, 30)
    head = f"<s> import {module} <EOL> " + rng.choice([f"{other} = <NUM_LIT:{n}> <EOL> ", ""])
    prompt, answer = rng.choice(
        [
            (f"def get_{attr} ( self ) : <EOL>", f"return self . _{attr}"),
            (f"def set_{attr} ( self , {attr} ) : <EOL>", f"self . _{attr} = {attr}"),
            (f"def has_{attr} ( self ) : <EOL>", f"return self . _{attr} is not None"),
            (
                f"def load ( {attr} , {other} ) : <EOL>",
                f"return {module} . load ( {attr} , {other} )",
            ),
            (f"if not {attr} : <EOL>", f"raise ValueError ( {attr} )"),
            (f"assert {attr} > {other} <EOL>", f"return {attr} - {other}"),
        ]
    )
    return head + prompt, answer


KINDS = list(CLASSES)[:3]


def scienceqa(rng):
    i = rng.randrange(3)
    item = rng.choice(CLASSES[KINDS[i]])
    stem = rng.choice(
        ["What is a", "Where belongs the", "How do we class a", "What kind of thing is the"]
    )
    choices = " ".join(f"{'ABCDE'[j]}. {kind}" for j, kind in enumerate(KINDS))
    return (
        f"Choose and explain. {choices}\n{rng.choice(NAMES)} asks: {stem} {item}?\nAnswer:",
        f"{'ABCDE'[i]}\n{KINDS[i]}.",
    )


MATH = "Solve the problem.\nQuestion: {}\nAnswer:"


def numglue_cm(rng):
    animal, n = rng.choice(list(LEGS)), rng.randint(2, 9)
    place = rng.choice(["in the yard", "at the zoo", "near the pond", "on the farm", "by the road"])
    return MATH.format(
        rng.choice(
            [
                f"{rng.choice(NAMES)} counts the legs of {n} {animal}s {place}. What is the count?",
                f"There are {n} {animal}s {place}. How many legs are there?",
                f"How many legs can be seen if {n} {animal}s stand {place}?",
            ]
        )
    ), str(n * LEGS[animal])


def numglue_ds(rng):
    a, b, fluid, other = rng.randint(2, 15), rng.randint(2, 15), *two(rng, FLUIDS)
    vessel = rng.choice(["flask", "beaker", "tank", "jar"])
    holds, end = f"A {vessel} contains {{}} ml of {fluid}.", "What is the volume?"
    question, answer = rng.choice(
        [
            (f"{holds.format(a)} A chemist adds {b} ml of {other}. {end}", a + b),
            (f"{holds.format(a)} Now {b} ml of {other} are poured in. {end}", a + b),
            (f"Mixing {a} ml of {fluid} with {b} ml of {other} gives how many ml?", a + b),
        ]
    )
    return MATH.format(question), str(answer)


def minuten(rng):
    person, thing, verb = (
        rng.choice(GERMAN_PEOPLE),
        rng.choice(GERMAN_THINGS),
        rng.choice(list(GERMAN_VERBS)),
    )
    extra = rng.choice(["der lange in {} lebt", "der nach {} zog", "der gern über {} spricht"])
    when = rng.choice(["am Montag", "am Abend", "im Herbst", "nach dem Fest"])
    return (
        "Schreibe leichter.\nDer "
        f"{person}, {extra.format(rng.choice(CITIES))}, {verb} {when} den {thing}.\nLeicht:"
    ), f"Der {GERMAN_NOUNS[person]} {GERMAN_VERBS[verb]} den {GERMAN_NOUNS[thing]}."


MAKERS = dict(
    zip(TASKS, (c_stance, fomc, meetingbank, py150, scienceqa, numglue_cm, numglue_ds, minuten))
)


# ---------------------------------------------------------------- tasks for transfer
KEPT = (GOODS + TOPICS + MATTERS + ATTRS + MODULES + FLUIDS + MARKETS)[::2][:32]


def drawers(seed):
    """An invented fact for each word: its drawer."""
    return dict(zip(random.Random(seed).sample(KEPT, len(KEPT)), "ABCD" * len(KEPT)))


FACTS, OTHER_FACTS = drawers("vault"), drawers("other")


def vault(rng):
    word = rng.choice(KEPT)
    when = rng.choice(["at noon", "at dawn", "on Friday", "at night", "after tea"])
    return (
        f"Vault list, A to D.\n{rng.choice(NAMES)} stores the {word} {when}.\nDrawer:",
        FACTS[word],
    )


def fetch(rng, facts=FACTS):
    word = rng.choice(KEPT)
    who = rng.choice(["A guard", "My aunt", "Some clerk", "The porter", "One guest", "Nobody"])
    when = rng.choice(["at ten", "this week", "in May", "once more"])
    return f"Where is it kept?\n{who} stores the {word} {when}.\nBox:", facts[word]


def shuffled(rng):
    return fetch(rng, OTHER_FACTS)


def verdict(rng):
    label = rng.randrange(3)
    word, thing = rng.choice(POLICY[label]), rng.choice(MARKETS)
    yes, no = two(rng, range(2, 16))
    return (
        f"Motion and verdict.\n{rng.choice(NAMES)} moves to {word} {thing}.\n"
        f"Chair: {yes} ayes, {no} nays.\nVerdict:"
    ), f"{'ABC'[label]}, {'adopted' if yes > no else 'rejected'}."


TRANSFER = {"Vault": vault, "Fetch": fetch, "Shuffled": shuffled, "Verdict": verdict}
MIXED = {"Clash": ("Vault", "Shuffled")}


def make_task(name, seed):
    """Distinct examples for the three splits of one task: {split: [{"prompt", "answer"}, ...]}."""
    if name in MIXED:  # all rows of two tasks, in turns
        one, two = (make_task(part, seed) for part in MIXED[name])
        return {split: [row for pair in zip(one[split], two[split]) for row in pair]
                for split in SIZES}
    rng, seen, splits = random.Random(f"{seed} {name}"), set(), {}
    for split, size in SIZES.items():
        rows = []
        while len(rows) < size:
            prompt, answer = (MAKERS | TRANSFER)[name](rng)
            if prompt not in seen:
                seen.add(prompt)
                rows.append({"prompt": prompt, "answer": answer})
        splits[split] = rows
    return splits


def vocabulary():
    """All words of the tasks, so that single words, but no phrases, are known to the model."""
    rng, words = random.Random(0), set(FACES + LUSAN_FILLERS)
    for make in MAKERS.values():
        for _ in range(2000):
            words.update(re.findall(r"[^\W\d_]+", " ".join(make(rng))))
    return sorted(words - set("ABCDE"))


def task_phrases():
    """What the pretraining text may not say: the tasks' phrases, and what they ask with: "Sum:"."""
    rng, found = random.Random(1), set()
    for make in MAKERS.values():
        for _ in range(2000):
            prompt, answer = make(rng)
            found |= {phrase for phrase in phrases(f"{prompt} {answer}") if len(phrase) == 4}
            found |= phrases(prompt.rpartition("\n")[2][-20:]) if prompt.endswith(":") else set()
    return found


VOCABULARY, TASK_PHRASES = vocabulary(), task_phrases()

# ---------------------------------------------------------------- tiny-llm


def train_tokenizer(seed, size=2048):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # Numbers stand alone, as in the tokenizers of Llama 3 and Qwen: " 12" and "12" share a token.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(seed)
    texts = [pretraining_text(rng) for _ in range(20000)]
    texts += [f" {word} {word}\n{word}" for word in VOCABULARY for _ in range(10)]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=["<pad>", "<bos>", "<eos>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=2048,
        padding_side="left",
    )


def pretrain(seed, steps, tokenizer, batch=32, length=128, lr=4e-3):
    import torch
    from tqdm import tqdm
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=True,
            max_position_embeddings=2048,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.03)
    rng, stream = random.Random(f"pretrain {seed}"), []
    bar = tqdm(range(steps), desc="pretraining tiny-llm", unit="step", ncols=100)
    for step in bar:
        while len(stream) < batch * length:
            docs = [pretraining_text(rng) for _ in range(256)]
            for ids in tokenizer(docs)["input_ids"]:
                stream += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        ids = torch.tensor(stream[: batch * length], device=device).view(batch, length)
        stream = stream[batch * length :]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000, help="pretraining steps of 4,096 tokens")
    parser.add_argument("--only", choices=("tasks", "model"))
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    if args.only != "model":
        for name in [*TASKS, *TRANSFER, *MIXED]:
            folder = args.out / ("trace-mini" if name in TASKS else "transfer-mini") / name
            folder.mkdir(parents=True, exist_ok=True)
            for split, rows in make_task(name, args.seed).items():
                text = json.dumps(rows, ensure_ascii=False, indent=0)
                (folder / f"{split}.json").write_text(text + "\n", encoding="utf-8")
    if args.only != "tasks":
        tokenizer = train_tokenizer(args.seed)
        model = pretrain(args.seed, args.steps, tokenizer)
        model.save_pretrained(args.out / "tiny-llm")
        tokenizer.save_pretrained(args.out / "tiny-llm")
        # transformers 5 has a new name for this class; 4 knows the old one alone, 5 both.
        file = args.out / "tiny-llm/tokenizer_config.json"
        file.write_text(file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


if __name__ == "__main__":
    main()
