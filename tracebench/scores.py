"""TRACE's five metrics, exactly as its code and the packages behind it score, and what papers make
of them: OP, BWT, standard errors, and a floor. Plain Python, and usable on its own:

    from tracebench.scores import score
    score("FOMC", predictions, golds, prompts)      # 0 .. 100

Each metric takes (prediction, gold, prompt) and returns 0 .. 100. tests/test_scores.py compares
them with the packages themselves (`rouge` 1.0.1, `rapidfuzz`): there is no difference. Where
TRACE's own code crashes (an empty prediction, or '.'), the score is 0.
"""

import collections
import random
import re
import statistics


def accuracy(prediction, gold, prompt):
    """Whole strings equal, nothing stripped, as TRACE does."""
    return 100.0 * (prediction == gold)


def first_letter(prediction, gold, prompt):
    """First characters equal; TRACE's own crashes on an empty prediction."""
    return 100.0 * (prediction[:1] == gold[:1])


def common_words(x, y):
    """The set of words on a longest common subsequence of two word lists; ties as in `rouge`."""
    length = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i, a in enumerate(x):
        for j, b in enumerate(y):
            best = max(length[i][j + 1], length[i + 1][j])
            length[i + 1][j + 1] = length[i][j] + 1 if a == b else best
    words, i, j = set(), len(x), len(y)
    while i and j:
        if x[i - 1] == y[j - 1]:
            i, j = i - 1, j - 1
            words.add(x[i])
        elif length[i - 1][j] > length[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def rouge_l(prediction, gold, prompt):
    """ROUGE-L F of the package `rouge` 1.0.1, which counts distinct words, called as TRACE does:
    get_scores(target, prediction). '' and '.' score 0."""
    # The package calls its arguments hypothesis and reference. TRACE gives it the gold first.
    sides = [text.split(".") for text in (gold, prediction)]
    hyps, refs = [[" ".join(s.split()).split(" ") for s in side if s] for side in sides]
    common = set().union(*(common_words(r, h) for r in refs for h in hyps))
    if not common:
        return 0.0
    recall, precision = (len(common) / len(set().union(*side)) for side in (refs, hyps))
    return 100.0 * (2 * precision * recall / (precision + recall + 1e-8))


def edit_similarity(prediction, gold, prompt):
    """2 * longest common subsequence / both lengths, in whole percent: fuzzywuzzy's ratio with
    python-Levenshtein. Literals count as their values."""
    def literals(code):
        code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
        return re.sub(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", r"\1", code, flags=re.S)

    a, b = literals(prediction), literals(gold)
    if not a or not b:
        return 0.0
    places, full = collections.defaultdict(int), (1 << len(a)) - 1
    for i, char in enumerate(a):
        places[char] |= 1 << i
    # Bit-parallel LCS (Hyyrö 2004): bit i of row is 0 where a[:i + 1] has one more character in
    # common with what was read of b than a[:i] has. The carry of + moves each 0 to the first match.
    row = full
    for char in b:
        match = row & places[char]
        row = ((row + match) | (row - match)) & full
    return float(round(100 * 2 * (len(a) - row.bit_count()) / (len(a) + len(b))))


def words_13a(text):
    """Words as sacrebleu's 13a tokenizer cuts them, in lower case."""
    text = text.lower().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, char in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, char)
    text = re.sub(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])", r" \1 ", f" {text} ")
    text = re.sub(r"([^0-9])([\.,])", r"\1 \2 ", text)
    text = re.sub(r"([\.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()


def sari(prediction, gold, prompt):
    """SARI for n = 1 .. 4 with the whole prompt as source; gold: one reference, or a list."""
    def f1(precision, recall):
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0

    golds = [gold] if isinstance(gold, str) else gold
    source, guess, *refs = map(words_13a, (prompt, prediction, *golds))
    total = 0.0
    for n in range(1, 5):
        # How often each n-gram occurs in the prompt, in the answer, and in all references together.
        # The first two count once for each reference.
        old, out, *of_refs = (
            collections.Counter(zip(*(words[i:] for i in range(n))))
            for words in (source, guess, *refs))
        wanted = sum(of_refs, collections.Counter())
        old, out = (collections.Counter({gram: count * len(refs) for gram, count in grams.items()})
                    for grams in (old, out))
        # What the answer keeps, and what it should keep.
        kept, should_keep = old & out, old & wanted
        good = kept & should_keep
        keep_p = sum(good[g] / kept[g] for g in kept) / len(kept) if kept else 1.0
        keep_r = sum(good.values()) / sum(should_keep.values()) if should_keep else 1.0
        # What it drops. (SARI counts the precision alone.)
        dropped = old - out
        right = dropped - wanted
        drop_p = sum(right[g] / dropped[g] for g in dropped) / len(dropped) if dropped else 1.0
        # What it adds: here only whether an n-gram occurs counts.
        added, should_add = set(out) - set(old), set(wanted) - set(old)
        good = added & should_add
        add_p, add_r = (len(good) / len(side) if side else 1.0 for side in (added, should_add))
        total += (f1(keep_p, keep_r) + drop_p + f1(add_p, add_r)) / 12
    return 100.0 * total


SCORES = {f.__name__: f for f in (accuracy, first_letter, rouge_l, edit_similarity, sari)}
METRICS = {"C-STANCE": "accuracy", "FOMC": "accuracy", "MeetingBank": "rouge_l",
           "Py150": "edit_similarity", "ScienceQA": "first_letter", "NumGLUE-cm": "accuracy",
           "NumGLUE-ds": "accuracy", "20Minuten": "sari"}
TASKS = tuple(METRICS)  # in TRACE's order


def score(task, predictions, golds, prompts, metric=None):
    """The mean score of a task's predictions by TRACE's metric, or the named one: 0 .. 100."""
    rows = zip(predictions, golds, prompts, strict=True)
    return mean([SCORES[metric or METRICS[task]](*row) for row in rows])


# ------------------------------------------------------------------------------ over tasks

# R[t][i] is the score of task i after task t was learned; None where it was not tested.


def backward_transfer(R):
    """Mean over all tasks but the last of R[last][i] - R[i][i], signed."""
    return mean([R[-1][i] - R[i][i] for i in range(len(R) - 1)])


def mean(values):
    """None if one of them is."""
    return None if None in values else sum(values) / max(1, len(values))


def summarize(R, zero_shot=None):
    """What papers report of a matrix R; None for what needs a score that was not tested, and, of a
    single task, for all but op.

    zero_shot: the scores of the bare base. Forward transfer (FWT) is the mean of R[i - 1][i] -
    zero_shot[i]: what task i has gained before it is learned. Where that is not tested, each task
    starts as the bare base, and has gained nothing.
    """
    last, T = R[-1], len(R[-1])
    # With one task, nothing can be lost, and R alone does not tell whether it was learned.
    own = [R[i][i] for i in range(T)] if len(R) == T > 1 else [None]
    summary = dict.fromkeys(("bwt", "bwt_treelora", "forgetting", "fwt"))
    summary |= {"op": mean(last), "learned": mean(own)}
    if None in own:  # nothing was learned, or all at once, or one task only
        return summary
    summary["bwt"] = backward_transfer(R)
    # As TreeLoRA and MoRAM print it: what was lost, never below 0, over all T tasks.
    summary["bwt_treelora"] = mean([max(0.0, was - now) for was, now in zip(own, last)])
    every = [[R[t][i] for t in range(i, T)] for i in range(T - 1)]
    if not any(None in column for column in every):
        # Also never below 0, since the last score counts among those of which the best is taken.
        summary["forgetting"] = mean([max(column) - column[-1] for column in every])
    if zero_shot:
        before = [R[i - 1][i] for i in range(1, T)]
        gains = [0.0 if b is None else b - z for b, z in zip(before, zero_shot[1:])]
        summary["fwt"] = mean(gains)
    return summary


def bootstrap(rows, draws=1000):
    """The standard error of OP, from the scores of each task's test examples."""
    rng = random.Random(0)
    return statistics.stdev(
        mean([mean(rng.choices(row, k=len(row))) for row in rows]) for _ in range(draws))


def floor(metric, train, test):
    """Scores without a model: of a constant and some copies, what is best on a sample of train.

    train, test: lists of {"prompt", "answer"}.
    """
    common = collections.Counter(row["answer"] for row in train).most_common(1)[0][0]
    # Where the first letter alone counts, whole answers may all be different.
    letter = collections.Counter(row["answer"][:1] for row in train).most_common(1)[0][0]
    rules = [
        lambda prompt: common,
        lambda prompt: letter,
        lambda prompt: prompt.rstrip().split("\n")[-1],
        lambda prompt: " ".join(re.split(r"(?<=[.!?])\s+", prompt)[:3]),
        lambda prompt: prompt,
    ]

    def scores(rule, rows):
        return [SCORES[metric](rule(row["prompt"]), row["answer"], row["prompt"]) for row in rows]

    some = random.Random(0).sample(train, min(100, len(train)))
    return scores(max(rules, key=lambda rule: mean(scores(rule, some))), test)
