import subprocess
import sys

from awq_jax.cache import cache

SHOW = """
import jax
from awq_jax.cache import keep_compiled_programs
keep_compiled_programs()
print(jax.config.jax_compilation_cache_dir)
"""


def show(**environment):
    done = subprocess.run([sys.executable, "-c", SHOW], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_programs_are_kept_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache() == tmp_path / "awq_jax"
    assert show(XDG_CACHE_HOME=str(tmp_path)) == str(tmp_path / "awq_jax" / "compiled")


def test_or_where_the_user_keeps_them(tmp_path):
    assert show(XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine")) == str(
        tmp_path / "mine"
    )
    assert not (tmp_path / "awq_jax").exists()
