"""Private parts of torch still do what `pretrain.compat` uses them for."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from pretrain import compat

CHANGED = f"torch {torch.__version__} has changed; adapt src/pretrain/compat.py"


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of this one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_onednn_linear_equals_torchs() -> None:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        pytest.skip("torch was built without oneDNN")
    assert compat.has_onednn_linear(), CHANGED
    x, weight, bias = torch.randn(5, 8), torch.randn(8, 3).T, torch.randn(3)
    expected = nn.functional.linear(x, weight, bias)
    assert torch.allclose(compat.onednn_linear(x, weight, bias), expected, atol=1e-5), CHANGED


def test_softmax_gradient_equals_autograds() -> None:
    x, grad = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    p = x.softmax(-1)
    (expected,) = torch.autograd.grad(p, x, grad)
    assert torch.equal(compat.softmax_gradient(grad, p.detach()), expected), CHANGED


def test_matmul_and_attention_have_operators() -> None:
    names = {str(op) for op in compat.matmul_and_attention_ops()}
    assert "aten.mm.default" in names, CHANGED
    assert len([name for name in names if "scaled_dot_product" in name]) == 4, CHANGED


def test_an_unwrapped_optimizer_step_is_the_step_and_imports_no_compiler() -> None:
    program = """
import sys, torch
from pretrain.compat import without_compiler_guard
step = without_compiler_guard(torch.optim.AdamW.step)
weight = torch.nn.Parameter(torch.ones(2))
add = without_compiler_guard(torch.optim.Optimizer.add_param_group)
class Plain(torch.optim.AdamW):
    def add_param_group(self, group):
        add(self, group)
optimizer = Plain([weight], lr=0.1, weight_decay=0.0)
weight.grad = torch.ones(2)
with torch.no_grad():
    step(optimizer)
assert torch.allclose(weight, torch.full((2,), 0.9)), weight
assert "torch._dynamo" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, f"{CHANGED}: {result.stderr}"


def test_denormals_are_zero_in_all_threads_of_a_process_that_has_used_torch() -> None:
    # torch 2.13.0: `set_flush_denormal` sets the mode of the calling thread alone, and threads that
    # exist keep theirs: half of these numbers stayed denormal without `end_idle_threads`.
    program = """
import torch
torch.set_num_threads(2)
tiny = torch.full((1 << 20,), 1e-39)
assert int((tiny.view(torch.int32) != 0).sum()) == 1 << 20  # in both threads, before
from pretrain.distributed import open_world
open_world("cpu", threads=2)
products = tiny * 1.0
torch.set_flush_denormal(False)  # else a comparison would flush them too
n_denormal = int((products.view(torch.int32) != 0).sum())
assert n_denormal == 0, n_denormal
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, f"{CHANGED}: {result.stderr}"


def test_allocate_empty_gives_a_meta_module_memory_and_keeps_its_parameters() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    names = [name for name, _ in module.named_parameters()]
    compat.allocate_empty(module, torch.device("cpu"))
    assert [name for name, _ in module.named_parameters()] == names, CHANGED
    for parameter in module.parameters():
        assert isinstance(parameter, nn.Parameter), CHANGED
        assert parameter.device.type == "cpu", CHANGED


def test_attributes_of_a_module_are_found_without_getattr() -> None:
    module = nn.Sequential(nn.Linear(3, 4))
    layer = module[0]
    compat.speed_up_attribute_access(module)
    assert layer.__dict__["weight"] is layer.weight, CHANGED
    module.load_state_dict({"0.weight": torch.ones(4, 3), "0.bias": torch.zeros(4)})
    assert torch.equal(module(torch.ones(1, 3)), torch.full((1, 4), 3.0)), CHANGED


@pytest.mark.usefixtures("process_group")
def test_ddp_ignores_parameters_and_the_store_can_be_reached() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    compat.ddp_ignore_parameters(module, ["1.weight"])
    copies = DistributedDataParallel(module, init_sync=False)
    assert copies.parameters_to_ignore == {"1.weight"}, CHANGED
    store = compat.default_store()
    store.set("key", "value")
    assert store.get("key") == b"value", CHANGED


def test_axes_of_a_mesh_are_flattened_and_joined() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("outer", "middle", "inner"))
        flat = compat.flatten_mesh(mesh["middle", "inner"])
        assert flat.mesh.tolist() == [0, 1, 2, 3], CHANGED
        joined = compat.join_meshes(mesh["outer"], flat)
        assert joined.mesh.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]], CHANGED
    finally:
        dist.destroy_process_group()
