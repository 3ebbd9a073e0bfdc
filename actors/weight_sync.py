"""How a policy version travels from the learner into the vLLM engines: both ends of both transports.

object_store   learner: `pack` -> ray.put | generator actor: ray.get -> `Mailbox` (a file in shared memory, once per
               node) | vLLM worker, a child process that Ray does not know: reads that file.
nccl           learner: `NcclSender` | vLLM workers: vLLM's own NCCL engine, broadcast straight between GPUs.

Late joiners and restarted generators always catch up through the object store. The nccl path is written against
vLLM 0.32 and has not been run yet: it needs at least two GPUs.
"""

import asyncio
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Awaitable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from actors.engine import end_with_owner
from configs.errors import UserError
from trainers.types import InfraError, Weights

Bytes = NDArray[np.uint8]
Transport = Literal["nccl", "object_store"]

BACKEND = "headroom"  # the name under which our engine is registered with vLLM
WORKER_EXTENSION = "actors.vllm_engine.WorkerExtension"  # imported by the vLLM worker, which registers the engine

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64"}


def choose_transport(wanted: str, *, learner_gpus: float, generator_gpus: float) -> Transport:
    """Return the transport to use: auto takes nccl only where learner and generators both hold GPUs."""
    if wanted == "auto":
        return "nccl" if learner_gpus > 0 and generator_gpus > 0 else "object_store"
    return "nccl" if wanted == "nccl" else "object_store"


# --- object_store, learner end -----------------------------------------------------------------------------------


def pack(state: Mapping[str, torch.Tensor]) -> tuple[Bytes, str]:
    """Write CPU tensors (HF names) as one safetensors file into memory; return it with its sha256.

    The second name of a tied tensor is left out. Laid out here because the safetensors library would hold each
    tensor, the list of them and the file at once; the equality with its reader is tested.
    """
    tensors: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    for name, tensor in sorted(state.items(), key=lambda item: (item[0].startswith("lm_head"), item[0])):
        storage = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and storage in seen:
            continue
        seen.add(storage)
        tensors[name] = tensor.detach()
    header, start = {}, 0
    for name, tensor in tensors.items():
        stop = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    buffer = np.empty(8 + len(text) + start, dtype=np.uint8)
    buffer[:8] = np.frombuffer(len(text).to_bytes(8, "little"), dtype=np.uint8)
    buffer[8 : 8 + len(text)] = np.frombuffer(text, dtype=np.uint8)
    body = torch.from_numpy(buffer)[8 + len(text) :]
    for name, tensor in tensors.items():
        first, last = header[name]["data_offsets"]
        body[first:last] = tensor.contiguous().view(-1).view(torch.uint8)
    return buffer, hashlib.sha256(buffer).hexdigest()


def weights_from_directory(directory: Path, version: int) -> Weights:
    """Return a policy in HF format on disk (one or several safetensors files) as `version`. Raises UserError."""
    state: dict[str, torch.Tensor] = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        state |= load_file(file)
    if not state:
        raise UserError(f"{directory}: no .safetensors file; export the policy again")
    buffer, sha256 = pack(state)
    return Weights(version=version, hash=sha256, handle=buffer)


# --- object_store, generator end ---------------------------------------------------------------------------------


class Mailbox:
    """The versions of one run on this node, as files in shared memory that every engine of the node can read.

    Engines that serve different versions (the evaluator's) need a mailbox of another name. The last to close it
    removes the files; a killed run leaves its newest version behind, which the next run of that name replaces.
    """

    def __init__(self, name: str) -> None:
        self._name = f"headroom-{os.getuid()}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
        first = self._roots()[0]
        first.mkdir(mode=0o700, exist_ok=True)
        self._users = open(first / "users", "w")
        fcntl.flock(self._users, fcntl.LOCK_SH)

    def find(self, version: int, sha256: str) -> Path | None:
        """Return the file of `version` if an engine of this node has written it already."""
        for root in self._roots():
            path = root / _file_name(version, sha256)
            if path.exists():
                return path
        return None

    def put(self, version: int, buffer: Bytes, sha256: str) -> Path:
        """Write `buffer` once per node and return its path. Raises InfraError if it is not what was sent."""
        root = next((r for r in self._roots() if _free_bytes(r.parent) > 1.1 * buffer.nbytes), self._roots()[-1])
        root.mkdir(mode=0o700, exist_ok=True)
        path = root / _file_name(version, sha256)
        with open(root / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second replica waits, then finds the file
            if path.exists():
                return path
            if sha256 and hashlib.sha256(buffer).hexdigest() != sha256:
                raise InfraError(f"weights of version {version} arrived damaged: sha256 differs from what was sent")
            partial = path.with_suffix(".partial")
            with open(partial, "wb") as file:
                file.write(memoryview(buffer))
            partial.rename(path)
        return path

    def remove_older(self, version: int) -> None:
        """Delete the files of versions before `version`."""
        for root in self._roots():
            for path in root.glob("v*.safetensors"):
                if int(path.name[1:].split("-")[0]) < version:
                    path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the files if no other engine of this node uses them."""
        try:
            fcntl.flock(self._users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        finally:
            roots = self._roots()
            self._users.close()
        for root in roots:
            shutil.rmtree(root, ignore_errors=True)

    def _roots(self) -> list[Path]:
        memory = [Path("/dev/shm")] if os.access("/dev/shm", os.W_OK) else []
        return [parent / self._name for parent in (*memory, Path(tempfile.gettempdir()))]


class Receiver(Protocol):
    """What `load_weights` needs of an engine."""

    version: int

    async def load(self, version: int, path: Path) -> None:
        """Load a file."""

    async def receive(self, version: int, tensor_list: Mapping[str, Any]) -> None:
        """Load an nccl broadcast."""


async def load_weights(engine: Receiver, weights: Weights, mailbox: Mailbox) -> None:
    """Fetch `weights` to this node unless it is here, and load it.

    The handle is a path, a buffer, an awaitable that gives a buffer (a Ray object reference), or the tensor list of
    an nccl broadcast.
    """
    if weights.version <= engine.version:
        return
    path = await fetch(weights, mailbox)
    if path is None:
        await engine.receive(weights.version, weights.handle)
        return
    await engine.load(weights.version, path)
    mailbox.remove_older(weights.version)


async def fetch(weights: Weights, mailbox: Mailbox) -> Path | None:
    """Return the file of `weights` on this node, written now if need be; None if they come by nccl."""
    handle = weights.handle
    if isinstance(handle, Mapping):
        return None
    if isinstance(handle, str | Path):
        return Path(handle)
    path = mailbox.find(weights.version, weights.hash)
    if path is None:
        buffer: Bytes = await handle if isinstance(handle, Awaitable) else handle
        path = await asyncio.to_thread(mailbox.put, weights.version, buffer, weights.hash)
    return path


def _file_name(version: int, sha256: str) -> str:
    return f"v{version:08d}-{sha256[:16] or 'unhashed'}.safetensors"


def _free_bytes(directory: Path) -> int:
    return shutil.disk_usage(directory).free


# --- nccl, learner end -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class NcclGroup:
    """The group of rank 0 of the learner and all vLLM workers; replica i starts at `rank_offset`."""

    master_address: str
    master_port: int
    world_size: int  # 1 + the workers of all replicas


class NcclSender:
    """Rank 0 of the learner in the transfer group. Written, not run yet: needs a GPU of its own per end.

    `connect` returns when every generator has called `Engine.join`; `send` when all have received, so the
    generators' `load` must run at the same time.
    """

    def __init__(self, group: NcclGroup) -> None:
        self._group = group
        self._communicator: Any = None

    def connect(self) -> None:
        """Rendezvous with the generators."""
        from vllm.distributed.weight_transfer.nccl_common import trainer_init  # heavy, GPU runs only

        self._communicator = trainer_init(asdict(self._group))

    def send(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Broadcast GPU tensors in the order of the `tensor_list` that travels in Weights.handle."""
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        packed_nccl_broadcast_producer(iter(tensors), self._communicator, 0, lambda item: item[1].contiguous())
        torch.cuda.current_stream().synchronize()


def tensor_list(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, list[Any]]:
    """Return what the receivers must know before an nccl broadcast: names, dtypes and shapes, in order."""
    items = [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors]
    return {
        "names": [name for name, _, _ in items],
        "dtype_names": [dtype for _, dtype, _ in items],
        "shapes": [shape for _, _, shape in items],
    }


# --- both transports, vLLM worker end ----------------------------------------------------------------------------


def register_with_vllm() -> None:
    """Register our weight-transfer engine with vLLM. Runs on import of actors.vllm_engine, also in the vLLM worker.

    The class stands inside so that a learner, which imports this file to send, does not load vllm (8 s).
    """
    from safetensors import safe_open
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateInfo
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferUpdateInfo
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    if BACKEND in WeightTransferEngineFactory._registry:
        return

    @dataclass
    class UpdateInfo(WeightTransferUpdateInfo):
        path: str | None = None  # None: an nccl broadcast of the tensors named below
        names: list[str] | None = None
        dtype_names: list[str] | None = None
        shapes: list[list[int]] | None = None

    class FileOrNcclEngine(NCCLWeightTransferEngine):
        """Receives one version from a safetensors file, or from vLLM's NCCL broadcast once a group was joined."""

        update_info_cls = UpdateInfo

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            end_with_owner()  # what of ours runs earliest in the worker

        def start_weight_update(self) -> None:
            """Do nothing: the old weights stay usable until the new ones are known to be readable."""

        def receive_weights(self, update_info: UpdateInfo) -> None:
            if update_info.path is None:
                initialize_layerwise_reload(self.model)
                tensors = {key: value for key, value in asdict(update_info).items() if key != "path"}
                super().receive_weights(NCCLWeightTransferUpdateInfo(**tensors))
                return
            with safe_open(update_info.path, framework="pt") as file:  # raises on a damaged file
                initialize_layerwise_reload(self.model)
                self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)
            head = getattr(self.model, "lm_head", None)
            if self.device.type == "cpu" and hasattr(head, "cpu_linear"):
                # vLLM 0.32 keeps the old packed copy of a tied head, without a warning.
                dispatch_cpu_unquantized_gemm(head, remove_weight=False)

    WeightTransferEngineFactory.register_engine(BACKEND, FileOrNcclEngine)
