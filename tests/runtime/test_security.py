"""What docs/security.md says, as far as it can be tested."""

from __future__ import annotations

import ast
import json
import pickle
import re
import socket
from pathlib import Path

import pytest

import wavecast.runtime
from tests.faults.local_cells import LocalSides, cancel_later_if_stopped
from wavecast.runtime.checkpoint import Checkpoint
from wavecast.runtime.errors import CheckpointError
from wavecast.runtime.transfer.comm_torch import host_store
from wavecast.runtime.transfer.messages import Connect, HostStore, Status

RUNTIME = Path(wavecast.runtime.__file__).resolve().parent
#: Where bytes are unpickled, all of which came over Ray.
UNPICKLING = {"transfer/messages/replies.py", "transfer/messages/wire.py", "transfer/program.py"}
#: What runs code that is in its input.
RUNNING_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
#: Torch's ways to unpickle what came over a socket, or was in a file.
UNPICKLERS = re.compile(
    r"\b(torch\.load|(broadcast|scatter|send|recv)_object|_object_list|(all_)?gather_object|dist\.rpc|eval\(|exec\()"
)


def test_the_rendezvous_listens_on_its_own_address_alone() -> None:
    store, port = host_store("127.0.0.2", seconds=5.0)
    listening = "0A"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    rows += [line.split() for line in Path("/proc/net/tcp6").read_text().splitlines()[1:]]
    assert [row[1] for row in rows if row[3] == listening and row[1].endswith(f":{port:04X}")] == [
        f"0200007F:{port:04X}"
    ]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)

    del store


@pytest.mark.anyio
async def test_every_connection_has_a_name_and_a_secret_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cancel", cancel_later_if_stopped)
    sides = LocalSides()
    names: list[str] = []
    secrets: list[bytes] = []
    for _ in range(2):
        async with sides.group("in_place", reconnects=True) as group:
            await group.sync()
            await group.sync()

    for actor in sides.actors:
        names += [request.connection for request in actor.asked if isinstance(request, Connect | HostStore)]
        connects = [request for request in actor.asked if isinstance(request, Connect)]
        secrets += [request.secret for request in connects]
        assert not any(repr(request.secret) in repr(request) for request in connects)
        groups = {
            request.run.group for request in actor.asked if not isinstance(request, Status) if hasattr(request, "run")
        }
        assert len(groups) == 2
        assert all(re.fullmatch(r"[0-9a-f]{32}", name) for name in groups)

    assert len(set(names)) == 4
    # One a connection, the same for all of its members.
    assert len(secrets) == 4 * len(sides.actors)
    assert {len(secret) for secret in secrets} == {32}
    assert len(set(secrets)) == 4
    assert all(re.fullmatch(r"wavecast-[0-9a-f]{32}", name) for name in names)


def test_only_what_came_over_ray_is_unpickled() -> None:
    found = {str(file.relative_to(RUNTIME)) for file in RUNTIME.rglob("*.py") if RUNNING_CODE & _imported(file)}
    assert found == UNPICKLING
    calls = {
        str(file.relative_to(RUNTIME)): UNPICKLERS.findall(file.read_text()) for file in sorted(RUNTIME.rglob("*.py"))
    }
    # The trainers' own process group, in which they gather their adapters themselves.
    assert {name for name, each in calls.items() if each} == {"layout/lora/gather.py"}
    # Whatever receives from a socket of its own between actors cannot even reach what unpickles. The driver's, for
    # notices, has the messages' types, and reads numbers alone: test_notices.py throws pickles at it.
    for name in ("comm", "comm_torch", "comm_ipc", "comm_fake", "sealed_store"):
        modules = _imported(RUNTIME / "transfer" / f"{name}.py")
        assert not any({"messages", "program"} & set(module.split(".")) for module in modules), name


def _imported(file: Path) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            modules.add(node.module)

    return modules


class Bomb:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 16,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_a_malicious_pickle_checkpoint_is_refused_and_never_run(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "mark"
    bomb = pickle.dumps(Bomb(mark))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / name).write_bytes(bomb)
    wanted = "neither model.safetensors nor" if name != "model.safetensors" else "header of .* does not fit"
    with pytest.raises(CheckpointError, match=wanted):
        Checkpoint.open(tmp_path)

    assert not mark.exists()
    # It would have gone off.
    pickle.loads(bomb)
    assert mark.exists()
