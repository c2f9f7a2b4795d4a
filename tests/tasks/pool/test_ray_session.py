"""What holds before a session of Ray is opened."""

import subprocess
import sys

from support import REPOSITORY


def test_a_local_session_refuses_ray_that_was_imported_before_it():
    lines = ("import ray", "from tasks.pool.ray_session import ray_session", "with ray_session('local'): pass")
    ended = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=REPOSITORY, timeout=300
    )
    assert ended.returncode == 1
    assert "Ray was imported before its local session was opened" in ended.stderr.splitlines()[-1]
