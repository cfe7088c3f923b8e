"""The page of a run, in a real browser: right numbers, safe text, keyboard, narrow and dark."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
from mose import MoSE, MoSEConfig
from figures import page as subject
from tracebench.data import encode
from tracebench.model import load_model
from tracebench.options import Args
from tracebench.scores import TASKS as TRACE

TASKS = ["FOMC", "<b>bold</b>", "עברית 😀"]
METRIC = f"{TASKS[1]}=rouge_l,{TASKS[2]}=accuracy"
NASTY = "</script><script>hacked = 1</script><img src=x onerror='hacked = 1'>\0\u202e &amp; 😀 שלום"
PROMPT = f"{NASTY}\nSee https://example.org/\nAnswer:"
COLOURS = ["#ffffff", "#e69f00", "#56b4e9"]  # of the first three tasks
# Colours of all text against what is behind it, and of the focus: the lowest contrast on the page.
CONTRAST = """() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const light = c => parse(c).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  while (walk.nextNode()) {
    let node = walk.currentNode.parentElement;
    const hidden = !node.checkVisibility() || node.closest("select");
    if (!walk.currentNode.data.trim() || hidden) continue;
    const ink = light(getComputedStyle(node).color), where = node.outerHTML.slice(0, 90);
    const bars = [];
    while (node && parse(getComputedStyle(node).backgroundColor)[3] === 0) {
      bars.push(...getComputedStyle(node).backgroundImage.match(/rgb\\([^)]*\\)/g) || []);
      node = node.parentElement;
    }
    if (node) bars.push(...getComputedStyle(node).backgroundImage.match(/rgb\\([^)]*\\)/g) || []);
    bars.push(node ? getComputedStyle(node).backgroundColor : "rgb(255, 255, 255)");
    found.push(...bars.map(back => [ratio(ink, light(back)), where]));
  }
  return found.sort((a, b) => a[0] - b[0])[0];
}"""


def result(method, args, R, samples, **more):
    """A result file as train_trace.py writes it, in short."""
    return {"method": method, "args": dataclasses.asdict(args), "tasks": TASKS, "R": R,
            "examples": {task: [40, 10] for task in TASKS}, "samples": samples, "zero_shot": None,
            "asked": {task: [{"prompt": PROMPT, "answer": "A"},
                             {"prompt": f"Second of {task}", "answer": NASTY}] for task in TASKS},
            "bytes": [], **more}


def learn(model, tokenizer, tasks, file, targets=("q_proj", "v_proj")):
    """MoSEs of tasks that were opened and ended, without training: masks and routers as drawn."""
    mose = MoSE(model, MoSEConfig(targets))
    mose.capacity = lambda: dict.fromkeys(tasks)  # nobody reads it, and it takes long
    for i, task in enumerate(tasks):
        mose.begin_task(task)
        for n in range(8):
            ids, _ = encode(tokenizer, {"prompt": f"Solve {i * 8 + n}" * (i + 1), "answer": ""})
            mose.observe(torch.tensor([ids]))
        mose.end_task()
    mose.save(file)
    return mose


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder of a run with a page, its results, the owner of each entry of layer 0's first A)."""
    folder = tmp_path_factory.mktemp("page")
    args = Args(device="cpu", metric=METRIC)
    torch.manual_seed(0)
    mose = learn(*load_model(args), TASKS, folder / "mose.pt")
    N = None
    right = [{task: ["A", NASTY] for task in TASKS[:t + 1]} for t in range(3)]
    wrong = [{}, {TASKS[0]: ["B", "no"], TASKS[1]: ["A", "</script>"]}, {TASKS[0]: ["", "\0"]}]
    results = {r["method"]: r for r in (
        result("lora", args, [[91.26, 5.5, N], [40.0, 80.0, 3.04], [0.0, 33.3, 77.7]], wrong,
               bytes=[1000, 1001, 1002]),
        result("replay", args, [[90.0, N, N], [N, 81.0, N], [60.0, 70.0, 80.0]], wrong,
               bytes=[1000, 1000, 1000]),
        result("mose", args, [[99.0, N, N], [99.0, 100.0, N], [99.0, 100.0, 98.7]], right,
               bytes=[900, 1800, 2700], source=[N, N, TASKS[0]]),
        result("joint", args, [[95.1, 96.2, 97.3]], right[-1:], bytes=[1234]),
        result("base", args, [[1.1, 2.2, 3.3]], wrong[-1:]))}
    for method, r in results.items():
        (folder / f"{method}.json").write_text(json.dumps(r))
    subject.write_page(folder)
    # No task was forgotten, so the numbers of the tasks are 1, 2, 3.
    owner = mose.layers[0].owner[:128 * 64].view(128, 64).long()
    return folder, results, owner


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("no `chromium`: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """visit(file, ..): its page, drawn. At the end, no error and no request to elsewhere."""
    trouble, pages = [], []

    def visit(file, width=1280, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        pages.append(page)
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda request: request.url.startswith("file://")
                or trouble.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector("#counts table, #pool > .quiet")
        return page

    yield visit
    for page in pages:
        page.close()
    assert not trouble


def cells(page, table):
    """A table's cells as texts, row by row: what stands first in each."""
    return page.evaluate("""id => [...document.querySelectorAll(`#${id} tbody tr`)].map(
        row => [...row.cells].slice(1).map(cell => cell.firstChild?.textContent ?? ""))""", table)


def go_to(page, t, last=2):
    """Move the slider to task t, from wherever it is, by keyboard."""
    page.focus("#time")
    page.keyboard.press("End")
    for _ in range(last - t):
        page.keyboard.press("ArrowLeft")


def check_numbers(page, results):
    """The page's numbers are those of the result files, wherever the slider is."""
    def check(table, rows, t, by):
        for k, (shown, row) in enumerate(zip(cells(page, table), rows, strict=True)):
            for text, value in zip(shown, row, strict=True):
                assert bool(text) == (k <= t and value is not None)
                assert not text or abs(float(re.sub("[(),]", "", text)) - value) <= by

    for t in range(3):
        go_to(page, t)
        for other in ("replay", "joint", "base"):
            page.select_option("#other", other)
            for method in ("lora", "mose", other):
                R = results[method]["R"]
                check(f"scores-{method}", [[None] * 3] * (3 - len(R)) + R, t, 0.0501)
        columns = [[None] * (3 - len(r["bytes"])) + r["bytes"] for r in results.values()
                   if r["bytes"]]
        check("bytes-table", zip(*columns), t, 0)


def test_a_fixed_matrix_a_is_not_drawn(run, visit):
    page = visit(run[0] / "page.html")
    assert page.locator("#pictures figure").count() == 2  # control: A is learned here
    assert "Entries of A and B that" in page.text_content("#counts caption")
    page.evaluate("data.pool.layers.forEach(layer => layer.A.columns = 0); drawPool()")
    assert page.locator("#pictures figure").count() == 1
    assert "Entries of B that" in page.text_content("#counts caption")


def test_numbers_equal_the_result_files(run, visit):
    check_numbers(visit(run[0] / "page.html"), run[1])


@pytest.mark.parametrize("old, new", [("91.26", "91.56"), ("2700", "2701"), ("97.3", "null")])
def test_another_number_would_be_noticed(run, visit, tmp_path, old, new):
    text = (run[0] / "page.html").read_text(encoding="utf-8")
    assert text.count(old) == 1
    (tmp_path / "page.html").write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(AssertionError):
        check_numbers(visit(tmp_path / "page.html"), run[1])


def test_slider_shows_who_owned_each_entry_then(run, visit):
    page = visit(run[0] / "page.html")
    for t in range(3):
        go_to(page, t)
        assert page.get_attribute("#time", "aria-valuetext") == f"{t + 1} of 3: {TASKS[t]}"
        assert page.locator("#scores-mose tr[aria-current]").count() == 1
        colours = page.evaluate("""() => {
            const canvas = document.querySelector("canvas"), pen = canvas.getContext("2d");
            const side = canvas.width / 128, half = Math.floor(side / 2), rows = [];
            const {data} = pen.getImageData(0, 0, canvas.width, canvas.height);
            for (let k = 0; k < 64 * 128; k++) {
              const [x, y] = [k % 128 * side + half, Math.floor(k / 128) * side + half];
              const [r, g, b, a] = data.subarray(4 * (y * canvas.width + x));
              rows.push(a ? "#" + [r, g, b].map(v => v.toString(16).padStart(2, 0)).join("") : "");
            }
            return rows; }""")
        owner = torch.tensor([1 + COLOURS.index(c) if c else 0 for c in colours]).view(64, 128)
        assert torch.equal(owner, torch.where(run[2] <= t + 1, run[2], 0).T)


def test_counts_are_those_of_the_adapter(run, visit):
    model, _ = load_model(Args(device="cpu"))
    mose = MoSE.load(model, run[0] / "mose.pt")
    page = visit(run[0] / "page.html")
    page.focus("#layer")
    page.keyboard.press("End")  # v_proj of the last layer
    for number, shown in enumerate(cells(page, "counts-table")[:3], 1):
        A, B = (mose.layers[7].owner == number).view(2, -1)
        each = A.view(128, 4, 16).sum((0, 2)) + B.view(4, -1).sum(1)
        assert shown == [f"{n:,}" for n in [*each.tolist(), int(each.sum())]]
    assert "layer 3, v_proj" in page.text_content("#counts caption")
    before = page.evaluate("document.querySelector('canvas').toDataURL()")
    page.select_option("#only", "2")
    assert page.evaluate("document.querySelector('canvas').toDataURL()") != before


def test_text_of_the_run_stays_text(run, visit):
    page, signs = visit(run[0] / "page.html"), str.maketrans({"\0": "␀"})
    assert page.text_content("#prompt") == PROMPT.translate(signs)
    right, wrong = "✓ right", "✗ wrong"
    assert cells(page, "answers-table")[2] == [wrong, wrong, right, right, wrong]
    page.focus("#card")
    page.keyboard.press("End")  # the second prompt of the last task
    assert page.text_content("#right") == NASTY.translate(signs)
    page.select_option("#card", "1")  # its metric gives points in between
    assert "<b>bold</b>" in page.text_content("#answers tbody tr:nth-child(2) th")
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.locator("img, main script, main b b").count() == 0
    text = (run[0] / "page.html").read_text(encoding="utf-8")
    assert text.count("</script>") == 2 and "\0" not in text
    rest = re.sub('<script type="application/json".*?</script>', "", text, flags=re.S)
    assert not re.search(r"[a-z]+://|[\"'(]//|src=|href=|url\(|import\b|fetch\b", rest)


def test_tokens_and_what_the_key_finds(run, visit):
    model, tokenizer = load_model(Args(device="cpu"))
    mose = MoSE.load(model, run[0] / "mose.pt")
    ids = torch.tensor([encode(tokenizer, {"prompt": PROMPT, "answer": ""})[0]])
    (found,), (sure,) = mose.infer_task(ids, return_confidence=True)
    page = visit(run[0] / "page.html")
    assert f"finds {found}, confidence {sure:.2f}" in page.text_content("#key")
    x = []
    handle = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(
        lambda _, args: x.append(args[0]))
    with torch.no_grad(), mose.task(TASKS[0]):
        model(ids)
    handle.remove()
    layer = mose.layers[2]
    gates = torch.softmax(x[0][0] @ layer.projection @ layer.routers[1].T, -1)[-96:]
    said = page.evaluate("[...document.querySelectorAll('#gates-table tbody tr')].map("
                         "row => row.cells[3].querySelector('.spoken').textContent)")
    for text, row in zip(said, gates, strict=True):
        shown = {int(e): int(percent) for e, percent in re.findall(r"expert (\d) (\d+) %", text)}
        for e in row.topk(2).indices.tolist():
            assert abs(shown.get(e, 0) - 100 * row[e]) < 0.6  # a gate below 0.5 % is not named


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_narrow_wide_light_dark(run, visit, width, scheme):
    page = visit(run[0] / "page.html", width, scheme)
    for t in (0, 2):
        go_to(page, t)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        contrast, where = page.evaluate(CONTRAST)
        assert contrast >= 4.5, where
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(255, 255, 255)") == (scheme == "light")


def test_everything_has_a_name_and_is_reached_by_tab(run, visit):
    page = visit(run[0] / "page.html")
    assert page.evaluate("""[...document.querySelectorAll("input, select")].every(
        node => node.labels.length && node.labels[0].textContent)""")
    assert page.evaluate("""[...document.querySelectorAll("canvas")].every(
        node => node.ariaLabel && $(node.getAttribute("aria-describedby")))""")
    assert page.evaluate("""[...document.querySelectorAll("table")].every(
        node => node.caption.textContent
                && [...node.querySelectorAll("th")].every(h => h.scope))""")
    page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
        assert page.evaluate("""document.activeElement === document.body
                             || getComputedStyle(document.activeElement).outlineWidth !== '0px'""")
    assert {"time", "other", "card", "layer", "only", "routed"} <= reached


def test_what_a_run_lacks_is_left_out_with_a_reason(visit, tmp_path):
    args = Args(device="cpu", metric=METRIC)
    old = result("base", args, [[1.0, 2.0, 3.0]], [])
    (tmp_path / "base.json").write_text(json.dumps({**old, "asked": {}}))
    page = visit(subject.write_page(tmp_path))
    for section, why in {"cards": "recorded no answers", "pool": "no MoSEs", "tokens": "no MoSEs",
                         "bytes": "no method"}.items():
        assert why in page.text_content(f"#{section}")
    assert cells(page, "scores-base")[2] == ["1.0", "2.0", "3.0"]
    assert "lora, replay, mose" in page.text_content("#left-out")


def test_a_lost_adapter_is_said(run, tmp_path):
    shutil.copy(run[0] / "mose.json", tmp_path)
    assert "can't be opened" in subject.write_page(tmp_path).read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="no result files"):
        subject.write_page(tmp_path / "nowhere")


@pytest.mark.parametrize("hidden, inner, layers, kv, targets", [
    (576, 64, 30, 3, "q_proj,v_proj"), (64, 16384, 2, 1, "up_proj,down_proj")])
def test_small_for_a_big_base_and_long_texts(visit, tmp_path, hidden, inner, layers, kv, targets):
    """Shapes of SmolLM2-135M, and a layer so wide that even one picture is too big; 9 methods."""
    config = transformers.LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=kv, intermediate_size=inner, vocab_size=2048,
        bos_token_id=1, eos_token_id=2, pad_token_id=0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    for file in (ROOT / "assets/tiny-llm").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "base")
    tasks = [*TRACE]
    args = Args(model=str(tmp_path / "base"), device="cpu", targets=targets, max_prompt=200)
    learn(*load_model(args), tasks, tmp_path / "mose.pt", tuple(targets.split(",")))
    texts = [f"{i} 她说：「未知」。 <EOL> " * 100 for i in range(8)]
    for method in subject.METHODS:
        R = [[12.345678901234567 * (i + 1) / (t + 1) for i in range(8)] for t in range(8)]
        (tmp_path / f"{method}.json").write_text(json.dumps({
            **result(method, args, R, [{task: [text, text] for task in tasks} for text in texts]),
            "tasks": tasks,
            "asked": dict.fromkeys(tasks, [{"prompt": texts[0], "answer": texts[1]}] * 2),
            "examples": {task: [5000, 500] for task in tasks}, "bytes": [10**6] * 8}))
    file = subject.write_page(tmp_path)
    assert file.stat().st_size < 500_000
    page = visit(file, 390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    said = page.text_content("#left-out")
    many = layers * len(targets.split(","))
    assert f"of {many} layers all but" in said and ("pictures" in said) == (layers == 2)
