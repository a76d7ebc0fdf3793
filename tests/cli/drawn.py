"""Command lines drawn from the schema: keys that there are, what may not be there, and words that mean nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, is_typeddict

from hypothesis import strategies as st

from vlmlab.cli.conf import conf_folder
from vlmlab.cli.rules.constructors import constructor
from vlmlab.cli.rules.schema import Root
from vlmlab.contracts.values import hints
from vlmlab.recipe.stage import KEYS, Stage

NUMBERS = [
    *("-1", "0", "1", "3.5", "1e400", "nan", "-inf", "99999999999999999999999999999999999999", "0x1f", "1_000", "007"),
]
TEXTS = [
    *("", " ", "x", "auto", "none", "a.b", "../x", "/nothere", "."),
    *("-", "a b", "café", "%s", "$", "@", "a@b", "a:b", "a=b"),
    *("'='", "\\", "'a b'", "'a,b'", '"null"', "'1'", "3a", "1,", "\x1b[31mred", "a\nb", "\0", "\udc80", "y" * 500),
]  # fmt: skip
NOTHING = [*("true", "False", "yes", "off", "null", "None", "~", "''", '""')]
LISTS = [
    *("[]", "[1]", "[1,2]", "[a,b]", "[null]", "[[]]", "[nan]", "[{_target_:math.sqrt}]", f"[{','.join('1' * 200)}]")
]
DICTS = [*("{}", "{a:1}", "{a:{b:1}}", "{1:2}", "{null:1}", "{_target_:x}", "{_target_:null}", "{_target_:os.getcwd}")]
VALUES = st.sampled_from([*NUMBERS, *TEXTS, *NOTHING, *LISTS, *DICTS])

BROKEN = st.sampled_from(
    [*("[1", "{a:1", '"x', "'x", ")", "]", "[1,,2]", "{:}", "a b c'", "!x", "&x", "*x", "#x", "`x`", "$(x)")]
)
REFERENCES = st.sampled_from(
    [
        *("${nothing}", "${oc.env:NOPE_NOT_THERE}", "${now:}"),
        *("${now:%Y}", "${now}", "${oc.decode:x}", "${oc.select:no}"),
        *("${oc.create:{a:1}}", "${hydra:job.num}", "${hydra:nothing}", "${", "${}", "${:}", "${.}", "${..}", "${seed"),
        *("${unknown_resolver:1}", "${${seed}}", "${recipe}"),
        *("'${nothing}'", "x${nothing}x", "[${nothing}]", "{a:${data}}"),
    ]
)  # fmt: skip
SWEEPS = st.sampled_from(
    ["1,2", "range(1,3)", "range(0,0)", "choice(1,2)", "choice()", "glob(*)", "interval(0,1)", "sort(2,1)", "int(x)"]
)
EXTRA = st.sampled_from(["foo", "_target_", "0", "a.b", "_partial_", "_args_", "_convert_", "é", "lr"])
TOP = st.sampled_from(["foo", "lr", "a.b.c", "_target_", "0", "epochs", "hydr", "café"])
GROUPS = st.sampled_from(sorted(folder.name for folder in conf_folder().iterdir() if folder.is_dir()))
CHOICES = st.sampled_from(["", "nope", "null", "[a,b]", "a,b", "../x", "/", "3", "{a:1}", "${seed}"])
PLACES = st.sampled_from(["x", "_global_", "_here_", "connector", "recipe.stages", "a.b", "seed", "1", "é", ":x"])
HYDRA = st.sampled_from(
    [
        *("hydra.nothing=1", "+hydra.x=1", "~hydra", "hydra=x", "hydra.run.dir=", "hydra.run.dir=[1]", "hydra.run={}"),
        *("hydra.verbose=x", "hydra.job.chdir=true", "hydra.job.id=3", "hydra.mode=X", "hydra.output_subdir=x"),
        *("hydra/launcher=nope", "hydra/launcher=basic", "hydra/job_logging=x", "hydra/sweeper=x", "hydra.sweep.dir=x"),
        *("hydra.launcher.slots=x", "hydra.launcher.slots=1"),
        *("hydra.searchpath=[x]", "hydra.searchpath=[file:///nothere]"),
        *("hydra.callbacks.x=1", "hydra.overrides.task=[]", "hydra.runtime.output_dir=/x", "hydra.job.env_set.A=1"),
    ]
)  # fmt: skip
OPTIONS = st.sampled_from(
    [
        *("--cfg", "--cfg x", "--cfg job -p nothing", "--package x", "-p a.b"),
        *("--info x", "--resolve", "--nope", "-x", "--"),
        *("-cd /nothere", "--config-dir", "--config-name nope", "-cn ../x", "--config-path /nothere", "-sc nope"),
        *("--shell-completion", "--experimental-rerun /x", "--run -m"),
        *("--cfg job --info", "--cfg job -m seed=1,2", "-"),
        *("-m seed=1,x", "-m seed=", "-m connector=mlp,nope", "-m connector.depth=1,[]", "-m hydra.run.dir=x seed=1,2"),
        *("-m hydra.launcher.slots=0 seed=1,2", "-m mask=bidir,visual_rows_open", "-m seed=range(0,0)", "-m data=1,2"),
    ]
)  # fmt: skip
NOISE = st.sampled_from(
    [
        *("=", "=1", "", " ", "a", "+", "~", "++"),
        *("+=1", "~=", "a.=1", ".a=1", "a..b=1", "@=1", "a@b@c=1", "a b=1", "1=1"),
        *("[a]=1", "seed", "connector", "seed:1", "seed==1"),
        *("connector=mlp=qformer", "\x1b[31m=1", "é=1", "a/b=1", "/=1"),
        *("seed =x", " seed=x", "-seed=1", "--seed=1"),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """Words of a command, and the keys one of which a refusal must name."""

    words: tuple[str, ...]
    keys: tuple[str, ...] = field(default=())


def places(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of a composition, and its type."""
    return dict(_section(Root, config, ""))


def _section(section: Any, node: Any, where: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items() if isinstance(node, Mapping) else ():
        name, kind = f"{where}.{key}".lstrip("."), hints(section).get(key, Any)
        yield name, kind
        if name == "recipe":
            for stage, content in value["stages"].items():
                yield f"recipe.stages.{stage}", dict
                yield from _stage(content, f"recipe.stages.{stage}")
        elif is_typeddict(kind):
            yield from _section(kind, value, name)
        else:
            yield from _parts(value, name)


def _stage(content: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    for key in sorted(KEYS):
        yield f"{where}.{key}", hints(Stage)[key]
        yield from _parts(content.get(key), f"{where}.{key}")


def _parts(node: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        types = constructor(node["_target_"]).types if isinstance(node.get("_target_"), str) else {}
        for key, value in node.items():
            yield f"{where}.{key}", types.get(key, Any)
            yield from _parts(value, f"{where}.{key}")


def misspelt(key: str, at: int, how: int) -> str:
    """A letter lost, doubled or another; a part too many; another case or sign."""
    at %= len(key)
    return (
        key[:at] + key[at + 1 :],
        key[:at] + key[at] + key[at:],
        key[:at] + "x" + key[at + 1 :],
        f"{key}.x",
        f"x.{key}",
        key.upper(),
        key.replace(".", "/"),
        f"{key}s",
    )[how % 8]


def lines(keys: list[str]) -> st.SearchStrategy[Line]:
    """One wrong thing said about one of the keys, a group, Hydra or nothing."""
    key, sign = st.sampled_from(keys), st.sampled_from(["+", "++"])
    wrong = st.builds(misspelt, key, st.integers(0, 60), st.integers(0, 7))
    given = st.builds(lambda k, v: Line((f"{k}={v}",), (k,)), key, st.one_of(VALUES, BROKEN, REFERENCES, SWEEPS))
    return st.one_of(
        given,
        given,
        st.builds(lambda k, v: Line((f"{k}={v}",), (k,)), wrong, st.sampled_from(["1", "x", "null", "[]", ""])),
        st.builds(lambda k, v: Line((f"~{k}{v}",), (k,)), key, st.sampled_from(["", "=", "=x", "=null", ".x"])),
        st.builds(lambda s, k, v: Line((f"{s}{k}={v}",), (k,)), sign, key, VALUES),
        st.builds(lambda s, k, x, v: Line((f"{s}{k}.{x}={v}",), (f"{k}.{x}", k)), sign, key, EXTRA, VALUES),
        st.builds(lambda s, k, v: Line((f"{s}{k}={v}",), (k,)), st.sampled_from(["", "+", "++"]), TOP, VALUES),
        st.builds(lambda k, o: Line((f"{k}=${{{o}}}", f"{o}=${{{k}}}"), (k, o)), key, key),
        st.builds(lambda k, v, w: Line((f"{k}={v}", f"{k}={w}"), (k,)), key, VALUES, VALUES),
        st.builds(lambda g, v: Line((f"{g}={v}",), (g,)), GROUPS, CHOICES),
        st.builds(lambda s, g, v: Line((f"{s}{g}={v}",), (g,)), st.sampled_from(["+", "++", "~"]), GROUPS, CHOICES),
        st.builds(lambda g, p, v: Line((f"{g}@{p}={v}",), (g,)), GROUPS, PLACES, CHOICES),
        st.builds(lambda w: Line((w,), (w.lstrip("+~").partition("=")[0],)), HYDRA),
        st.builds(lambda w: Line(tuple(w.split(" "))), OPTIONS),
        st.builds(lambda w: Line((w,)), st.one_of(NOISE, st.text(max_size=12).filter(lambda t: t[:1] != "-"))),
    )  # fmt: skip
