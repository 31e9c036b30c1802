"""The README and its pages keep their promises: their Python runs, their shell commands and links exist."""

import itertools
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "pixnerd_kernels/ops/README.md"]


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    section: str
    line: int  # of the first line inside the fence
    text: str


def blocks(page, text):
    """The fenced blocks, each with the second-level heading that it stands under."""
    found, section, inside, start = [], "top", None, 0
    lines = text.splitlines()
    for number, line in enumerate(lines):
        fence = re.match(r"\s*```(.*)$", line)
        if inside is not None:
            if fence:
                found.append(Block(page, inside, section, start + 1, "\n".join(lines[start:number]) + "\n"))
                inside = None
        elif fence:
            inside, start = fence[1].strip(), number + 1
        elif line.startswith("## "):
            section = line[3:].strip()
    return found


BLOCKS = [block for page in PAGES for block in blocks(page, (CHECKOUT / page).read_text())]
PYTHON = {}
for block in BLOCKS:
    if block.language == "python":
        PYTHON.setdefault(f"{block.page}: {block.section}", []).append(block)


def commands():
    """(page:line, words) of every shell command: continued lines joined, prompts, comments and variables dropped."""
    found = []
    for block in BLOCKS:
        if block.language not in ("bash", "sh", "console"):
            continue
        text = re.sub(r"\\\n\s*", " ", block.text)
        for offset, line in enumerate(text.splitlines()):
            lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="&|;")
            lexer.whitespace_split = True
            words = []
            for word in [*lexer, ";"]:
                if set(word) <= set("&|;"):
                    while words and re.fullmatch(r"\w+=.*", words[0]):
                        words.pop(0)
                    if words:
                        found.append((f"{block.page}:{block.line + offset}", words))
                    words = []
                else:
                    words.append(word)
    return found


def test_the_readme_shows_python_and_commands():
    assert any(block.page == "README.md" for block in itertools.chain(*PYTHON.values()))
    assert any(place.startswith("README.md:") for place, _ in commands())
    assert {block.language for block in BLOCKS} <= {
        "python",
        "bash",
        "sh",
        "console",
        "text",
        "cpp",
        "mermaid",
        "",
    }


@pytest.mark.parametrize("section", PYTHON)
def test_python_runs(section, tmp_path, monkeypatch):
    """In order; the blocks of one section share their names."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for block in PYTHON[section]:
        code = compile("\n" * (block.line - 1) + block.text, block.page, "exec")
        exec(code, names)


def make_targets():
    return set(re.findall(r"^([a-z][\w-]*):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))


def check_make(words):
    named = [word for word in words if "=" not in word and not word.startswith("-")]
    assert set(named) <= make_targets(), f"no such make target: {named}"


def check_pixnerd(words):
    """The words parse: the sub-command and every option exist."""
    from pixnerd_kernels.cli import _parser

    try:
        _parser().parse_args(words)
    except SystemExit as stop:
        if stop.code:
            raise AssertionError(f"pixnerd does not take {words}") from stop


def check_benchmarks(words):
    from benchmarks.__main__ import COMMANDS

    assert words[0] in COMMANDS, f"no such benchmark command: {words}"


def check_pip(words):
    extras = re.findall(r"^(\w+) = \[", (CHECKOUT / "pyproject.toml").read_text(), re.MULTILINE)
    for word in words:
        for names in re.findall(r"(?:^\.|pixnerd-kernels)\[([\w,]+)\]", word):
            assert set(names.split(",")) <= set(extras), f"no such extra: {word}"
    for option, path in itertools.pairwise(words):
        if option in ("-c", "-r"):
            assert (CHECKOUT / path).exists(), f"no such file: {path}"


def check_python(words):
    if words[:1] == ["-m"]:
        module, *rest = words[1:]
        checks = {"pip": check_pip, "benchmarks": check_benchmarks, "pixnerd_kernels.cli": check_pixnerd}
        assert module in {*checks, "pytest", "venv"}, f"no such module: {module}"
        checks.get(module, lambda _: None)(rest)
    elif words and not words[0].startswith("-"):
        assert (CHECKOUT / words[0]).exists(), f"no such file: {words[0]}"


#: What a command of the pages may start with, and how the rest is checked.
CHECKS = {
    "make": check_make,
    "pixnerd": check_pixnerd,
    "pip": check_pip,
    "python": check_python,
    "python3": check_python,
    **dict.fromkeys(
        ["git", "cd", "source", ".", "sudo", "apt", "apt-get", "export", "ls", "pre-commit"], None
    ),
}


@pytest.mark.parametrize(
    ("place", "words"), [pytest.param(at, words, id=f"{at}: {shlex.join(words)}") for at, words in commands()]
)
def test_commands_exist(place, words):
    name = words[0].removeprefix(".venv/bin/")
    assert name in CHECKS, f"{place}: unknown command {shlex.join(words)}"
    if CHECKS[name]:
        CHECKS[name](words[1:])


def anchors(text):
    """The names that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", (CHECKOUT / page).read_text())
    assert links or page == "CONTRIBUTING.md"
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (CHECKOUT / page).parent / path if path else CHECKOUT / page
        assert target.exists(), f"{page}: no such file: {link}"
        assert not anchor or anchor in anchors(target.read_text()), f"{page}: no such heading: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_results_are_named_as_they_are(page):
    """Folders of results that the text names in code, commands' --out included."""
    for folder in re.findall(r"(?:benchmarks/)?results/[\w\-./]*\w", (CHECKOUT / page).read_text()):
        path = CHECKOUT / "benchmarks" / folder.removeprefix("benchmarks/")
        assert path.exists(), f"{page}: no such results: {folder}"


SAMPLE = """# Title
```bash
$ git clone somewhere && cd here   # a comment
FOO=1 make test \\
    VENV=.x
```
## One
```python
a = 1
```
### Below one
```python
b = a
```
"""


def test_parsing(monkeypatch):
    found = blocks("page", SAMPLE)
    assert [(block.language, block.section, block.line) for block in found] == [
        ("bash", "top", 3),
        ("python", "One", 9),
        ("python", "One", 13),
    ]
    monkeypatch.setitem(globals(), "BLOCKS", found)
    assert [words for _, words in commands()] == [
        ["git", "clone", "somewhere"],
        ["cd", "here"],
        ["make", "test", "VENV=.x"],
    ]
    with pytest.raises(AssertionError, match="no such make target"):
        check_make(["nothing"])
    with pytest.raises(AssertionError, match="does not take"):
        check_pixnerd(["fit", "--no-such-option"])
