"""The dependency rules hold in this tree, and the checker sees each way of breaking them."""

from pathlib import Path

import pytest

from tests.layers import ROOT, pure_files, violations

PURE = frozenset({"router/core.py", "tandem/domain.py"})


def _write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_tree_keeps_its_rules() -> None:
    found = violations(ROOT, pure_files())
    assert not found, "\n" + "\n".join(found)


def test_imports_that_point_down_are_fine(tmp_path: Path) -> None:
    _write(
        tmp_path,
        {
            "tandem/__init__.py": "from tandem.domain import Request\n",
            "tandem/domain.py": "import math\nfrom random import Random\n\nimport numpy as np\n\ndef f(rng: Random) -> float:\n"
            "    return rng.random() + Random(7).random() + np.random.default_rng(7).random()\n",
            "tandem/cli.py": "def main():\n    from router import main\n    from tandem import up\n",
            "tandem/up.py": "import kv_transfer.store\n",
            "tandem/engine/__init__.py": "",
            "tandem/engine/vllm.py": "import vllm\nimport torch\n",
            "kv_transfer/store.py": "from tandem import domain\n",
            "kv_transfer/redis_store.py": "import redis.asyncio\n",
            "router/core.py": "from tandem.domain import Request\nimport cbor2\n",
            "router/http.py": "import time\nfrom router.core import x\nfrom kv_transfer import store\n",
            "router/main.py": "import asyncio\nfrom router import http\n",
        },
    )
    assert violations(tmp_path, PURE) == []


@pytest.mark.parametrize(
    ("path", "text", "fault"),
    [
        ("router/server.py", "def f():\n    import vllm\n", "vllm may be imported in"),
        ("router/server.py", "def f():\n    from torch.nn import Linear\n", "torch may be imported in"),
        ("router/server.py", "import redis.asyncio\n", "redis may be imported in"),
        ("tandem/replica.py", "import ray\n", "ray may be imported in"),
        ("router/server.py", "import prefill_workers.service\n", "services never import each other: prefill_workers.service"),
        ("router/server.py", "def f():\n    from autoscaler import core\n", "services never import each other: autoscaler.core"),
        ("kv_transfer/store.py", "from router import core\n", "store imports router.core (services)"),
        ("kv_transfer/store.py", "from . import main\n", "store imports kv_transfer.main (roof)"),
        ("tandem/client.py", "import kv_transfer\n", "ground imports kv_transfer (store)"),
        ("tandem/client.py", "from tandem import cli\n", "ground imports tandem.cli (roof)"),
        ("tandem/deep/client.py", "from .. import cli\n", "ground imports tandem.cli (roof)"),
        ("router/server.py", "from router.main import build\n", "services imports router.main (roof)"),
        ("router/server.py", "import importlib\nx = importlib.import_module('vllm')\n", "no import by string: importlib.import_module"),
        ("router/server.py", "from importlib import import_module as load\nx = load('vllm')\n", "no import by string"),
        ("router/server.py", "x = __import__('vllm')\n", "no import by string: __import__"),
        ("router/core.py", "def f():\n    import time\n", "a pure file may not import time"),
        ("router/core.py", "from router import server\n", "a pure file may not import router.server"),
        ("router/core.py", "import requests\n", "a pure file may not import requests"),
        ("router/core.py", "import tandem\n", "a pure file may not import tandem"),
        ("router/core.py", "import random\nx = random.random()\n", "no global randomness: random.random"),
        ("router/core.py", "from random import shuffle as mix\nmix([])\n", "no global randomness: random.shuffle"),
        ("router/core.py", "from random import Random\nx = Random()\n", "seeds its randomness: random.Random()"),
        ("router/core.py", "import numpy as np\nx = np.random.rand()\n", "no global randomness: numpy.random.rand"),
        ("router/core.py", "import numpy as np\nx = np.random.default_rng()\n", "seeds its randomness"),
        ("router/core.py", "x = open('f')\n", "does no I/O: open"),
        ("router/core.py", "async def f():\n    pass\n", "is synchronous: f"),
        ("router/utils.py", "", "a module is named for its one idea"),
        ("router/types.py", "", "types is also the name of a library"),
        ("tandem/ray.py", "", "ray is also the name of a library"),
        ("router/grpc.py", "import grpc.aio\n", "grpc is also the name of a library"),
    ],
)
def test_each_broken_rule_is_found(tmp_path: Path, path: str, text: str, fault: str) -> None:
    rest = ("tandem/__init__.py", "tandem/cli.py", "router/main.py", "router/core.py", "kv_transfer/main.py", "autoscaler/core.py")
    _write(tmp_path, dict.fromkeys([*rest, "router/server.py", "prefill_workers/service.py"], "") | {path: text})
    found = violations(tmp_path, PURE)
    assert len(found) == 1, found
    assert found[0].startswith(f"{path}:")
    assert fault in found[0]


def test_a_cycle_of_module_level_imports_is_found(tmp_path: Path) -> None:
    _write(tmp_path, {"router/a.py": "from router import b\n", "router/b.py": "import router.c\n", "router/c.py": "from . import a\n"})
    (found,) = violations(tmp_path, PURE)
    assert found.startswith("import cycle: ")
    assert {"router.a", "router.b", "router.c"} <= set(found.removeprefix("import cycle: ").split(" <- "))


def test_an_import_inside_a_function_makes_no_cycle(tmp_path: Path) -> None:
    _write(tmp_path, {"router/a.py": "from router import b\n", "router/b.py": "def f():\n    from router import a\n"})
    assert violations(tmp_path, PURE) == []
