"""Puts sources where Python finds them by the package's name: Bazel calls the folder of a main repository `_main`."""

def _python_package(ctx):
    files = depset(transitive = [source[DefaultInfo].default_runfiles.files for source in ctx.attr.srcs])
    own = [file for file in files.to_list() if not file.short_path.startswith("../")]
    names = {ctx.attr.package + "/" + file.short_path: file for file in own}
    return [DefaultInfo(runfiles = ctx.runfiles(root_symlinks = names))]

python_package = rule(
    implementation = _python_package,
    attrs = {
        "package": attr.string(default = "paged_prefill", doc = "Its name in Python."),
        "srcs": attr.label_list(doc = "Targets whose files, and those they depend on, make it up."),
    },
    doc = "A package by its name, for targets that have this one among their data.",
)
