"""Every use of a private part of torch, in one place.

Each function says why the public interface is not enough. tests/model/test_compat.py tests each of
them and names the version of torch, so that a release that breaks one is noticed here first.
Checked with torch 2.6 to 2.13.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.distributed_c10d import Store

# With fewer rows a matmul is memory-bound, and oneDNN has more overhead than MKL.
MIN_ROWS = 64


def cpu_capabilities() -> Mapping[str, Any]:
    """Return the instruction sets and the name of the processor; nothing before torch 2.13, which
    has the function."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def has_onednn_linear() -> bool:
    """Return whether `onednn_linear` works here: torch was built with oneDNN and has the
    operator."""
    is_available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return is_available and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(x_XD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """Compute x W^T + b by oneDNN; W may be a transposed view.

    F.linear in float32 always takes MKL, which is slower on processors that are not Intel's.
    """
    y_XF: Tensor = torch.ops.mkldnn._linear_pointwise(x_XD, weight_FD, bias_F, "none", [], "")
    return y_XF


def is_eager_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def uses_onednn(x_XD: Tensor, weight_FD: Tensor) -> bool:
    """Return whether x W^T is computed by `onednn_linear`, which is faster here than torch's own
    choice."""
    has_many_rows = x_XD.numel() >= MIN_ROWS * x_XD.shape[-1]
    is_float32 = x_XD.dtype == weight_FD.dtype == torch.float32
    is_faster = has_many_rows and is_float32 and is_eager_cpu(x_XD) and _prefers_onednn()
    return is_faster and not torch.is_autocast_enabled("cpu")


@lru_cache
def _prefers_onednn() -> bool:
    is_intel = str(cpu_capabilities().get("cpu_name", "")).startswith("Intel")
    return has_onednn_linear() and not is_intel


def softmax_gradient(grad_XS: Tensor, p_XS: Tensor) -> Tensor:
    """Compute the gradient by the inputs of a softmax p, in one pass, as torch's autograd does."""
    return torch.ops.aten._softmax_backward_data(grad_XS, p_XS, -1, p_XS.dtype)  # type: ignore[no-any-return]


def matmul_and_attention_ops() -> list[Callable[..., Any]]:
    """Return the operators whose results selective activation checkpointing saves.

    torch's policy takes a list of operators, and those of attention and oneDNN have private names.
    """
    aten = torch.ops.aten
    ops: list[Callable[..., Any]] = [
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    ]
    if has_onednn_linear():
        ops.append(torch.ops.mkldnn._linear_pointwise.default)
    return ops


def end_idle_threads() -> None:
    """End the threads of OpenMP that torch has started; the next operation starts new ones, which
    inherit the floating-point mode of this thread.

    `torch.set_flush_denormal` sets the mode of one thread. Nothing where torch is built without
    OpenMP 5.
    """
    library = ctypes.CDLL(torch._C.__file__)
    if hasattr(library, "omp_pause_resource_all"):
        library.omp_pause_resource_all(2)  # omp_pause_hard


def without_compiler_guard(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return an optimizer's method without the decorator that keeps torch's compiler out of it.

    Its first call imports the compiler, which takes 1.5 seconds, also where nothing is compiled.
    """
    unwrapped: Callable[..., Any] = inspect.unwrap(method)
    return unwrapped


def allocate_empty(module: nn.Module, device: torch.device) -> None:
    """Replace the parameters of a module on the meta device by uninitialised ones on `device`.

    `Module.to_empty` imports sympy, to find the strides of meta tensors; `_apply` is what it calls.
    """

    def empty_like(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    module._apply(empty_like)  # type: ignore[no-untyped-call]


def speed_up_attribute_access(module: nn.Module) -> None:
    """Store the parameters and submodules of a module, at all levels, as plain attributes too.

    `nn.Module.__getattr__` looks them up in Python, about a hundred times for each generated token.
    Parameters that are assigned later are not seen; values that are copied into them are.
    """
    for submodule in module.modules():
        submodule.__dict__.update(submodule._parameters)
        submodule.__dict__.update(submodule._modules)


def ddp_ignore_parameters(module: nn.Module, names: Iterable[str]) -> None:
    """Keep DistributedDataParallel from all-reducing the gradients of these parameters.

    DDP cannot reduce sparse gradients with gradient_as_bucket_view, and has no public option.
    """
    from torch.nn.parallel import DistributedDataParallel

    ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(module, list(names))  # type: ignore[no-untyped-call]


def default_store() -> Store:
    """Return the key-value store through which the processes of the default group met.

    A group made by `init_process_group` has no public access to its store, and collectives, which
    have a timeout, cannot be used to wait for a process or to find out which one is missing.
    """
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def flatten_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Return a mesh of one axis with the ranks of all axes of `mesh`.

    FSDP shards over one axis, which here is that of shards times that of chunks of a window; torch
    has no public way to make one axis of two.
    """
    return mesh._flatten()


def join_meshes(outer: DeviceMesh, inner: DeviceMesh) -> DeviceMesh:
    """Return a mesh with the axes of both, of which `inner` was flattened.

    Until torch 2.10 the root mesh is sliced by the names of both, which later versions deprecate.
    """
    if hasattr(type(outer), "_concatenate"):
        return type(outer)._concatenate([outer, inner])
    from torch.distributed.device_mesh import _mesh_resources

    names = (*(outer.mesh_dim_names or ()), *(inner.mesh_dim_names or ()))
    return _mesh_resources.get_root_mesh(outer)[names]
