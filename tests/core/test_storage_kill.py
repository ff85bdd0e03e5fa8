"""kill -9 at random moments of a build: what is visible is whole, what is left is taken up by the next build."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from qwen_rt.storage import StagedDirectory

BUILDER = """
    import hashlib, os, sys
    from pathlib import Path
    from qwen_rt.storage import AtomicFile, StagedDirectory
    final = Path(sys.argv[1])
    print("go", flush=True)
    generation = 0
    while True:
        generation += 1
        with StagedDirectory(final, overwrite=True) as stage:
            names = []
            for k in range(3):
                block = bytes([generation % 251]) * 50_000 * (k + 1)
                name = f"{k}-{hashlib.sha256(block * 2).hexdigest()}"
                with AtomicFile(stage.path / name) as file:
                    file.write(block)
                    file.flush()
                    file.write(block)
                names.append(name)
            for left in stage.path.iterdir():
                if left.name not in names:
                    left.unlink()
            with AtomicFile(stage.path / "manifest.json") as file:
                file.write("\\n".join(names).encode())
            stage.commit()
"""


def _check_whole(folder: Path) -> None:
    names = (folder / "manifest.json").read_text().split()
    assert len(names) == 3
    assert sorted(p.name for p in folder.iterdir()) == sorted([*names, "manifest.json"])
    for name in names:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == name.partition("-")[2]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_kill_9_at_random_moments_never_shows_a_half_thing(tmp_path: Path, can_exchange: bool) -> None:
    moments = random.Random(2)
    final, partial, old = tmp_path / "bundle", tmp_path / ".bundle.partial", tmp_path / ".bundle.old"
    program = textwrap.dedent(BUILDER)
    if not can_exchange:
        program = "from qwen_rt import storage\nstorage._exchange = lambda first, second: False\n" + program
    seen_final = False
    for attempt in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(final)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"go\n", process.communicate()[1].decode()
        limit = time.monotonic() + 60
        while attempt == 0 and not final.exists() and time.monotonic() < limit:
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 0.06))
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors.decode()
        if final.exists():
            seen_final = True
            _check_whole(final)
        else:
            # Without an exchange there is a moment between two renames; the old folder is whole beside it then.
            assert not seen_final or not can_exchange
            if seen_final:
                _check_whole(old)
        for file in partial.iterdir() if partial.is_dir() else ():
            if not file.name.startswith(".") and file.name != "manifest.json":
                assert hashlib.sha256(file.read_bytes()).hexdigest() == file.name.partition("-")[2]
    assert seen_final
    with StagedDirectory(final, overwrite=True) as stage:
        stage.abandon()
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
    _check_whole(final)
