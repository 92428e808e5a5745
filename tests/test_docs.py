"""What the documentation shows is true: code runs, commands parse, links, flags and paths lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lesam_dist
from lesam_dist import cli
from lesam_dist.config.command_line import read_command_line
from lesam_dist.config.explain import unknown_key
from lesam_dist.doctor.command import parser as doctor_parser
from lesam_dist.errors import UserError
from lesam_dist.experiments.compare import compare
from lesam_dist.experiments.domains import domains
from lesam_dist.experiments.sweep import sweep
from lesam_dist.guide import completion as guide_completion
from lesam_dist.guide import methods as guide_methods
from lesam_dist.guide import recipes as guide_recipes
from lesam_dist.planning.command import plan

ROOT = Path(__file__).parents[1]
FOLDERS = ("lesam_dist", "kernels", "tests", "benchmarks", "launch", "docs", "examples")
PAGES = sorted(
    path
    for folder in ("", "docs", "examples", "launch", "kernels", "benchmarks", "lesam_dist/recipes", "tests")
    for path in (ROOT / folder).glob("*.md")
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SNIPPETS = [page for page in PAGES if "```python" in page.read_text() and page.parent.name != "kernels"]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command line: indented lines and ```sh blocks, without comments, variables and a last `...`."""
    text = "\n".join([prose(page), *("    " + line for block in blocks(page, "sh") for line in block.split("\n"))])
    for line in re.findall(r"^    (\S.*)$", text.replace("\\\n", " "), re.M):
        words = shlex.split(line.split("  #")[0], posix=True) if re.match(r"[\w./=-]+( |$)", line) else []
        words = words[: words.index(">")] if ">" in words else words
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        if words and words[0] in COMMANDS:
            yield [word for word in words if word != "..."]


# --- Code


@pytest.mark.parametrize("page", SNIPPETS, ids=name)
def test_python_runs(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A page's blocks in order, as a reader types them; each that prints a radius or a loss prints a positive one."""
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        exec(compile(block, name(page), "exec"), names)
        printed = re.findall(r"tensor\(([\d.e-]+)", capsys.readouterr().out)
        assert len(printed) >= block.count("print("), block
        assert all(float(number) > 0 for number in printed), "a radius of 0 would show nothing"


def test_the_diff_turns_sgd_into_lesam(seed: int) -> None:
    """Both sides of the README's diff run; without a budget the new one makes the steps of the old one."""
    (diff,) = blocks(ROOT / "README.md", "diff")
    lines = diff.splitlines()
    before, after = ("\n".join(line[1:] for line in lines if line[:1] in sides) for sides in ("- ", "+ "))
    start = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 3))
    loader = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(3)]

    def weights(code: str) -> dict[str, torch.Tensor]:
        model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 3))
        model.load_state_dict(start.state_dict())
        names = {"torch": torch, "model": model, "loader": loader, "criterion": nn.CrossEntropyLoss(), "epochs": 2}
        torch.manual_seed(seed)
        exec(compile(code, "README.md", "exec"), names)
        assert names["loss"].item() > 0
        return model.state_dict()

    old, new, without = weights(before), weights(after), weights(after.replace("sigma=0.3", "sigma=0.0"))
    torch.testing.assert_close(without, old)
    assert not torch.allclose(new["0.weight"], old["0.weight"])


def test_kernels_readme() -> None:
    """Its block is one LE-SAM step with SGD, here on L(w) = c w.w / 2, whose gradient is c w."""
    (block,) = blocks(ROOT / "kernels" / "README.md", "python")
    shapes, curvature = [(5, 7), (3,)], 2.0
    params = [nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in shapes]
    before = [p.detach().double() for p in params]
    grads = [curvature * p.detach() for p in params]
    names: dict[str, Any] = {"torch": torch, "device": DEVICE, "params": params, "groups": [0, 0], "grads": grads}
    names |= {"copies": [torch.empty_like(p) for p in params], "buffers": [torch.zeros_like(p) for p in params]}
    names |= {"sigma": 0.3, "rho_max": 0.2, "eps": 1e-12, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}

    def second_pass() -> None:
        for g, p in zip(grads, params, strict=True):
            g.copy_(curvature * p.detach())

    assert block.count("...  # second") == 1
    exec(block.replace("...  # second", "second_pass()  # second"), names | {"second_pass": second_pass})
    norm = curvature * float(torch.stack([w.square().sum() for w in before]).sum().sqrt())
    rho = min(0.3 / norm, 0.2)
    for p, w in zip(params, before, strict=True):
        g_hat = curvature * (w + rho * curvature * w / norm)
        torch.testing.assert_close(p.detach(), (w - 0.1 * (g_hat + 0.01 * w)).float())


# --- Commands


LOOKING = {
    "recipes": guide_recipes.parser(),
    "methods": guide_methods.parser(),
    "completion": guide_completion.parser(),
    "doctor": doctor_parser(),
}


class StartedError(Exception):
    """In place of the first run of an experiment."""


def check_trainer(command: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if command == "train":
        helps = any(word.startswith("--help") for word in arguments)
        with pytest.raises(SystemExit) as end:
            read_command_line([*arguments, *([] if helps else ["--print_config"])])
        assert end.value.code == 0
        return

    if command in LOOKING:
        LOOKING[command].parse_args(arguments)
        if command != "doctor":  # that looks at this machine, and takes seconds
            cli._COMMANDS[command][0](arguments)
        return

    if command in (
        "analyze",
        "scan",
        "index",
        "pack",
        "report",
        "export",
        "checkpoints",
    ):  # what they name is not there
        absent = r"does not exist|has no checkpoints|is no checkpoint|has no index|has no metrics.jsonl"
        with pytest.raises(UserError, match=absent) as missing:
            cli._COMMANDS[command][0](arguments)
        assert "--help" not in str(missing.value), "its arguments are wrong"
        return

    def start(*_: object) -> None:
        raise StartedError

    run = {"compare": compare, "sweep": sweep, "domains": domains, "plan": plan}[command]
    first = "planning.command.predict_and_report" if command == "plan" else f"experiments.{command}.run_all"
    monkeypatch.setattr(f"lesam_dist.{first}", start)
    monkeypatch.setattr("lesam_dist.experiments.domains._folders", lambda _: ["photo", "LabelMe", "SUN09"])
    with pytest.raises(StartedError):
        run(arguments)


def check_module(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer's modules with their arguments; that other modules and scripts exist."""
    if words[0].endswith(".py"):
        assert (ROOT / words[0]).is_file()
    elif words[0] == "lesam_dist":
        check_trainer(words[1], words[2:], monkeypatch)
    elif words[0] == "lesam_dist.train":
        check_trainer("train", words[1:], monkeypatch)
    else:
        assert importlib.util.find_spec(words[0])


def check_torchrun(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.run import get_args_parser

    read = get_args_parser().parse_args(words)
    check_module([read.training_script, *read.training_script_args], monkeypatch)


def check_accelerate(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    read = launch_command_parser().parse_args(words[1:])
    assert (ROOT / read.config_file).is_file()
    if read.training_script != "FILE":
        check_module([read.training_script, *read.training_script_args], monkeypatch)


def check_srun(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    start = words.index("lesam-dist")
    check_trainer(words[start + 1], words[start + 2 :], monkeypatch)


def check_make(words: list[str], _: pytest.MonkeyPatch) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    variables = re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(), re.M)
    for word in words:
        assert word.split("=")[0] in variables if "=" in word else word in targets


def check_pip(words: list[str], _: pytest.MonkeyPatch) -> None:
    assert words[0] == "install"
    project = (ROOT / "pyproject.toml").read_text()
    section = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\[", project, re.DOTALL)
    assert section
    extras = re.findall(r"^([\w-]+) = ", section[1], re.M)
    for word in words[1:]:
        found = re.fullmatch(r"(?:lesam-dist|\.)(?:\[([\w,-]+)\])?", word)
        assert found or word in ("-e", "pytorch_optimizer")
        assert not found or not found[1] or set(found[1].split(",")) <= set(extras), f"no such extra: {word}"


COMMANDS = {
    "lesam-dist": lambda words, patch: check_trainer(words[0], words[1:], patch),
    "launch/torchrun.sh": lambda words, patch: check_trainer("train", words, patch),
    "python": lambda words, patch: check_module(words[1:] if words[0] == "-m" else words, patch),
    "torchrun": check_torchrun,
    "accelerate": check_accelerate,
    "srun": check_srun,
    "make": check_make,
    "pip": check_pip,
}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_parse(
    page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inline = [shlex.split(text) for text in re.findall(r"`((?:make|pip|python|torchrun) [^`]+)`", prose(page))]
    inline += [shlex.split(text) for text in re.findall(r"`(accelerate launch --[^`]+py)`", prose(page))]
    for words in [*commands(page), *inline]:
        words = [str(tmp_path / word) if word.startswith("runs/") else word for word in words]
        COMMANDS[words[0]](words[1:], monkeypatch)


def test_commands_are_found() -> None:
    """The parser above sees what a reader sees: some of the lines that the pages are known to have."""
    found = [command for page in PAGES for command in commands(page)]
    assert {words[0] for words in found} == COMMANDS.keys()
    assert ["lesam-dist", "train", "--config", "digits", "--epochs", "5", "--optimizer.sigma", "0.2"] in found
    assert len(found) >= 12


# --- References


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name(page)} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{name(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_flags_and_paths_exist(page: Path) -> None:
    spans = re.findall(r"`([^`\n]+)`", prose(page))
    for flag in (word for span in spans for word in re.findall(r"(?<!\S)--([a-z_]+(?:\.[a-z_\d]+)+)", span)):
        assert unknown_key([flag]) is None, f"{name(page)}: --{flag}"
    names_of_files = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")}
    for span in spans:
        if re.fullmatch(rf"(?:{'|'.join(FOLDERS)})/[\w./-]+", span):
            assert (ROOT / span).exists(), f"{name(page)}: {span}"
        elif re.fullmatch(r"[\w-]+\.(?:py|sh)", span):
            assert span in names_of_files, f"{name(page)}: {span}"
        elif found := re.fullmatch(r"(lesam_dist(?:\.[a-z_]+)*)((?:\.[A-Za-z_]+)?)(?:\(.*\))?", span):
            assert resolves(found[1], found[2][1:]), f"{name(page)}: {span}"


def resolves(module: str, attribute: str) -> bool:
    """Whether a dotted name is a module, or a name in one."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError:
        parent, _, last = module.rpartition(".")
        return not attribute and hasattr(importlib.import_module(parent), last)
    return not attribute or hasattr(found, attribute)


def test_every_environment_variable_is_listed() -> None:
    """Names in capitals that the package's code holds as texts, or that the launching script expands."""
    code = "".join(path.read_text() for folder in ("lesam_dist", "kernels") for path in (ROOT / folder).rglob("*.py"))
    script = (ROOT / "launch" / "torchrun.sh").read_text()
    prefixes = "ACCELERATE|FSDP|LOCAL|MASTER|MPI|OMPI|PARALLELISM|PMI|RANK|SLURM|TORCHELASTIC|WORLD"
    read = set(re.findall(rf'"((?:{prefixes})[A-Z_]*)"', code)) | set(re.findall(r"\$\{([A-Z_]+)", script))
    read |= set(re.findall(r'environ(?:\.get\(|\[)"([A-Z_]+)"', code))
    listed = set(re.findall(r"`([A-Z][A-Z_]+)`", (ROOT / "docs" / "environment.md").read_text()))
    assert len(read) > 35
    assert read <= listed


# --- Shape


def test_pages_are_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 900
    assert all(len(page.read_text().splitlines()) < 400 for page in PAGES)


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} == set(
        re.findall(r"^\| \[(\w+\.md)\]\(\1\)", index, re.M)
    )


def test_the_tables_of_methods() -> None:
    """They are what the classes say of themselves, and every method that a user can import is there."""
    script = runpy.run_path(str(ROOT / "docs" / "render_methods.py"))
    page = (ROOT / "docs" / "methods.md").read_text()
    assert page == script["render"](page), "run python docs/render_methods.py"
    classes = {name for name in lesam_dist.__all__ if hasattr(getattr(lesam_dist, name), "registration")}
    assert set(re.findall(r"^\| `(\w+)` \| `\w+` \| [^`]", page, re.M)) == classes


@pytest.mark.parametrize("page", ["methods.md", "distributed.md"])
def test_methods_without_scopes(page: str) -> None:
    """The methods that a page says are refused under the scopes "local" and "replica" are, and no others."""
    (listed,) = re.findall(
        r"drift\s+apart: ((?:.|\n)*?)have no first\s+pass to change", (ROOT / "docs" / page).read_text()
    )
    named = {name.strip("`") for name in re.findall(r"`\w+`|LE-SAM\+", listed)}
    net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    classes = {n: getattr(lesam_dist, n) for n in lesam_dist.__all__}
    cases = {n: (cls, {}) for n, cls in classes.items() if hasattr(cls, "registration")}
    cases["LE-SAM+"] = (lesam_dist.LESAM, {"alpha": 0.5})

    def is_refused(cls: Any, **arguments: Any) -> bool:
        try:
            cls(lesam_dist.norm_groups(net), torch.optim.SGD, lr=0.1, momentum=0.9, scope="local", **arguments)
        except ValueError:
            return True
        return False

    assert named == {case for case, (cls, arguments) in cases.items() if is_refused(cls, **arguments)}


def test_the_picture(tmp_path: Path) -> None:
    """Its script draws what runs log, and the README's caption says what the picture's own metadata say."""
    script = runpy.run_path(str(ROOT / "docs" / "figures" / "loss_budget.py"))
    for command in script["COMMANDS"].values():
        read_command_line(command.split())
    line = {"loss": 1.0, "rho": 0.05, "perturbed_loss": 1.1}
    log = [{"epoch": step / 4, **line} for step in range(1, 9)]
    script["draw"]({"SAM": log, "LE-SAM": log}, tmp_path / "drawn.svg", "how it was made")
    assert "how it was made" in (tmp_path / "drawn.svg").read_text()
    picture = ROOT / "docs" / "figures" / "loss_budget.svg"
    found = re.search(r"<dc:description>commit (\w+), .*digits_resnet8_sam.*digits_resnet8_lesam", picture.read_text())
    assert found
    assert f"as of commit {found[1]}" in (ROOT / "README.md").read_text()
    assert all(each.stat().st_size <= 200_000 for each in (picture, picture.with_name("report.png")))
