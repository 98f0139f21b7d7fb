"""Protects how the code is laid out: which way imports go, what only compat.py may import, sizes of files; and the face
that every kernel has.
"""

import ast
import inspect
from pathlib import Path
import re
import tomllib

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp

import paged_prefill
from paged_prefill import ejkernel
from paged_prefill.lowering.call import FEATURES, Call, Device, Sequences
from paged_prefill.lowering.choose import KERNELS
from paged_prefill.lowering.kernel import Kernel
from paged_prefill.primitive.attention import Attention
from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill.primitive.prefill import LOCAL, parameters_of
from paged_prefill.tests.problems import problem

ROOT = Path(__file__).parents[1]
PACKAGE = "paged_prefill"

# What a module of each layer may import of this package; the root, which is every other module, may import all.
LAYERS = {
    "compat": {"compat"},
    "primitive": {"compat", "primitive"},
    "sharding": {"compat", "primitive", "sharding"},
    "lowering": {"compat", "primitive", "lowering"},
}
LONGEST = 600
# Lines of a function's code, and its arguments. What Triton launches takes arrays one by one, its short kernels their
# sizes too; and ejkernel.py takes what another project's functions take.
LONGEST_FUNCTION, MOST_ARGUMENTS = 80, 11
FREE_OF_BOTH = ("lowering/triton/append_kernel.py", "lowering/triton/merge_kernel.py", "ejkernel.py")
LAUNCHED = {"lowering/triton/kernel.py": {"attend_tile"}}

# The signatures of users, the one list of static parameters, and the forms in which kernels are given their work. All
# others read operands.py's table, or pass on what they were given. (The calls in ejkernel.py are another project's.)
LISTS_OF_PARAMETERS = {
    "primitive/api.py": {"prefill_page_attention", "ragged_paged_prefill"},
    "primitive/pages.py": {"append_to_pages"},
    "primitive/prefill.py": {"parameters_of"},
    "primitive/reference.py": {"reference"},
    "sharding/pages.py": {"local_pages"},
    "lowering/call.py": {"Call", "flatten"},
    "lowering/mosaic_gpu/host.py": {"_plan"},
    "lowering/mosaic_gpu/hopper/plan.py": {"Plan"},
    "lowering/triton/append_kernel.py": {"append_tokens"},
}
STATIC = inspect.signature(parameters_of).parameters.keys() - {"operands"}
PARAMETERS = {row.name for row in LOCAL.operands} | STATIC | {"num_kv_heads"}


def sources(*folders) -> list[Path]:
    """The Python files of the root, and those in its folders of these names."""
    return sorted([*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))])


def imported(path: Path) -> set[str]:
    """The full names of all that a file imports, wherever in it."""
    names = set()
    package = (PACKAGE, *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*start, *filter(None, [node.module])))
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def arguments(node: ast.FunctionDef) -> set[str]:
    """The names of a function's arguments, but for *args and **kwargs."""
    given = node.args
    return {argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)}


def names_listed(node: ast.AST) -> set[str]:
    """What a node lists: the parameters of a function, fields of a class, arguments of a call, names in a collection."""
    match node:
        case ast.FunctionDef():
            return arguments(node)
        case ast.ClassDef(body=body):
            return {line.target.id for line in body if isinstance(line, ast.AnnAssign)}
        case ast.Call(args=positional, keywords=named):
            return {x.id for x in positional if isinstance(x, ast.Name)} | {x.arg for x in named if x.arg}
        case ast.Tuple(elts=items) | ast.List(elts=items) | ast.Set(elts=items) | ast.Dict(keys=items):
            return {getattr(x, "id", getattr(x, "value", None)) for x in items}
    return set()


def layer(name: str) -> str:
    """The layer of a name in this package: its first part, or "root"."""
    first = name.split(".")[1] if "." in name else ""
    return first if first in LAYERS else "root"


def layer_of(path: Path) -> str:
    return layer(".".join((PACKAGE, *path.relative_to(ROOT).with_suffix("").parts)))


class ImportsTest(parameterized.TestCase):
    def test_layers_import_only_what_is_below_them(self):
        upward = {
            (str(path.relative_to(ROOT)), layer(name))
            for path in sources("primitive", "sharding", "lowering")
            for name in imported(path)
            if name.split(".")[0] == PACKAGE and layer(name) not in LAYERS.get(layer_of(path), {layer(name)})
        }
        self.assertEmpty(upward)

    def test_only_compat_imports_private_names_of_jax(self):
        found = {
            str(path.relative_to(ROOT))
            for path in sources("primitive", "sharding", "lowering", "tests", "benchmarks", "examples")
            for name in imported(path)
            if name.split(".")[0] in ("jax", "jaxlib") and (name.startswith("jaxlib") or "._" in name)
        }
        self.assertEqual(found, {"compat.py"})

    @parameterized.parameters(
        ("import jax._src.core", "jax._src.core"),
        ("from jax import _src", "jax._src"),
        ("def f():\n  from paged_prefill.lowering import tuning", "paged_prefill.lowering.tuning"),
        ("from . import cut", "paged_prefill.primitive.cut"),
        ("from ..lowering import call", "paged_prefill.lowering.call"),
        ("from .cut import Cut", "paged_prefill.primitive.cut.Cut"),
    )
    def test_every_way_to_import_is_seen(self, code, name):
        with absltest.mock.patch.object(Path, "read_text", return_value=code):
            self.assertEqual(imported(ROOT / "primitive" / "new.py"), {name})

    def test_no_file_is_too_long_to_read(self):
        files = sources("primitive", "sharding", "lowering", "tests", "benchmarks", "examples")
        lengths = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n") for path in files}
        self.assertEmpty({name: length for name, length in lengths.items() if length > LONGEST})

    def test_no_function_is_too_long_to_see_whole_or_takes_too_much(self):
        """Those that list a call's parameters, which is what they are for, take as many."""
        found = {}
        for path in sources("primitive", "sharding", "lowering", "benchmarks", "examples"):
            if any(path.match(name) for name in FREE_OF_BOTH):
                continue
            name = str(path.relative_to(ROOT))
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef):
                    code = node.body[ast.get_docstring(node) is not None :] or node.body
                    lines, taken = node.end_lineno + 1 - code[0].lineno, len(arguments(node))
                    lists = node.name in LISTS_OF_PARAMETERS.get(name, ()) or node.name in LAUNCHED.get(name, ())
                    if lines > LONGEST_FUNCTION or (taken > MOST_ARGUMENTS and not lists):
                        found[f"{name}: {node.name}"] = lines, taken
        self.assertEmpty(found)

    def test_no_list_of_parameters_is_written_twice(self):
        """Else an operand more is a change in each of them."""
        found = {}
        for path in sources("primitive", "sharding", "lowering"):
            for outer in ast.parse(path.read_text(encoding="utf-8")).body:
                if any(len(names_listed(node) & PARAMETERS) >= 5 for node in ast.walk(outer)):
                    name = getattr(outer, "name", ast.unparse(outer)[:40])
                    found.setdefault(str(path.relative_to(ROOT)), set()).add(name)
        found.pop("ejkernel.py")
        self.assertEqual(found, LISTS_OF_PARAMETERS)

    def test_docstrings_name_every_argument(self):
        """Of the public functions, but `validate`, which takes another's call."""
        functions = [getattr(paged_prefill, name) for name in paged_prefill.__all__ if name != "validate"]
        functions += [ejkernel.unified_attention, ejkernel.ragged_page_attention_v2]
        missing = {
            f"{function.__name__}({name})"
            for function in filter(inspect.isfunction, functions)
            for name in inspect.signature(function).parameters
            if not re.search(rf"^  [\w, ]*\b{name}\b[\w, ]*: ", inspect.getdoc(function), re.MULTILINE)
        }
        self.assertEmpty(missing)

    def test_no_definition_hides_another_of_its_name(self):
        """A merge may leave a test twice, of which Python runs the last."""
        hidden = set()
        for path in sources("primitive", "sharding", "lowering", "tests", "benchmarks", "examples"):
            for scope in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(scope, (ast.Module, ast.ClassDef)):
                    kinds = (ast.FunctionDef, ast.ClassDef)
                    names = [n.name for n in scope.body if isinstance(n, kinds) and not n.decorator_list]
                    names += [n.name for n in scope.body if isinstance(n, kinds) and n.name.startswith("test_")]
                    hidden |= {(path.name, name) for name in names if names.count(name) > 1 + name.startswith("test_")}
        self.assertEmpty(hidden)

    def test_no_test_changes_the_environment_of_its_process(self):
        """XLA's threads read it at any time: see `environment` in tuning_stand_ins.py. Before JAX starts, two do."""
        written = r"environ(\[\S+\])? \|?= |environ\.(update|pop|setdefault|clear)"
        changes = re.compile(rf"{written}|dict\(os\.environ|(putenv|setenv)\(")
        changing = {path.name for path in sources("tests") if changes.search(path.read_text(encoding="utf-8"))}
        self.assertEqual(changing, {"conftest.py", "triton_stand_ins.py"})


class BazelTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.files = [*ROOT.glob("BUILD"), *ROOT.glob("*/BUILD")]
        if not self.files:
            self.skipTest("Bazel runs this, which has read its files by now and shows none of them to a test")

    def test_rules_are_loaded(self):
        """Bazel 9 has no rules of Python's of its own."""
        for path in self.files:
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            names = [node.func.id for node in calls if isinstance(node.func, ast.Name)]
            loads = [node for node in calls if getattr(node.func, "id", "") == "load"]
            loaded = {arg.value for node in loads for arg in node.args[1:]}
            self.assertContainsSubset({name for name in names if name.startswith(("py_", "python_"))}, loaded, path)

    def test_labels_lead_somewhere(self):
        folders = {path.parent for path in self.files}
        for path in self.files:
            for folder in re.findall(r'"//(?!visibility:)([^":]*)', path.read_text()):
                self.assertIn(ROOT / folder, folders, path)
        for folder in folders - {ROOT}:
            self.assertNotEmpty([*folder.rglob("*.py")], folder)

    def test_module_is_the_package(self):
        module = (ROOT / "MODULE.bazel").read_text()
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        self.assertRegex(module, rf'module\(\s*name = "{project["name"]}",\s*version = "{project["version"]}"')
        self.assertRegex(module, r'bazel_dep\(name = "rules_python"')


class Plain(Kernel):
    """A kernel that names no features, and has nothing else against a call."""

    name, version, platforms = "plain", 1, ("cpu",)

    def _reason_against(self, problem, device):
        return None

    def heuristic(self, problem, device):
        return PrefillPageAttentionConfig()

    def candidates(self, problem, device):
        return [self.heuristic(problem, device)]

    def misfit(self, problem, device, config):
        return None

    def attend(self, call, config, device):
        raise NotImplementedError


class Ranging(Plain):
    features = frozenset({"key_ranges"})

    def _reason_against(self, problem, device):
        return "it is full"


def call(**optional) -> Call:
    """A call without values, with what `optional` names."""
    pages = jnp.zeros((1, 2, 3, 4, 8))
    sequences = Sequences(*[jnp.zeros(1, jnp.int32)] * 4, jnp.zeros((1, 5), jnp.int32))
    operands = dict(query=jnp.zeros((6, 4, 8)), key_pages=pages, value_pages=pages[..., :7]) | optional
    return Call.of(
        **operands, sequences=sequences, kv_head_start=jnp.int32(0), num_kv_heads=2, attention=Attention(1.0)
    )


class KernelTest(parameterized.TestCase):
    CPU = Device("cpu", "cpu")

    @parameterized.named_parameters(
        ("key_ranges", dict(ranges=jnp.zeros((6, 2), jnp.int32)), "does not take key_ranges"),
        ("tree_mask", dict(tree=jnp.zeros((6, 1), jnp.uint32)), "does not take tree_mask"),
        ("quantised", dict(key_pages=jnp.zeros((1, 2, 3, 4, 8), jnp.int8)), "does not take quantised caches"),
        ("pools_apart", dict(key_pool=jnp.zeros(1, jnp.int32)), f"does not take {FEATURES['pools_apart']}"),
        ("latent", dict(value_pages=None, value_dim=3), "does not take a latent cache (value_cache=None)"),
        ("two", dict(tree=jnp.zeros((6, 1), jnp.uint32), ranges=jnp.zeros((6, 2), jnp.int32)),
         "does not take key_ranges and tree_mask"),
    )
    def test_a_kernel_refuses_each_feature_that_it_does_not_name(self, optional, words):
        problem = call(**optional).problem
        self.assertEqual(Plain().supports(problem, self.CPU), words)
        self.assertIsNone(Plain().supports(call().problem, self.CPU))

    def test_a_kernel_is_asked_about_the_features_that_it_names(self):
        self.assertEqual(Ranging().supports(call(ranges=jnp.zeros((6, 2), jnp.int32)).problem, self.CPU), "it is full")

    @parameterized.parameters(*FEATURES)
    def test_every_feature_has_words(self, feature):
        self.assertEqual(
            Plain().supports(problem(features=(feature,)), self.CPU), f"does not take {FEATURES[feature]}"
        )

    def test_a_kernel_refuses_other_platforms(self):
        self.assertEqual(Plain().supports(problem(), Device("tpu", "TPU v5e")), "it runs on cpu, not on tpu")

    def test_every_kernel_of_the_registry_has_a_name_and_runs_where_it_stands(self):
        for platform, kernels in KERNELS.items():
            self.assertEqual(list(kernels)[-1], "xla")
            for name, kernel in kernels.items():
                self.assertEqual(kernel.name, name)
                self.assertIn(platform, kernel.platforms)
                self.assertGreater(kernel.version, 0)
                self.assertContainsSubset(kernel.features, FEATURES)


class CallTest(parameterized.TestCase):
    def test_a_problem_is_read_off_the_arrays(self):
        plain = call().problem
        self.assertEqual((plain.tokens, plain.q_heads, plain.num_kv_heads, plain.head_dim, plain.value_dim), (6, 4, 2, 8, 7))
        self.assertEqual((plain.pools, plain.cache_kv_heads, plain.num_pages, plain.page_size), (1, 2, 3, 4))
        self.assertEqual((plain.seqs, plain.pages_per_seq, plain.capacity, plain.group), (1, 5, 20, 2))
        self.assertEqual((plain.dtype, plain.cache_dtype, plain.features), ("float32", "float32", ()))
        latent = call(value_pages=None, value_dim=3, ranges=jnp.zeros((6, 2), jnp.int32)).problem
        self.assertEqual((latent.value_dim, latent.features), (3, ("key_ranges", "latent")))

    def test_a_call_is_a_pytree_of_its_arrays(self):
        given = call(ranges=jnp.zeros((6, 2), jnp.int32))
        self.assertLen(jax.tree.leaves(given), 3 + len(Sequences._fields) + 2)
        doubled = jax.jit(lambda c: jax.tree.map(lambda x: 2 * x, c))(given)
        self.assertEqual(doubled.problem, given.problem)
        self.assertIsNone(doubled.tree)

    @parameterized.parameters(
        "tokens", "q_heads", "num_kv_heads", "head_dim", "value_dim", "pools", "cache_kv_heads", "num_pages", "page_size",
        "seqs", "pages_per_seq",
    )  # fmt: skip
    def test_any_size_may_be_symbolic(self, name):
        (size,) = jax.export.symbolic_shape("size")
        self.assertTrue(problem(**{name: size}).symbolic)
        self.assertFalse(problem().symbolic)


if __name__ == "__main__":
    absltest.main()
