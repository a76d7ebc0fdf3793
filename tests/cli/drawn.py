"""Command lines drawn from the schema: keys that there are with values that they may not have, and words that mean nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from vlmlab.cli.conf import conf_folder
from vlmlab.cli.rules.constructors import constructor
from vlmlab.cli.rules.schema import Root
from vlmlab.contracts.values import hints
from vlmlab.recipe.stage import KEYS, Stage

LONG = "y" * 500
VALUES = (
    "-1 0 1 2 3.5 -2.5 1e400 -1e400 nan inf -inf .nan 1e-300 99999999999999999999999999999999999999 -0 0x1f 1_000 007 "
    "true false True yes no on off null Null None ~ '' \"\" [] [1] [1,2] [a,b] [null] [[]] [nan] {} {a:1} {a:{b:1}} "
    "{_target_:x} {_target_:null} {_target_:os.getcwd} {1:2} {null:1} [{_target_:math.sqrt}] x auto none a.b a/b ../x /nothere /etc/passwd . / - -- "
    "café \u202e\u0007 %s {} $ @ a@b a:b a=b '=' \\ '\\n' 'a b' 'a,b' \"null\" '1' 3a 1,"
).split(" ") + [LONG, "[" + ",".join(["1"] * 200) + "]", "'a b'", "", " ", "a b", "\x1b[31mred", "a\nb", "\udc80", "\0"]
BROKEN = ["[1", "{a", "{a:1", '"x', "'x", ")", "(", "]", "[1,,2]", "{:}", "a b c'", "!x", "&x", "*x", "#x", "`x`", "$(x)", "\\"]
REFERENCES = (
    "${nothing} ${nothing.at.all} ${oc.env:NOPE_NOT_THERE} ${now:} ${now:%Y} ${now} ${oc.decode:x} ${oc.create:{a:1}} "
    "${oc.select:nothing} ${oc.dict.keys:recipe} ${oc.deprecated:seed} ${hydra:job.num} ${hydra:nothing} ${ ${} ${:} ${.} "
    "${..} ${seed ${unknown_resolver:1} ${vlmlab.run_name:1} ${${seed}} $seed ${seed} ${name} ${recipe} ${data} ${SELF} "
    "'${nothing}' \\${nothing} x${nothing}x [${nothing}] {a:${SELF}} ${oc.env:HOME} ${python_version:}"
).split(" ")
SWEEPS = "1,2 a,b range(1,3) range(0,0) choice(1,2) choice() glob(*) interval(0,1) sort(2,1) shuffle(1,2) tag(a,1) int(x) float(x) str(1) bool(3) json_str(x) extend_list(1) nothing(1)".split(" ")


@dataclass(frozen=True)
class Place:
    """A key of a composition and the annotation that says what it may be."""

    key: str
    kind: Any


def places(config: Mapping[str, Any]) -> list[Place]:
    """Every key of a composition that has a type."""
    return list(_section(Root, config, ""))


def _section(section: Any, node: Any, where: str) -> Iterator[Place]:
    for key, value in node.items() if isinstance(node, Mapping) else ():
        name, kind = f"{where}.{key}".lstrip("."), hints(section).get(key, Any)
        yield Place(name, kind)
        if key == "recipe":
            for stage, content in value["stages"].items():
                place = f"{name}.stages.{stage}"
                yield Place(place, dict)
                for inner, below in content.items():
                    yield Place(f"{place}.{inner}", hints(Stage).get(inner, Any))
                    yield from _parts(below, f"{place}.{inner}")
                yield from (Place(f"{place}.{inner}", hints(Stage)[inner]) for inner in sorted(KEYS - set(content)))
        elif isinstance(kind, type) and hasattr(kind, "__total__"):
            yield from _section(kind, value, name)
        else:
            yield from _parts(value, name)


def _parts(node: Any, where: str) -> Iterator[Place]:
    if isinstance(node, Mapping):
        target = node.get("_target_")
        types = constructor(target).types if isinstance(target, str) else {}
        for key, value in node.items():
            yield Place(f"{where}.{key}", types.get(key, Any))
            yield from _parts(value, f"{where}.{key}")


GROUPS = sorted(folder.name for folder in conf_folder().iterdir() if folder.is_dir())
HYDRA = (
    "hydra.nothing=1 hydra.run.dir= hydra.run.dir=[1] hydra.run.dir=null hydra.verbose=x hydra.job.chdir=true hydra.mode=X hydra.mode=MULTIRUN "
    "hydra.job.name=null hydra.output_subdir=x hydra=x hydra=null ~hydra +hydra.x=1 hydra/launcher=nope hydra/help=x hydra/job_logging=x "
    "hydra/sweeper=x hydra.sweep.dir= hydra.run.dir=${nothing} hydra.launcher.slots=x hydra.launcher.slots=-1 hydra.launcher.x=1 hydra.job.env_set.A=1 hydra.searchpath=[x] "
    "hydra.searchpath=[file:///nothere] hydra.run.dir=/proc/x/y hydra.callbacks.x=1 hydra/launcher=basic hydra.run={} hydra.job.num=x hydra.job.id=3 hydra.overrides.task=[] hydra.runtime.cwd=/ hydra.runtime.output_dir=/x"
).split(" ")
FLAGS = (
    "--cfg|--cfg x|--cfg job -p nothing|--package x|--package|-p a.b|--info x|--info|--resolve|--nope|-x|-cd /nothere|--config-dir /nothere|"
    "--config-dir|--config-name nope|--config-name|-cn ../x|--config-path /nothere|--config-path|--shell-completion|-sc nope|-sc install=x|"
    "--experimental-rerun /nothere|--experimental-rerun|-m|--multirun|-h x=1|--run -m|--cfg job --info|--cfg job -m seed=1,2|--hydra-help|--version|--|-"
).split("|")


def misspelt(key: str, at: int, how: int) -> str:
    at %= len(key)
    return (key[:at] + key[at + 1 :], key[:at] + key[at] + key[at:], key[:at] + "x" + key[at + 1 :], key + ".x", "x." + key, key.upper(), key.replace(".", "/"), key.replace(".", "_"), key + "s")[how % 9]


def lines(found: list[Place]) -> st.SearchStrategy[tuple[str, tuple[str, ...], str]]:
    """Kind, words and the key that they are about."""
    keys = st.sampled_from([place.key for place in found])
    values, refs, broken, sweeps = map(st.sampled_from, (VALUES, REFERENCES, BROKEN, SWEEPS))
    group = st.sampled_from(GROUPS)
    return st.one_of(
        st.builds(lambda k, v: ("value", (f"{k}={v}",), k), keys, values),
        st.builds(lambda k, v: ("value", (f"{k}={v}",), k), keys, values),
        st.builds(lambda k, v: ("value", (f"{k}={v}",), k), keys, values),
        st.builds(lambda k, v: ("broken", (f"{k}={v}",), k), keys, broken),
        st.builds(lambda k, v: ("reference", (f"{k}={v.replace('SELF', k)}",), k), keys, refs),
        st.builds(lambda k, v: ("circular", (f"{k}=${{{v}}}", f"{v}=${{{k}}}"), k), keys, keys),
        st.builds(lambda k, v: ("sweep", (f"{k}={v}",), k), keys, sweeps),
        st.builds(lambda k, a, h, v: ("misspelt", (f"{misspelt(k, a, h)}={v}",), misspelt(k, a, h)), keys, st.integers(0, 60), st.integers(0, 8), st.sampled_from(["1", "x", "true", "null", "[]", ""])),
        st.builds(lambda k, v: ("deleted", (f"~{k}{v}",), k), keys, st.sampled_from(["", "=", "=1", "=x", "=null", ".x", "=mlp"])),
        st.builds(lambda k, p, v: ("added", (f"{p}{k}={v}",), k), keys, st.sampled_from(["+", "++"]), values),
        st.builds(lambda k, p, x, v: ("extra", (f"{p}{k}.{x}={v}",), f"{k}.{x}"), keys, st.sampled_from(["+", "++"]), st.sampled_from(["foo", "_target_", "0", "a.b", "_partial_", "_args_", "_convert_", "é", "lr"]), values),
        st.builds(lambda x, p, v: ("top", (f"{p}{x}={v}",), x), st.sampled_from(["foo", "lr", "a.b.c", "_target_", "0", "epochs", "hydr", "café"]), st.sampled_from(["+", "++", ""]), values),
        st.builds(lambda k, v, w: ("twice", (f"{k}={v}", f"{k}={w}"), k), keys, st.sampled_from(["1", "2", "x", "null"]), st.sampled_from(["1", "2", "x", "null"])),
        st.builds(lambda g, v: ("choice", (f"{g}={v}",), g), group, values),
        st.builds(lambda p, g, v: ("group", (f"{p}{g}={v}",), g), st.sampled_from(["+", "++", "~"]), group, st.sampled_from(["", "none", "mlp", "nope", "null", "[a,b]", "a,b", "embedded"])),
        st.builds(lambda g, p, v: ("package", (f"{g}@{p}={v}",), g), group, st.sampled_from(["x", "", "_global_", "_here_", "connector", "recipe.stages", "a.b", "_group_", "seed", "fusion.sees", "1", "é", "data:x", ":x"]), st.sampled_from(["none", "mlp", "nope", "null", "embedded", "lm", "before"])),
        st.builds(lambda w: ("hydra", (w,), w.lstrip("+~").partition("=")[0]), st.sampled_from(HYDRA)),
        st.builds(lambda w: ("flag", tuple(w.split(" ")), w.split(" ")[0]), st.sampled_from(FLAGS)),
        st.builds(lambda w: ("noise", (w,), ""), st.one_of(st.sampled_from(["=", "=1", "", " ", "a", "+", "~", "++", "+=1", "~=", "a.=1", ".a=1", "a..b=1", "@=1", "a@b@c=1", "a b=1", "1=1", "[a]=1", "seed", "connector", "seed:1", "seed==1", "connector=mlp=qformer", "\x1b[31m=1", "é=1", "a/b=1", "/=1", "seed =1", "seed= 1", " seed=1", "-seed=1", "--seed=1", "--seed 1"]), st.text(max_size=12).filter(lambda t: "\0" not in t and not t.startswith("-")))),
    )  # fmt: skip
