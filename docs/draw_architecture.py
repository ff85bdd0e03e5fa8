"""Draw docs/architecture.svg from the imports that stand in the tree.

    python docs/draw_architecture.py            write it
    python docs/draw_architecture.py --check    exit 1 if it is out of date

An arrow from A to B means that a file of folder A imports package B. Arrows to core are left out: all have one.
Libraries that a folder imports are named in it.
"""

from __future__ import annotations

import ast
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "architecture.svg"

# Folder → (x, y, width, what it does). The command line is part of core, but dispatches to all: it has its own box.
BOXES = {
    "core/cli": (300, 20, 240, "the command qwen-rt"),
    "export": (20, 150, 240, "checkpoint → graph → bundle"),
    "benchmarks": (300, 150, 240, "verify, timing, peers, nano"),
    "runtime": (580, 150, 240, "bundle → tokens → text"),
    "plugins": (580, 290, 240, "kernels and their references"),
    "core": (
        20,
        410,
        800,
        "spec, checkpoint, bundle, errors, storage: every box imports it, and it imports none of them",
    ),
}
HEIGHT = 86
PACKAGES = {
    "core": "qwen_rt",
    "core/cli": "qwen_rt.cli",
    **{name: f"qwen_rt.{name}" for name in ("export", "runtime", "plugins", "benchmarks")},
}
LIBRARIES = ("torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "tokenizers", "jinja2", "numpy")


def _files(folder: str) -> Iterator[Path]:
    for file in sorted((ROOT / folder).rglob("*.py")):
        if folder != "core" or "cli" not in file.relative_to(ROOT / "core").parts:
            yield file


def _imports(folder: str) -> set[str]:
    found: set[str] = set()
    for file in _files(folder):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module)
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def _owner(module: str) -> str | None:
    """The folder that a module of this project stands in."""
    for folder in ("core/cli", "export", "runtime", "plugins", "benchmarks"):
        if module == PACKAGES[folder] or module.startswith(PACKAGES[folder] + "."):
            return folder
    return "core" if module.startswith("qwen_rt.") else None


def _edge(source: str, target: str) -> str:
    (x1, y1, w1, _), (x2, y2, w2, _) = BOXES[source], BOXES[target]
    if y1 == y2:
        y = y1 + HEIGHT / 2
        ends = (x1, y, x2 + w2, y) if x1 > x2 else (x1 + w1, y, x2, y)
    else:
        ends = (x1 + w1 / 2, y1 + HEIGHT, x2 + w2 / 2, y2)
    x_from, y_from, x_to, y_to = ends
    return (
        f'<line x1="{x_from:.0f}" y1="{y_from:.0f}" x2="{x_to:.0f}" y2="{y_to:.0f}" '
        'stroke="#456" stroke-width="1.5" marker-end="url(#tip)"/>'
    )


def draw() -> str:
    """Return the picture as SVG."""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 840 526" font-family="sans-serif">',
        '<defs><marker id="tip" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
        '<path d="M0,0 L9,4 L0,8 z" fill="#456"/></marker></defs>',
        '<rect width="840" height="526" fill="#fff"/>',
    ]
    boxes = []
    for folder, (x, y, width, what) in BOXES.items():
        imports = _imports(folder)
        targets = {_owner(module) for module in imports} - {None, folder, "core"}
        if folder != "core":  # core reaches up only lazily, for `from qwen_rt import LLM`
            parts += [_edge(folder, target) for target in sorted(str(t) for t in targets)]
        used = [lib for lib in LIBRARIES if any(m == lib or m.startswith(lib + ".") for m in imports)]
        fill = "#eef4ea" if folder == "core" else "#eaf1f8"
        boxes.append(f'<rect x="{x}" y="{y}" width="{width}" height="{HEIGHT}" rx="6" fill="{fill}" stroke="#456"/>')
        libraries = textwrap.wrap(", ".join(used), width=width // 6) or [""]
        lines = [(60 + 13 * number, 10, line) for number, line in enumerate(libraries)]
        for dy, size, text in ((22, 16, f"{folder}/"), (42, 12, what), *lines):
            weight = ' font-weight="bold"' if dy == 22 else ' fill="#345"'
            boxes.append(f'<text x="{x + 12}" y="{y + dy}" font-size="{size}"{weight}>{text}</text>')
    return "\n".join([*parts, *boxes, "</svg>", ""])


def main() -> int:
    """Write the picture, or with --check compare it."""
    picture = draw()
    if "--check" in sys.argv[1:]:
        current = PICTURE.read_text(encoding="utf-8") if PICTURE.exists() else ""
        if current != picture:
            print("docs/architecture.svg is out of date; run python docs/draw_architecture.py", file=sys.stderr)
            return 1
        return 0
    PICTURE.write_text(picture, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
